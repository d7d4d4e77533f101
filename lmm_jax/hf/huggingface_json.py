"""A tokenizer.json that was loaded, exported as it was released: a converter of `lmm_jax.hf.tokenizer_json`.

Only pieces that a model with pictures needs and that are not there, `<image>` and `<pad>`, are added to it.
tokenizer_config.json names them (`lmm_jax_added`), so that our `load` makes the tokenizer of before from the folder.
"""

import json

from lmm_jax.data.tokenizer.tokenizer import EXTRA


def added(tokenizer) -> dict[str, int]:
    """Ids of the added tokens, by piece."""
    return {piece: token["id"] for piece, token in tokenizer.added.items()}


def pad(tokenizer) -> str | None:
    """The piece that pads, None if it has none."""
    return tokenizer.pad


def spaces(tokenizer) -> tuple[bool, bool, bool]:
    """See `tokenizer_json`."""
    return tokenizer.starts_with_mark, False, True


def tokenizer_config(tokenizer, extra) -> dict:
    """What was read, and which pieces are added to it."""
    new = [piece for _, piece in sorted(_new(tokenizer, extra).items())]
    kept = {key: value for key, value in tokenizer.settings.items() if key != EXTRA}
    return kept | ({EXTRA: new} if new else {})


def tokenizer_json(tokenizer, extra) -> bytes:
    """The bytes that were read, or their content with the added pieces."""
    new = _new(tokenizer, extra)
    if not new and EXTRA not in tokenizer.settings:
        return tokenizer.source
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokens = [*tokenizer.added.values(), *({"id": i, "content": piece, **flags} for i, piece in new.items())]
    content = json.loads(tokenizer.source) | {"added_tokens": sorted(tokens, key=lambda token: token["id"])}
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _new(tokenizer, extra):
    return {i: piece for i, piece in extra.items() if i >= tokenizer.vocab_size}
