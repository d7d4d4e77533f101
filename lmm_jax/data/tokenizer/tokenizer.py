"""What a tokenizer is to the rest of lmm_jax: the class that every kind of tokenizer derives from."""

import abc
import dataclasses
import re

from etils import epath

from lmm_jax import strict_json
from lmm_jax.ranges import Range, each, either, flag

MARKER = re.compile(r"<\|[^|\s]+\|>")  # how ChatML and its relatives write the pieces that structure a prompt
MOST_BYTES = 256 * 2**20  # of a file; the largest tokenizer.json that is released has 35 MB
MOST_ID = (1 << 24) - 1  # of a piece; the largest vocabularies have some 260,000 pieces
MOST_GAP = 4_096  # ids without a piece before an added one; tables are padded by fewer
EXTRA = "lmm_jax_added"  # in tokenizer_config.json: pieces that an export of ours added for transformers alone

_PIECE = Range(
    str,
    "a piece, or an object that holds it as content",
    lambda x: type(x) is str or (type(x) is dict and type(x.get("content")) is str),
)
_PIECES = Range(
    dict, "an object of pieces", lambda x: type(x) is dict and all(token is not None for token in x.values())
)
# What keys of a tokenizer_config.json, of those that we read, may be.
SETTINGS = {
    **dict.fromkeys(("legacy", "add_bos_token", "add_eos_token"), flag()),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _PIECE),
    "additional_special_tokens": each(_PIECE),
    "extra_special_tokens": either(each(_PIECE), _PIECES),
    "added_tokens_decoder": Range(
        dict,
        "an object of objects, each of which holds a piece as content and flags that are true or false",
        lambda x: type(x) is dict and all(map(_is_token, x.values())),
    ),
    EXTRA: each(Range(str, "a piece", lambda x: type(x) is str)),
}


@dataclasses.dataclass(frozen=True)
class Shown:
    """What a reader is shown for neighbouring ids: mostly for a single one, for several where they spell a character.

    Attributes:
      text: part of a text as it is written, or the piece of a control id.
      count: ids that it is shown for.
      control: whether it is shown for an id that is no part of any text.
      broken: whether the ids spell a part of a character only, so that `text` names their bytes.
    """

    text: str
    count: int = 1
    control: bool = False
    broken: bool = False


class Tokenizer(abc.ABC):
    """Text to token ids and back, with control ids that data cannot forge.

    A control id structures a prompt: the begin and the end of a text, the marks of a turn. Its piece (`</s>`,
    `<|im_end|>`) may stand in the text of data too, written by anybody. `encode`, for text of any origin, spells such
    a piece out in ordinary characters; only `markup`, for text of our own, makes it an id.

    A tokenizer is handed to worker processes, so it must pickle. It is saved into every prepared folder and workdir,
    and read back by `lmm_jax.data.tokenizer.load_tokenizer`.

    Attributes:
      kind: its name in `lmm_jax.data.tokenizer.TOKENIZERS`.
      FILES: names of the files that it is made of. It is recognised by the first, which has to be there.
      bos, eos: ids of the piece that stands before every text and of the one that ends it; None of a tokenizer
        without.
      vocab_size: number of ids, that is, the largest one plus 1.
      prefix_after_control: whether text that follows a control id is encoded with `prefix`, as at the start of a
        text. Only a tokenizer that encodes the start of a text in a way of its own needs to say so.
    """

    kind: str
    FILES: tuple[str, ...]
    bos: int | None
    eos: int | None
    vocab_size: int
    prefix_after_control: bool = False

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest of all that ids depend on: tokenizers with the same fingerprint give the same ids."""

    @abc.abstractmethod
    def encode(self, text, prefix=True) -> list[int]:
        """Ids of `text`, of any origin, without begin and end piece and without any control id.

        Args:
          text: str; control pieces in it are spelled out.
          prefix: whether `text` is the start of a text, which some tokenizers mark, or goes on what came before.
        """

    @property
    def text_ids(self) -> int:
        """The largest id that `encode` gives of any text, plus 1. A tokenizer whose last ids are control says so."""
        return self.vocab_size

    @abc.abstractmethod
    def markup(self, text) -> list[str | int]:
        """Splits `text` at its control pieces, which become ids; empty texts are left out.

        It is for text of our own, never for data.
        """

    @abc.abstractmethod
    def decode(self, ids) -> str:
        """Text of `ids`; control ids, ids without a piece (a padded vocabulary's) and negative ones leave nothing."""

    @abc.abstractmethod
    def piece(self, i) -> str:
        """The piece of one id, as the tokenizer's files write it."""

    def spelling(self, i) -> bytes | None:
        """What one id adds to a text, in UTF-8; None for a control id, which adds nothing.

        Here it is the piece. A tokenizer whose pieces are written in another way than text, or that has control ids
        beside the begin and the end piece, says so by a `spelling` of its own.
        """
        return None if i in (self.bos, self.eos) else self.piece(i).encode()

    def shown(self, ids) -> list[Shown]:
        """What a reader is shown for `ids`: all of them, control ids too, in order.

        Where several ids spell one character byte by byte, they are shown as that character.
        """
        out, held = [], []  # held: the spellings of the last ids, which begin a character
        for i in map(int, ids):
            spelled = self.spelling(i)
            if held and (spelled is None or _utf8([*held, spelled]) is None):
                out.append(_broken(held))
                held = []
            if spelled is None:
                out.append(Shown(self.piece(i), control=True))
                continue
            held.append(spelled)
            text = _utf8(held)
            if text != "":
                out.append(_broken(held) if text is None else Shown(text, len(held)))
                held = []
        return [*out, _broken(held)] if held else out

    @abc.abstractmethod
    def save(self, folder):
        """Writes `FILES` into an existing folder, as `load` reads them."""

    @classmethod
    @abc.abstractmethod
    def load(cls, path) -> "Tokenizer":
        """Reads a folder or file that `recognises` is true of.

        Raises:
          ValueError: it cannot be read; the message names the file.
        """

    @classmethod
    def recognises(cls, path) -> bool:
        """Whether `path` is a folder that holds a tokenizer of this kind, or the file that it is recognised by."""
        path = epath.Path(path)
        return (path / cls.FILES[0]).exists() if path.is_dir() else path.name == cls.FILES[0]

    def encode_items(self, items) -> list[list[int]]:
        """Ids of each item of a prompt, such that together they are those of the prompt tokenised at once.

        The prompt, and again what follows a picture, starts with `prefix`; what follows a control id does only if
        `prefix_after_control`; what follows text goes on with it. For the latter to be exact, two texts must meet
        where no piece can lie across: before a space, or at a newline.

        Args:
          items: texts, and ids that stand for themselves; a negative one is a picture.
        """
        out, prefix = [], True
        for item in items:
            if isinstance(item, str):
                out.append(self.encode(item, prefix))
                prefix = prefix and not item
            else:
                out.append([item])
                prefix = item < 0 or self.prefix_after_control
        return out


def read_bytes(path) -> bytes:
    """Bytes of a file of a tokenizer.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no file, or larger than that of any tokenizer.
    """
    try:
        return strict_json.read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise OSError(f"the tokenizer's file {path} cannot be read: {error.strerror or error}") from error


def read_id(piece, i) -> int:
    """The id that a file of others gives a piece, as a number or in digits.

    Raises:
      ValueError: it is none that a piece can have.
    """
    digits = isinstance(i, str) and i.isascii() and i.isdigit() and len(i) < 20
    number = int(i) if digits else i
    if type(number) is not int or not 0 <= number <= MOST_ID:
        raise ValueError(
            f"the piece {strict_json.shown(piece)} has the id {strict_json.shown(i)}; ids are 0 to {MOST_ID:,}"
        )
    return number


def _is_token(token):
    """Whether a value is an added token with flags, as Hugging Face writes one."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    piece = token.get("content") if type(token) is dict else None
    return type(piece) is str and bool(piece) and all(type(token.get(key)) in (bool, type(None)) for key in flags)


def _utf8(spellings):
    """The text of some bytes; "" if its last character is still to be completed, None if it never will be."""
    try:
        return b"".join(spellings).decode()
    except UnicodeDecodeError as error:
        return "" if error.reason == "unexpected end of data" else None


def _broken(spellings):
    text = "".join(f"<0x{byte:02X}>" for byte in b"".join(spellings))
    return Shown(text, len(spellings), broken=True)
