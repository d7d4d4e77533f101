"""Data sets that `lmm prepare --dataset NAME` knows how to build.

To add one, write a module here and name it in `DATASETS`. The first line of its docstring is its help text. It gives:

    ROWS                          rows of each split, as `{split: number}`; None stands for all that the source has
    check(source)                 list of all that is wrong with the source, each a sentence for the user
    records(source, split, rows)  iterator over the first `rows` records of a split, all if None, the same each time

`source` is the folder that `--source` names, or None. A record is a dict of `id` (str), `images` (encoded bytes of
each) and `turns`, of which each has `role` ("user" or "assistant"), `text` (`<image>` in it stands for the next
picture) and `kind` (of question, to evaluate by; empty if there are none).
"""

from lmm_jax.data.prepare.datasets import digits, pages

DATASETS = {"digits": digits, "pages": pages}
