"""A page on which a model is asked at several numbers of visual tokens, and shows what they stand for."""
