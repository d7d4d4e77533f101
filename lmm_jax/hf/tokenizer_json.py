"""A tokenizer as transformers reads it, whatever its kind, with the pieces that a model with pictures needs there.

transformers reads one file, tokenizer.json. Each kind of tokenizer has a converter, a module that gives:

    added(tokenizer)                    ids of the pieces that the tokenizer adds to its model, by piece
    pad(tokenizer)                      the piece that pads, or None
    tokenizer_json(tokenizer, extra)    the content of tokenizer.json, as bytes
    tokenizer_config(tokenizer, extra)  what tokenizer_config.json says of pieces, for transformers and for our `load`
    spaces(tokenizer)                   `(prefix, one_space, once)`: whether a text gets a word mark in front; whether
                                        spaces in a row are one, and those around a text none; and whether a text that
                                        begins with a space gets no further mark

`extra` are the pieces of a picture's placeholder and of padding, mostly `<image>` and `<pad>`, as `{id: piece}`.
"""

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.hf import huggingface_json, sentencepiece_json

PAD = "<pad>"
MULTIPLE = 64  # rows of the tables, as llava-hf pads them: 32000 -> 32064
CONVERTERS = {"sentencepiece": sentencepiece_json, "huggingface": huggingface_json}


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


def added_ids(tokenizer, held=0, placeholder=IMAGE_TAG) -> tuple[int, int, int]:
    """`(id of the placeholder, id of <pad>, rows)`: the pieces that are added to ours, and rows of the tables.

    Args:
      tokenizer: a `Tokenizer`.
      held: rows that a model has for pieces. The tables are padded only where these are too few.
      placeholder: piece that stands for a picture.
    """
    added = converter(tokenizer).added(tokenizer)
    image = added.get(placeholder, tokenizer.vocab_size)
    pad = added.get(_pad(tokenizer), max(tokenizer.vocab_size, image + 1))
    rows = max(tokenizer.vocab_size, image + 1, pad + 1)
    return image, pad, held if held >= rows else -(-rows // MULTIPLE) * MULTIPLE


def _pad(tokenizer):
    return converter(tokenizer).pad(tokenizer) or PAD


def tokenizer_json(tokenizer, placeholder=IMAGE_TAG) -> bytes:
    """The content of Hugging Face's tokenizer.json.

    Raises:
      ValueError: a tokenizer that the file cannot hold.
    """
    return converter(tokenizer).tokenizer_json(tokenizer, _extra(tokenizer, placeholder))


def tokenizer_config(tokenizer, stop, placeholder=IMAGE_TAG) -> dict:
    """What tokenizer_config.json says of the pieces of a tokenizer.

    Args:
      tokenizer: a `Tokenizer`.
      placeholder: piece that stands for a picture.
      stop: id that ends an answer. A control piece is named as the end piece, so that clients that ask the tokenizer
        stop there; an end that is text, as a caption's line break, is known to generation_config.json alone.
    """
    about = {**converter(tokenizer).tokenizer_config(tokenizer, _extra(tokenizer, placeholder))}
    about["pad_token"] = _pad(tokenizer)
    return about | ({"eos_token": tokenizer.piece(stop)} if tokenizer.spelling(stop) is None else {})


def _extra(tokenizer, placeholder):
    image, pad, _ = added_ids(tokenizer, placeholder=placeholder)
    return {image: placeholder, pad: _pad(tokenizer)}
