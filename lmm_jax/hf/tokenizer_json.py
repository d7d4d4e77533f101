"""A tokenizer as transformers reads it, whatever its kind, with the pieces that a model with pictures needs there.

transformers reads one file, tokenizer.json. Each kind of tokenizer has a converter, a module that gives:

    added(tokenizer)                    ids of the pieces that the tokenizer adds to its model, by piece
    tokenizer_json(tokenizer, extra)    the content of tokenizer.json, as a dict
    tokenizer_config(tokenizer, extra)  what tokenizer_config.json says of pieces, for transformers and for our `load`
    spaces(tokenizer)                   `(prefix, one_space)`: whether a text gets a word mark in front, and whether
                                        spaces in a row are one, and those around a text none

`extra` are `<image>` and `<pad>`, as `{id: piece}`.
"""

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.hf import sentencepiece_json

PAD = "<pad>"
MULTIPLE = 64  # rows of the tables, as llava-hf pads them: 32000 -> 32064
CONVERTERS = {"sentencepiece": sentencepiece_json}


def converter(tokenizer):
    """The converter of a tokenizer's kind.

    Raises:
      ValueError: its kind has none, so that a model with this tokenizer cannot be exported for transformers.
    """
    if tokenizer.kind not in CONVERTERS:
        raise ValueError(
            f"exports for transformers need a tokenizer.json; a tokenizer of kind '{tokenizer.kind}' has no "
            f"converter (kinds that have one: {', '.join(CONVERTERS)})"
        )
    return CONVERTERS[tokenizer.kind]


def added_ids(tokenizer) -> tuple[int, int, int]:
    """`(id of <image>, id of <pad>, rows)`: the pieces that are added to ours, and rows of the padded tables."""
    added = converter(tokenizer).added(tokenizer)
    image = added.get(IMAGE_TAG, tokenizer.vocab_size)
    pad = added.get(PAD, max(tokenizer.vocab_size, image + 1))
    rows = max(tokenizer.vocab_size, image + 1, pad + 1)
    return image, pad, -(-rows // MULTIPLE) * MULTIPLE


def tokenizer_json(tokenizer) -> dict:
    """The content of Hugging Face's tokenizer.json.

    Raises:
      ValueError: a tokenizer that the file cannot hold.
    """
    return converter(tokenizer).tokenizer_json(tokenizer, _extra(tokenizer))


def tokenizer_config(tokenizer) -> dict:
    """What tokenizer_config.json says of the pieces of a tokenizer."""
    return {**converter(tokenizer).tokenizer_config(tokenizer, _extra(tokenizer)), "pad_token": PAD}


def _extra(tokenizer):
    image, pad, _ = added_ids(tokenizer)
    return {image: IMAGE_TAG, pad: PAD}
