"""The tokenizer of LLaMA and its relatives: a SentencePiece model file."""

import hashlib
import io
import json
import re

import sentencepiece as spm
from etils import epath

from lmm_jax.data.tokenizer.tokenizer import Tokenizer

# Protobuf merges concatenated messages. In ModelProto.normalizer_spec (field 3): add_dummy_prefix (3) = false, and
# remove_extra_whitespaces (4) = false, as the space that leads on from the text before is not an extra one.
GOES_ON = b"\x1a\x04\x18\x00\x20\x00"
OWN = ("<unk>", "<s>", "</s>")  # control pieces that SentencePiece gives every model that it trains
MAX_ID = 1 << 24  # of an added piece; a greater one is a mistake
MARKER = re.compile(r"<\|[^|\s]+\|>")  # how ChatML and its relatives write the pieces that structure a prompt


class SentencePiece(Tokenizer):
    """A SentencePiece model; pickles as its bytes and settings.

    Control pieces are `<s>`, `</s>`, `<unk>`, markers like `<|im_end|>`, and the added ones.

    Attributes:
      model: bytes of the model file.
      legacy: whether text that follows a control piece gets a word mark of its own (`prefix_after_control`). The
        first LLaMA tokenizers do that, Vicuna-1.5 and LLaVA-1.5 (`"legacy": false`) do not.
      added: pieces that the model file lacks, as `{piece: (id, strip)}`; `strip` drops the white space after one.
      vocab_size: ids, added ones included.
      bos, eos: ids of the begin and end pieces.
    """

    kind = "sentencepiece"
    FILES = ("tokenizer.model", "tokenizer_config.json")

    def __init__(self, model: bytes, legacy=False, added=None):
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
        self.vocab_size = max(len(self._pieces), *(1 + i for i, _ in self.added.values()), 0)
        # A marker that is a piece of the model was made to be matched in text, which data must not do.
        self._markers = {piece: i for i, piece in enumerate(self._pieces) if MARKER.fullmatch(piece)}
        self._control = {piece: i for i, piece in enumerate(self._pieces) if self._is_control(i)} | self._markers
        self._control |= {"<s>": self.bos, "</s>": self.eos} | {piece: i for piece, (i, _) in self.added.items()}
        self._inside_marker = re.compile(
            "|".join(f"(?<={re.escape(m[0])})(?={re.escape(m[1:])})" for m in self._markers) or "(?!)"
        )
        strips = {piece for piece, (_, strip) in self.added.items() if strip}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._any_control = re.compile(
            "|".join(re.escape(piece) + r"\s*" * (piece in strips) for piece in longest_first)
        )

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
        there) and the added pieces. It is only read: templates in it are never executed.
        """
        path = epath.Path(path)
        path = path / cls.FILES[0] if path.is_dir() else path
        beside = path.parent / cls.FILES[1]
        legacy, added = cls._settings(beside) if beside.exists() else (False, {})
        model = _read(path)
        try:
            return cls(model, legacy, added)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @staticmethod
    def _settings(path):
        """`(legacy, added)` of a tokenizer_config.json; null is as good as nothing."""
        try:
            settings = json.loads(_read(path))
            if not isinstance(settings, dict):
                raise ValueError(f"expected an object, got {type(settings).__name__}")
            entries = (settings.get("added_tokens_decoder") or {}).items()
            added = {entry["content"]: (int(i), bool(entry.get("rstrip"))) for i, entry in entries}
            for piece, (i, _) in added.items():
                if not (isinstance(piece, str) and piece and 0 <= i < MAX_ID):
                    raise ValueError(f"added_tokens_decoder has the piece {piece!r} with id {i}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # of whatever else it may hold
            raise ValueError(f"{path} is not what Hugging Face writes: {error}") from error
        legacy = settings.get("legacy")
        return legacy is None or legacy, added

    def save(self, folder):
        """Writes `tokenizer.model` and `tokenizer_config.json`, as `load` reads them."""
        folder = epath.Path(folder)
        (folder / self.FILES[0]).write_bytes(self.model)
        added = {str(i): {"content": piece, "rstrip": strip} for piece, (i, strip) in self.added.items()}
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
        return hashlib.sha256(self.model + settings.encode()).hexdigest()

    def encode(self, text, prefix=True) -> list[int]:
        """Ids of `text`, without begin or end piece.

        Args:
          text: of any origin; control pieces in it are spelled out.
          prefix: whether a word mark is put before it, as the model file says; else `text` goes on what came before.
        """
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
        return self._processor.decode([i for i in map(int, ids) if 0 <= i < len(self._pieces) and i not in hidden])

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
        return bytes.fromhex(piece[3:5]) if self._processor.is_byte(int(i)) else piece.replace("▁", " ").encode()

    @classmethod
    def train(cls, lines, vocab_size, byte_fallback=False, markers=()) -> "SentencePiece":
        """A tokenizer of our own, see `train_tokenizer`."""
        return cls(train_tokenizer(lines, vocab_size, byte_fallback, markers))

    def __reduce__(self):
        return SentencePiece, (self.model, self.legacy, self.added)


def _name_model(model):
    """What the bytes of a file are that is no SentencePiece model, as far as they tell."""
    if not model:
        return "it is empty"
    if model.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", model):
        return "it is a vocabulary of tiktoken, which we do not read; take a model whose tokenizer is SentencePiece's"
    if model.isascii():
        return f"it is a text that begins with {model[:40].decode()!r}"
    return "it is damaged or of another kind; copy it anew"


def _read(path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"the tokenizer's file {path} cannot be read: {error.strerror or error}") from error


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
