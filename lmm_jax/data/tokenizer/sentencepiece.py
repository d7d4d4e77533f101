"""The tokenizer of LLaMA and its relatives: a SentencePiece model file."""

import contextlib
import hashlib
import io
import itertools
import json
import re

import sentencepiece as spm
from etils import epath

from lmm_jax import strict_json
from lmm_jax.data.tokenizer.tokenizer import MARKER, MOST_GAP, SETTINGS, Tokenizer, read_bytes, read_id

# Protobuf merges concatenated messages. In ModelProto.normalizer_spec (field 3): add_dummy_prefix (3) = false, and
# remove_extra_whitespaces (4) = false, as the space that leads on from the text before is not an extra one.
GOES_ON = b"\x1a\x04\x18\x00\x20\x00"
OWN = ("<unk>", "<s>", "</s>")  # control pieces that SentencePiece gives every model that it trains


class SentencePiece(Tokenizer):
    """A SentencePiece model; pickles as its bytes and settings.

    Control pieces are `<s>`, `</s>`, `<unk>`, markers like `<|im_end|>`, and the added ones, but for those that are
    ordinary.

    Attributes:
      model: bytes of the model file.
      legacy: whether text that follows a control piece gets a word mark of its own (`prefix_after_control`). The
        first LLaMA tokenizers do that, Vicuna-1.5 and LLaVA-1.5 (`"legacy": false`) do not.
      added: pieces that the model file lacks, as `{piece: (id, strip)}`; `strip` drops the white space after one.
      ordinary: those of `added` that text makes, such as `<loc>` that somebody added for boxes.
      vocab_size: ids, added ones included.
      bos, eos: ids of the begin and end pieces.
    """

    kind = "sentencepiece"
    FILES = ("tokenizer.model", "tokenizer_config.json")

    def __init__(self, model: bytes, legacy=False, added=None, ordinary=()):
        """Raises ValueError if `model` is not a SentencePiece model, or has no begin or end piece."""
        self.model, self.legacy, self.added = model, bool(legacy), dict(added or {})
        try:
            self._processor = spm.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(model)
            self._bare = spm.SentencePieceProcessor()
            self._bare.load_from_serialized_proto(model + GOES_ON)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {_name_model(model)}") from error
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise ValueError("the SentencePiece model has no <s> or no </s> piece")
        self._pieces = self._processor.id_to_piece(list(range(self._processor.vocab_size())))
        inside = {
            piece for piece in ordinary if self.added[piece][0] < len(self._pieces)
        }  # which the model file finds
        self.added = {piece: about for piece, about in self.added.items() if piece not in inside}
        self.ordinary = frozenset(ordinary) - inside
        self._check_added()
        self.vocab_size = max(len(self._pieces), *(1 + i for i, _ in self.added.values()), 0)
        # A marker that is a piece of the model was made to be matched in text, which data must not do.
        self._markers = {piece: i for i, piece in enumerate(self._pieces) if MARKER.fullmatch(piece)}
        self._control = {piece: i for i, piece in enumerate(self._pieces) if self._is_control(i)} | self._markers
        self._control |= {"<s>": self.bos, "</s>": self.eos} | {
            piece: i for piece, (i, _) in self.added.items() if piece not in self.ordinary
        }
        self._inside_marker = re.compile(
            "|".join(f"(?<={re.escape(m[0])})(?={re.escape(m[1:])})" for m in self._markers) or "(?!)"
        )
        strips = {piece for piece, (_, strip) in self.added.items() if strip}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._any_control = re.compile(
            "|".join(re.escape(piece) + r"\s*" * (piece in strips) for piece in longest_first)
        )

        self._ordinary = {self.added[piece][0] for piece in self.ordinary}
        ordinary = sorted(self.ordinary, key=len, reverse=True)
        self._any_ordinary = re.compile(f"({'|'.join(map(re.escape, ordinary))})") if ordinary else None

    def _check_added(self):
        """Raises ValueError for added pieces that share an id, or that leave a gap no table is padded by."""
        of = {}
        for piece, (i, _) in sorted(self.added.items(), key=lambda item: item[1]):
            if of.setdefault(i, piece) != piece:
                raise ValueError(f"the added pieces {of[i]!r} and {piece!r} have the same id {i}")
            if i > len(self._pieces) + len(self.added) + MOST_GAP:
                raise ValueError(
                    f"the added piece {piece!r} has the id {i}, and the model file has {len(self._pieces)} pieces: "
                    "those between are missing; copy the tokenizer's files anew"
                )

    @property
    def text_ids(self) -> int:
        """See `Tokenizer.text_ids`: of the added pieces text makes the ordinary ones alone."""
        return max(len(self._pieces), *(1 + self.added[piece][0] for piece in self.ordinary), 0)

    def _is_control(self, i):
        return self._processor.is_control(i) or self._processor.is_unknown(i)

    @classmethod
    def recognises(cls, path) -> bool:
        """Whether `path` is a folder with a `tokenizer.model`, or a file called `NAME.model`.

        Published models have other names too: spiece.model, sentencepiece.bpe.model, tokenizer.model.v3.
        """
        path = epath.Path(path)
        return super().recognises(path) or (".model" in path.name and not path.is_dir())

    @classmethod
    def load(cls, path):
        """Reads a model file, or the `tokenizer.model` of a folder; the error of a bad one names it.

        A `tokenizer_config.json` beside it, as Hugging Face writes them, gives `legacy` (true if it says nothing, as
        there) and the added pieces; where it says nothing of these, as transformers 5 writes it, tokenizer.json and
        added_tokens.json do. They are only read: templates in them are never executed.
        """
        path = epath.Path(path)
        path = path / cls.FILES[0] if path.is_dir() else path
        beside = path.parent / cls.FILES[1]
        legacy, entries = cls._settings(beside) if beside.exists() else (False, None)
        if entries is None:
            entries = _entries_elsewhere(path.parent)
        ordinary = {piece for piece, _, _, special in entries if not (special or MARKER.fullmatch(piece))}
        added = {piece: (i, strip) for piece, i, strip, _ in entries}
        model = read_bytes(path)
        try:
            return cls(model, legacy, added, ordinary)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @staticmethod
    def _settings(path):
        """`(legacy, added)` of a tokenizer_config.json; null is as good as nothing, and `added` is None then."""
        with _reading(path, "added_tokens_decoder") as settings:
            legacy, entries = settings.get("legacy"), settings.get("added_tokens_decoder")
            added = None if entries is None else [_entry(token, i) for i, token in entries.items()]
        return legacy is None or legacy, added

    def save(self, folder):
        """Writes `tokenizer.model` and `tokenizer_config.json`, as `load` reads them."""
        folder = epath.Path(folder)
        (folder / self.FILES[0]).write_bytes(self.model)
        added = {str(i): {"content": piece, "rstrip": strip} for piece, (i, strip) in self.added.items()}
        for piece in self.ordinary:
            added[str(self.added[piece][0])]["special"] = False
        settings = {"legacy": self.legacy, "added_tokens_decoder": added}
        (folder / self.FILES[1]).write_text(json.dumps(settings, indent=1) + "\n")

    @property
    def prefix_after_control(self) -> bool:
        """Whether text that follows a control piece gets a word mark, see `legacy`."""
        return self.legacy

    @property
    def fingerprint(self) -> str:
        """sha256 of the model file, and of the settings where they are not the default ones."""
        settings = repr((self.legacy, sorted(self.added.items()))) if self.legacy or self.added else ""
        settings += repr(sorted(self.ordinary)) if self.ordinary else ""
        return hashlib.sha256(self.model + settings.encode()).hexdigest()

    def encode(self, text, prefix=True) -> list[int]:
        """Ids of `text`, without begin or end piece.

        Args:
          text: of any origin; control pieces in it are spelled out.
          prefix: whether a word mark is put before it, as the model file says; else `text` goes on what came before.
        """
        if self._any_ordinary is None or not (parts := self._any_ordinary.split(text))[1:]:
            return self._encode(text, prefix)
        ids = []
        for number, part in enumerate(parts):
            ids += [self.added[part][0]] if number % 2 else self._encode(part, prefix) if part else []
            prefix = self.prefix_after_control
        return ids

    def _encode(self, text, prefix):
        """Ids of a text without ordinary added pieces."""
        head, *rest = self._inside_marker.split(text)
        ids = (self._processor if prefix else self._bare).encode(head)
        for part in rest:
            ids += self._bare.encode(part)
        return ids

    def markup(self, text) -> list[str | int]:
        """Splits `text` at its control pieces, which become ids. For text of our own, never for data."""
        items, at = [], 0
        for match in self._any_control.finditer(text):
            items += [text[at : match.start()], self._control[match.group().rstrip()]]
            at = match.end()
        return [item for item in [*items, text[at:]] if item != ""]

    def decode(self, ids) -> str:
        """Text of `ids`; control and padded ids, and pictures, leave nothing."""
        hidden = self._markers.values()
        ids = [i for i in map(int, ids) if i in self._ordinary or (0 <= i < len(self._pieces) and i not in hidden)]
        first = next((n for n, i in enumerate(ids) if i in self._ordinary), None)
        if first is None:
            return self._processor.decode(ids)
        text, mark = "", " " if self.legacy else ""  # of each text behind an added piece, as before the first one
        for ordinary, run in itertools.groupby(ids[first:], key=self._ordinary.__contains__):
            spelled = b"".join(self.spelling(i) or b"" for i in run).decode(errors="replace")
            text += spelled if ordinary else spelled.removeprefix(mark)
        return self._processor.decode(ids[:first]) + text

    def piece(self, i) -> str:
        """The piece of one id, as the tokenizer's files write it."""
        added = {number: piece for piece, (number, _) in self.added.items()}
        return added.get(int(i)) or self._processor.id_to_piece(int(i))

    def spelling(self, i) -> bytes | None:
        """What one id adds to a text, in UTF-8; None for a control id, which adds nothing.

        A space is written ▁ in pieces, and the piece of a byte is its number, as in <0xE2>.
        """
        if i in self._control.values():
            return None
        piece = self.piece(i)
        if piece in self.ordinary:
            return piece.encode()
        return bytes.fromhex(piece[3:5]) if self._processor.is_byte(int(i)) else piece.replace("▁", " ").encode()

    @classmethod
    def train(cls, lines, vocab_size, byte_fallback=False, markers=()) -> "SentencePiece":
        """A tokenizer of our own, see `train_tokenizer`."""
        return cls(train_tokenizer(lines, vocab_size, byte_fallback, markers))

    def __reduce__(self):
        return SentencePiece, (self.model, self.legacy, self.added, self.ordinary)


@contextlib.contextmanager
def _reading(path, key):
    """The object that a file beside a model holds; whatever is wrong with it or its `key` is a ValueError."""
    try:
        content = strict_json.parse(read_bytes(path))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        if fault := strict_json.fault(content, SETTINGS):
            raise ValueError(fault)
        yield content
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of whatever else it may hold
        raise ValueError(f"{path} is not what Hugging Face writes: {key}: {error}") from error


def _entry(token, i):
    """`(piece, id, strip, special)` of an added token with its flags."""
    piece = token["content"]
    if not (isinstance(piece, str) and piece):
        raise ValueError(f"it has the piece {piece!r} with id {i}")
    return piece, read_id(piece, i), bool(token.get("rstrip")), token.get("special") is not False


def _entries_elsewhere(folder):
    """Added tokens, see `_entry`, of a folder whose tokenizer_config.json says nothing of them."""
    whole, older, named = (
        folder / name for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json")
    )
    entries = []
    if older.exists():
        special = read_bytes(named).decode(errors="replace") if named.exists() else ""
        with _reading(older, "a piece") as added:
            tokens = {p: {"content": p, "special": json.dumps(p) in special} for p in added}
            entries += [_entry(tokens[piece], i) for piece, i in added.items()]
    if whole.exists():
        with _reading(whole, "added_tokens") as content:
            entries += [_entry(token, token["id"]) for token in content.get("added_tokens") or ()]
    return entries


def _name_model(model):
    """What the bytes of a file are that is no SentencePiece model, as far as they tell."""
    if not model:
        return "it is empty"
    if model.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", model):
        return "it is a vocabulary of tiktoken, which we do not read; put the model's tokenizer.json in its place"
    if model.isascii():
        return f"it is a text that begins with {model[:40].decode()!r}"
    return "it is damaged or of another kind; copy it anew"


def train_tokenizer(lines, vocab_size, byte_fallback=False, markers=()) -> bytes:
    """Trains a small BPE model on `lines`, LLaMA-like: identity normalisation, unk 0, `<s>` 1, `</s>` 2.

    Letters and digits may share a piece, so that the name of a cell ("b2") is one.

    Args:
      lines: iterable of texts.
      vocab_size: pieces at most; fewer if the lines have no more to give.
      byte_fallback: adds a piece for each byte, so that any text can be spelled.
      markers: pieces that structure a prompt, see `conversation.structural_pieces`. Each becomes a control piece,
        which text never makes.

    Raises:
      ValueError: lines that no tokenizer can be trained on.
    """
    settings = {"character_coverage": 0.9995, "byte_fallback": True} if byte_fallback else {"character_coverage": 1.0}
    if control := [piece for piece in markers if piece not in OWN]:
        settings["control_symbols"] = control
    out = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            split_by_number=False,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size:,} pieces can be trained on these texts: {error}") from error
    return out.getvalue()
