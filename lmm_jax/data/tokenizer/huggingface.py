"""The tokenizers of Qwen, Llama 3, SmolLM, Granite and many more: a tokenizer.json of Hugging Face."""

import contextlib
import hashlib
import json
import re

import tokenizers
from etils import epath

from lmm_jax import strict_json
from lmm_jax.data.tokenizer.tokenizer import EXTRA, MARKER, SETTINGS, Tokenizer, read_bytes, read_id

MODELS = ("BPE", "Unigram", "WordPiece")  # of `tokenizers`, that ids are computed by
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
SURROGATE = re.compile("[\ud800-\udfff]")


class HuggingFace(Tokenizer):
    """A tokenizer.json, with what a tokenizer_config.json beside it says of pieces; pickles as both.

    Its ids are those of transformers' `AutoTokenizer`, as long as a text holds no control piece. Control pieces are
    the added tokens that are special there, those that tokenizer_config.json names (`bos_token`, …), and markers
    like `<|fim_prefix|>`. Other added tokens, such as `<loc>` that somebody added for boxes, are ordinary pieces:
    text makes them, and `decode` shows them.

    Where a control piece strips the white space beside it, `markup` drops that of our own text, never that of data.

    Attributes:
      source: bytes of tokenizer.json.
      settings: contents of tokenizer_config.json, but for its chat template.
      bos, eos: ids of the begin and end pieces, or None. Many tokenizers name a begin piece (`bos_token`) that they
        never put before a text; there `bos` is None.
      pad: the padding piece, or None.
      vocab_size: ids, added ones included.
    """

    kind = "huggingface"
    FILES = ("tokenizer.json", "tokenizer_config.json")

    def __init__(self, source: bytes, settings=None):
        """Raises ValueError if `source` is no tokenizer.json of a kind in `MODELS`, or the settings do not fit it."""
        self.source, self.settings = source, dict(settings or {})
        self._raw = _parse(source, set(self.settings.get(EXTRA, ())))
        full = _backend(self._raw, self.settings)
        self._full, content = full, json.loads(full.to_str())
        self.vocab = full.get_vocab(with_added_tokens=True)
        _check_ids(self._raw, self.vocab)
        self.vocab_size = 1 + max(self.vocab.values(), default=0)
        self._pieces = {i: piece for piece, i in self.vocab.items()}
        self.added = {token["content"]: token for token in content["added_tokens"]}
        named = _named(self.settings)
        self._control = {
            piece: token["id"]
            for piece, token in self.added.items()
            if token["special"] or piece in named or MARKER.fullmatch(piece)
        }
        self._hidden = set(self._control.values())
        self._ordinary = {token["id"] for token in self.added.values()} - self._hidden
        self.eos = self.vocab.get(_content(self.settings.get("eos_token")))
        self.bos = self._begin()
        self.pad = _content(self.settings.get("pad_token"))
        decoders = _types(content["decoder"])
        self._byte_level, self._word_pieces = "ByteLevel" in decoders, "WordPiece" in decoders
        # Of text of any origin: no control piece is known, so that each is spelled in ordinary ones.
        content = _without(content, self._control)
        self._starts, going_on = _load(content), _without_prefix(content)
        self._goes_on = self._starts if going_on == content else _load(going_on)
        renumbered = self._starts.get_added_tokens_decoder()
        self._ids = {i: self.vocab[token.content] for i, token in renumbered.items()}
        self._marked = {}
        self._any_control = re.compile("|".join(_pattern(self.added[piece]) for piece in self._by_length()) or "(?!)")
        self.prefix_after_control = self._marks_after_control()

    @property
    def text_ids(self) -> int:
        """See `Tokenizer.text_ids`: added tokens at the end are mostly control."""
        return 1 + max((i for i in self.vocab.values() if i not in self._hidden), default=-1)

    def _by_length(self):
        return sorted(self._control, key=lambda piece: (-len(piece), piece))  # the longest match counts

    def _begin(self):
        """Id that the tokenizer puts before a text, or None."""
        explicit = self.settings.keys() & {"add_bos_token", "add_eos_token"}
        if explicit:  # then transformers makes the post-processor anew
            named = self.vocab.get(_content(self.settings.get("bos_token")))
            return named if self.settings.get("add_bos_token") else None
        with _panics_told():
            before = self._full.encode("").ids
        if unknown := [i for i in before if i not in self._pieces]:
            raise ValueError(f"it puts the id {unknown[0]} around a text, which no piece has; copy the file anew")
        before = before if self.eos is None or before[-1:] != [self.eos] else before[:-1]
        if len(before) > 1:
            raise ValueError(
                f"it puts {len(before)} pieces around a text, {[self._pieces[i] for i in before]}; one is supported"
            )
        return before[0] if before else None

    def _marks_after_control(self):
        """Whether transformers puts a word mark before the text that follows a control piece."""
        if self._goes_on is self._starts:
            return False
        control = next((piece for piece in self._by_length() if not self.added[piece]["rstrip"]), None)
        if control is None:
            return False
        with _panics_told():
            after = self._full.encode(control + "a", add_special_tokens=False).ids
        return after[after.index(self._control[control]) + 1 :] != self._encode(self._goes_on, "a")

    @property
    def starts_with_mark(self) -> bool:
        """Whether the start of a text is encoded otherwise than text that goes on: with a word mark in front."""
        return self._goes_on is not self._starts

    @classmethod
    def load(cls, path):
        """Reads a tokenizer.json, or that of a folder, with what lies beside it; the error of a bad one names it.

        Beside it are tokenizer_config.json and, as older folders have them, special_tokens_map.json and
        added_tokens.json. They are only read: templates in them are never executed.
        """
        path = epath.Path(path)
        path = path / cls.FILES[0] if path.is_dir() else path
        settings = _read_settings(path.parent)
        source = read_bytes(path)
        try:
            return cls(source, settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder):
        """Writes the very bytes of tokenizer.json, and tokenizer_config.json, as `load` reads them."""
        folder = epath.Path(folder)
        (folder / self.FILES[0]).write_bytes(self.source)
        (folder / self.FILES[1]).write_text(json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n")

    @property
    def fingerprint(self) -> str:
        """sha256 of what tokenizer.json holds, of the added tokens, of the begin piece and of what is control."""
        about = self._raw | {"added_tokens": sorted(self.added.values(), key=lambda token: token["id"])}
        about |= {"bos": self.bos, "control": sorted(self._control.values())}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def encode(self, text, prefix=True) -> list[int]:
        """Ids of `text`, without begin or end piece.

        Args:
          text: of any origin; control pieces in it are spelled out.
          prefix: whether it is the start of a text, which some tokenizers mark; else `text` goes on what came before.

        Raises:
          ValueError: a text that is none: it has half of a surrogate pair.
        """
        if broken := SURROGATE.search(text):
            raise ValueError(
                f"the text has the lone surrogate U+{ord(broken.group()):04X} at character {broken.start()}, which "
                "is no character; decode the text again from its bytes"
            )
        ids = self._encode(self._starts if prefix else self._goes_on, text)
        if prefix or not self.prefix_after_control or self._ordinary.isdisjoint(ids):
            return ids
        marked = self._encode(self._starts, text)  # what follows an added piece is marked again
        return ids[: self._first_ordinary(ids)] + marked[self._first_ordinary(marked) :]

    def _encode(self, backend, text):
        with _panics_told():
            return [self._ids.get(i, i) for i in backend.encode(text, add_special_tokens=False).ids]

    def _first_ordinary(self, ids):
        return next(n for n, i in enumerate(ids) if i in self._ordinary)

    def markup(self, text) -> list[str | int]:
        """Splits `text` at its control pieces, which become ids. For text of our own, never for data."""
        if text not in self._marked:  # the few texts of a layout, again and again
            items, at, pieces = [], 0, self._by_length()
            for match in self._any_control.finditer(text):
                items += [text[at : match.start()], self._control[pieces[match.lastindex - 1]]]
                at = match.end()
            self._marked[text] = tuple(item for item in [*items, text[at:]] if item != "")
        return list(self._marked[text])

    def decode(self, ids) -> str:
        """Text of `ids`; control and padded ids, and pictures, leave nothing."""
        ids = [i for i in map(int, ids) if i in self._pieces and i not in self._hidden]
        if self._byte_level:
            return b"".join(map(self.spelling, ids)).decode(errors="replace")
        return self._full.decode(ids, skip_special_tokens=False)

    def piece(self, i) -> str:
        """The piece of one id, as tokenizer.json writes it."""
        return self._pieces[int(i)]

    def spelling(self, i) -> bytes | None:
        """What one id adds to a text, in UTF-8; None for a control id, which adds nothing.

        Pieces write a byte as a character of `BYTES`, or a space as ▁ and a byte as <0xE2>, or word parts as ##ing.
        """
        i = int(i)
        if i in self._hidden:
            return None
        piece = self._pieces[i]
        if piece in self.added:
            return piece.encode()
        if self._byte_level:
            return b"".join(BYTES[x] if x in BYTES else x.encode() for x in piece)
        if self._word_pieces:
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def __reduce__(self):
        return HuggingFace, (self.source, self.settings)


def _printed_bytes():
    """The character that byte-level pieces write for each byte, as GPT-2 does: itself where that can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): bytes([byte]) for byte in seen} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


BYTES = _printed_bytes()


def _parse(source, extra):
    """The contents of tokenizer.json without the pieces `extra`."""
    try:
        content = strict_json.parse(source)
        kind = content["model"].get("type") or ("BPE" if "merges" in content["model"] else "Unigram")
        content["added_tokens"] = [t for t in content.get("added_tokens") or () if t["content"] not in extra]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        start = source[:40]
        raise ValueError(f"not a tokenizer.json of Hugging Face: it begins with {start!r} ({error})") from error
    if kind not in MODELS:
        raise ValueError(f"its model.type is {kind!r}; {', '.join(MODELS)} are supported")
    if content["model"].get("dropout"):  # which draws other ids each time: a thing of training a model
        content["model"]["dropout"] = None
    return content | {"truncation": None, "padding": None}


def _check_ids(content, vocab):
    """Raises ValueError for a piece whose id is none, is another's too, or is another than tokenizer.json says.

    The library gives added tokens ids of its own choice, whatever the file says.
    """
    largest = max(vocab, key=vocab.get, default="")
    if vocab:
        read_id(largest, vocab[largest])
    if len(vocab) > len(set(vocab.values())):
        of = {}
        first, second = next((of[i], piece) for piece, i in vocab.items() if of.setdefault(i, piece) != piece)
        raise ValueError(f"the pieces {first!r} and {second!r} have the same id {vocab[first]}")
    for token in content["added_tokens"]:
        piece, said = token["content"], read_id(token["content"], token.get("id"))
        if vocab.get(piece) != said:
            raise ValueError(
                f"it gives the added piece {piece!r} the id {said}, and from its vocabulary it follows that it is "
                f"{vocab.get(piece)}: pieces are missing before it, or have changed; copy the file anew"
            )


@contextlib.contextmanager
def _panics_told():
    """Turns a panic of the library, as damaged tables of characters cause one, into a ValueError.

    Its exception derives from `BaseException` alone, as Ctrl-C does, and is of a class that no module offers.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"its tables are damaged: the library tokenizers stopped with {str(error)[:200]!r}"
        ) from error


def _load(content):
    try:
        with _panics_told():
            return tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain ones
        raise ValueError(f"the library tokenizers {tokenizers.__version__} cannot read it: {error}") from error


def _backend(content, settings):
    """The tokenizer with the added and special tokens that the settings name, as transformers puts it together."""
    full = _load(content)
    try:
        entries = (settings.get("added_tokens_decoder") or {}).items()
        kept = [(i, token) for i, token in entries if token["content"] not in settings.get(EXTRA, ())]
        given = {read_id(token["content"], i): token for i, token in kept}
        for i, token in sorted(given.items()):
            flags = {flag: bool(token[flag]) for flag in FLAGS if flag in token}
            full.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
            if full.token_to_id(token["content"]) != i:
                raise ValueError(
                    f"tokenizer_config.json gives the piece {token['content']!r} the id {i}, and here it is "
                    f"{full.token_to_id(token['content'])}; save both files anew with transformers"
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"added_tokens_decoder of its tokenizer_config.json is damaged: {error!r}") from error
    flagged = {token.content: token for token in full.get_added_tokens_decoder().values()}
    for piece in sorted(_named(settings), key=lambda piece: (full.token_to_id(piece) is None, piece)):
        if piece not in settings.get(EXTRA, ()):
            new = tokenizers.AddedToken(piece, special=True, normalized=False)
            full.add_special_tokens([flagged.get(piece, new)])
    return full


def _content(token):
    """The piece that a setting names, as text or as an object with flags; None if it names none."""
    return token.get("content") if isinstance(token, dict) else token


def _named(settings) -> set[str]:
    """Pieces that tokenizer_config.json names as special."""
    lists = [settings.get("additional_special_tokens") or (), settings.get("extra_special_tokens") or ()]
    values = [value for key, value in settings.items() if key.endswith("_token") and not isinstance(value, bool)]
    values += [value for many in lists for value in (many.values() if isinstance(many, dict) else many)]
    return {piece for piece in map(_content, values) if isinstance(piece, str) and piece}


def _read_settings(folder) -> dict:
    """What tokenizer_config.json says, with what older folders say in files beside it."""
    path = folder / HuggingFace.FILES[1]
    settings = _read_object(path)
    settings.pop("chat_template", None)
    if not settings.get("added_tokens_decoder"):
        settings |= _read_object(folder / "special_tokens_map.json")
        special = _named(settings)
        if added := _read_object(folder / "added_tokens.json"):
            flags = {p: {"special": p in special, "normalized": p not in special} for p in added}
            try:
                ids = {piece: read_id(piece, i) for piece, i in added.items()}
            except ValueError as error:
                raise ValueError(f"{folder / 'added_tokens.json'}: {error}") from error
            settings["added_tokens_decoder"] = {str(i): {"content": p, **flags[p]} for p, i in ids.items()}
    return settings


def _read_object(path) -> dict:
    """A JSON object; {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        found = strict_json.parse(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not what Hugging Face writes: expected an object, got {type(found).__name__}")
    if fault := strict_json.fault(found, SETTINGS):
        raise ValueError(f"{path} is not what Hugging Face writes: {fault}")
    return found


def _types(step) -> set[str]:
    """Types of a step of tokenizer.json, and of all steps within it."""
    if isinstance(step, list):
        return set().union(*map(_types, step))
    if not isinstance(step, dict):
        return set()
    return {step.get("type")} | set().union(*map(_types, step.values()))


def _without(content, control):
    """A tokenizer.json that knows none of the `control` pieces: neither finds them in text nor puts them together.

    In its vocabulary, which keeps its numbers, they are called by names with spaces, which no piece of a text has:
    spaces are parted from words, or written as ▁ or Ġ.
    """
    model = content["model"]
    names = {piece: f" {i} " for piece, i in control.items()}
    if isinstance(model["vocab"], dict):
        vocab = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        vocab = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    changed = model | {"vocab": vocab}
    if model.get("unk_token") in names:
        changed["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        changed["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & control.keys()]
    added = [token for token in content["added_tokens"] if token["content"] not in control]
    return content | {"model": changed, "added_tokens": added, "post_processor": None}


def _without_prefix(step):
    """A tokenizer.json, or a step of it, that puts no word mark before a text."""
    if isinstance(step, list):
        return [_without_prefix(x) for x in step]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changes = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {
        key: changes[key] if key in changes else _without_prefix(x) if key in STEPS else x for key, x in step.items()
    }


STEPS = ("normalizer", "normalizers", "pre_tokenizer", "pretokenizers")  # in which a text gets its word mark


def _pattern(token):
    """Pattern of an added token in a text, with the white space that it strips; one group."""
    piece = re.escape(token["content"])
    piece = rf"(?<!\w)({piece})(?!\w)" if token["single_word"] else f"({piece})"
    return r"\s*" * token["lstrip"] + piece + r"\s*" * token["rstrip"]
