"""A SentencePiece model as Hugging Face's tokenizer.json: a converter of `lmm_jax.hf.tokenizer_json`.

Where the format allows it the ids are those of `data.tokenizer`, which transformers' own converters miss: they leave
out the word mark before a text that starts with a space. What is left:

- A piece that is user-defined, and no marker like `<|end|>`, takes the word mark before it at the start of a text; if
  `legacy`, it is followed by one.
- With `remove_extra_whitespaces` (not LLaMA's, but `train_tokenizer`'s), our `SentencePiece` takes spaces in a row
  for one, and drops those at the end, only where it puts a word mark; here that is so everywhere, except where a ▁ is
  written for a space (which nmt_nfkc undoes). A ▁ at the end of a text is dropped there, and is not here.
- A run of unknown characters is one `<unk>`, also across two turns, where our `SentencePiece` has two.
- A Unigram model may cut a run of one character at other places: the cuts score the same, but for rounding.
- In a Unigram model with byte pieces, text like `<0x41>` of characters that it does not know is taken for a byte.
"""

import base64
import dataclasses
import enum
import json
import struct

SPACE, MARK = " ", "▁"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
Kind = enum.IntEnum("Kind", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")  # SentencePiece.Type


@dataclasses.dataclass(frozen=True)
class Model:
    """What we need of a SentencePiece model file.

    Attributes:
      pieces: `(text, score, kind)` of each.
      kind: UNIGRAM, BPE or another.
      byte_fallback: whether unknown characters are spelled in byte pieces.
      unk: id of the unknown piece.
      charsmap: compiled rules of normalisation, or b"".
      prefix: whether a text gets a word mark in front.
      one_space: whether spaces in a row are one, and those around a text none.
      llama_spaces: whether a space is written as ▁, before a word.
    """

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    unk: int
    charsmap: bytes
    prefix: bool
    one_space: bool
    llama_spaces: bool


def read_model(data: bytes) -> Model:
    """Parses a model file: ModelProto of sentencepiece_model.proto.

    Its generated module, which the package contains, would ask for the newest protobuf of all.
    """
    fields = _fields(data)
    pieces = []
    for message in fields.get(1, []):
        piece = _fields(message)
        (score,) = struct.unpack("<f", piece.get(2, [bytes(4)])[-1])
        pieces.append((piece[1][-1].decode(), score, piece.get(3, [Kind.NORMAL])[-1]))
    trainer, normalizer = (_fields(b"".join(fields.get(number, []))) for number in (2, 3))
    return Model(
        pieces=pieces,
        kind=trainer.get(3, [UNIGRAM])[-1],
        byte_fallback=bool(trainer.get(35, [0])[-1]),
        unk=trainer.get(40, [0])[-1],
        charsmap=normalizer.get(2, [b""])[-1],
        prefix=bool(normalizer.get(3, [1])[-1]),
        one_space=bool(normalizer.get(4, [1])[-1]),
        llama_spaces=bool(normalizer.get(5, [1])[-1]) and not trainer.get(24, [0])[-1],
    )


def _fields(message):
    """Values of a protocol buffer's message by field number: int, or bytes if it is no varint."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(wire) or varint()
            value, at = message[at : at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def added(tokenizer) -> dict[str, int]:
    """Ids of the pieces that the model file lacks, by piece."""
    return {piece: i for piece, (i, _) in tokenizer.added.items()}


def pad(tokenizer) -> None:
    """The piece that pads: none that we know of."""
    return None


def spaces(tokenizer) -> tuple[bool, bool, bool]:
    """`(prefix, one_space)` of `Model`, and that a text which begins with a space gets a mark all the same."""
    model = read_model(tokenizer.model)
    return model.prefix, model.one_space, False


def tokenizer_config(tokenizer, extra) -> dict:
    """What `SentencePiece.load` reads, which has to find the added pieces that it knows and no others; and names."""
    known = {i for i, _ in tokenizer.added.values()}
    return {
        "legacy": tokenizer.legacy,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in added_tokens(tokenizer, extra) if token["id"] in known
        },
        "bos_token": tokenizer.piece(tokenizer.bos),
        "eos_token": tokenizer.piece(tokenizer.eos),
        "unk_token": tokenizer.piece(read_model(tokenizer.model).unk),
        "add_bos_token": True,
        "add_eos_token": False,
    }


def tokenizer_json(tokenizer, extra) -> bytes:
    """The content of Hugging Face's tokenizer.json, for BPE and Unigram models.

    Args:
      tokenizer: a `SentencePiece`.
      extra: pieces to add to it, as `{id: piece}`.

    Raises:
      ValueError: a model of another type, or one that writes spaces in another way than LLaMA's.
    """
    model = read_model(tokenizer.model)
    if model.kind not in (UNIGRAM, BPE):
        raise ValueError("tokenizer.json holds SentencePiece models of type BPE and Unigram, this is of neither")
    if not model.llama_spaces:
        raise ValueError("tokenizer.json needs a SentencePiece model that writes a space as ▁ before a word")
    vocabulary = _vocabulary(tokenizer, model, extra)
    bos = tokenizer.piece(tokenizer.bos)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    decoders = [_replace({"String": MARK}, SPACE), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.prefix:
        decoders.append({"type": "Strip", "content": SPACE, "start": 1, "stop": 0})
    normalizers, pre_tokenizers = _spaces(model, tokenizer.legacy)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokenizer, extra),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model, vocabulary) if model.kind == UNIGRAM else _bpe(model, vocabulary),
    }
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _vocabulary(tokenizer, model, extra):
    """The piece of each id; all of them, so that each keeps its number."""
    pieces = dict(enumerate(piece for piece, _, _ in model.pieces))
    pieces |= {i: piece for piece, i in added(tokenizer).items()} | extra
    return [pieces.get(i, f"<|nothing_{i}|>") for i in range(max(pieces) + 1)]


def added_tokens(tokenizer, extra) -> list[dict]:
    """What is found in text before it is tokenised: control and user-defined pieces, and those added to the model."""
    model = read_model(tokenizer.model)
    vocabulary = _vocabulary(tokenizer, model, extra)
    strips = dict.fromkeys(extra, False) | dict(tokenizer.added.values())
    user_defined = set()
    for i, (_, _, kind) in enumerate(model.pieces):
        if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED):
            strips.setdefault(i, False)
        if kind == Kind.USER_DEFINED and tokenizer.decode([i]):  # not one of those that structure a prompt
            user_defined.add(i)
    return [
        {
            "id": i,
            "content": vocabulary[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": strips[i],
            "normalized": False,
            "special": i not in user_defined and vocabulary[i] not in tokenizer.ordinary,
        }
        for i in sorted(strips)
    ]


def _replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def _metaspace(replacement, scheme):
    return {"type": "Metaspace", "replacement": replacement, "prepend_scheme": scheme, "split": False}


def _spaces(model, legacy):
    """`(normalizers, pre-tokenizers)` that put and write word marks as SentencePiece does.

    A normalizer acts on each stretch of text between control pieces. Only Metaspace can mark the first alone; but it
    leaves out the mark before a text that starts with what it replaces. So spaces are marks by then, except where
    SentencePiece itself takes several for one.
    """
    steps = []
    if model.charsmap:
        charsmap = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if model.one_space:
        steps += [_replace({"Regex": " {2,}"}, SPACE), _replace({"Regex": r" +\z"}, "")]
    first = model.prefix and not legacy
    if legacy and model.one_space:
        steps.append(_replace({"Regex": r"\A +"}, ""))
    if legacy and model.prefix:
        steps.append({"type": "Prepend", "prepend": MARK})
    if not (first and model.one_space):
        steps.append(_replace({"String": SPACE}, MARK))
    return steps, [_metaspace(SPACE, "first" if first else "never"), _metaspace(MARK, "never")]


def _bpe(model, vocabulary):
    scores = {piece: score for piece, score, kind in model.pieces if kind == Kind.NORMAL}
    merges = [
        (piece[:at], piece[at:])
        for piece in sorted(scores, key=scores.get, reverse=True)  # stable: of equals the earlier one
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in scores and piece[at:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": vocabulary[model.unk],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(vocabulary)},
        "merges": merges,
    }


def _unigram(model, vocabulary):
    scores = {piece: score for piece, score, kind in model.pieces if kind == Kind.NORMAL}
    # No text may take the other pieces for words: worse than any word in characters that are not known.
    never = min(scores.values(), default=0.0) * 32 - 1000
    return {
        "type": "Unigram",
        "unk_id": model.unk,
        "byte_fallback": model.byte_fallback,
        "vocab": [[piece, scores.get(piece, never)] for piece in vocabulary],
    }
