"""Reading conversations as people have them: LLaVA JSON and JSONL, and role/content rows.

    {"id": …, "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}
    {"id": …, "images": ["a.jpg"], "messages": [{"role": "user", "content": "…" or [{"type": "image"}, …]}, …]}

Rows are streamed: a file of any size is read in a few megabytes of memory. A row that cannot be used raises
`Refused` with a reason that can be counted; nothing is repaired silently.
"""

import collections
import dataclasses
import json
import os
import re

import ijson

from lmm_jax.data.conversation import IMAGE_TAG, ROLES

CHUNK = 1 << 20  # characters read at a time
MAX_ROW = 1 << 26  # characters of a row; a quote that is never closed must not read the whole file into memory

# How an array is cut into values, see `_array_items`.
BETWEEN = re.compile(r"[ \t\r\n,]*")  # what stands between two values
# Up to what a value may end with, by its first character; of a string, from inside of it.
STRING_END = re.compile(r'(?:[^"\\]++|\\.)*+"', re.DOTALL)
ENDS = {"{": re.compile(r"[^}]*+}"), "[": re.compile(r"[^\]]*+\]"), '"': STRING_END}
OTHER_END = re.compile(r"[-+.\w]*+(?=[^-+.\w])")  # of a number or a word
LAST = {"}": "end_map", "]": "end_array"}
# What `json` reads and ijson does not: numbers that are none, and halves of surrogate pairs.
ONLY_JSON_READS = (("NaN", "0"), ("Infinity", "0"), ("\\ud", "\\u0"), ("\\uD", "\\u0"))
DEPTHS = collections.defaultdict(int, start_map=1, start_array=1, end_map=-1, end_array=-1)


class Refused(ValueError):
    """A row that is left out.

    Attributes:
      reason: what is wrong, one of few sentences that are counted.
      detail: what exactly.
      id: of the row, empty where it could not be read.
    """

    def __init__(self, reason, detail="", id=""):
        super().__init__(reason, detail, id)  # all three, so that it pickles
        self.reason, self.detail, self.id = reason, detail, id

    def __str__(self):
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclasses.dataclass(frozen=True)
class Row:
    """A conversation of any layout.

    Attributes:
      id: as in the file, or the row's number.
      images: file names.
      turns: `(role, text)` pairs; role is "user", "assistant" or "system".
      kinds: of question, of each turn: its key `kind`, or that of the row; empty where neither has one.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]


def open_rows(path):
    """Opens a file for `read_items`; bytes that are not UTF-8 are kept for `parse_row` to refuse, row by row."""
    return open(path, encoding="utf-8-sig", errors="surrogateescape")


def read_items(f):
    """Yields `(line, text)` of each JSON value in an array or JSONL file, unparsed values as they stand.

    Args:
      f: text file; its first character is `[` for an array, anything else for one value a line.

    Raises:
      Refused: an array that breaks off, or a row of more than `MAX_ROW` characters; nothing that follows can be told
        apart.
    """
    first = f.read(1)
    while first and first in " \t\r\n":
        first = f.read(1)
    f.seek(0)
    yield from _array_items(f) if first == "[" else _lines(f)


def _lines(f):
    for line, text in enumerate(iter(lambda: f.readline(MAX_ROW), ""), start=1):
        if len(text) == MAX_ROW:
            raise Refused("broken JSON", f"line {line} has more than {MAX_ROW:,} characters")
        if text.strip():
            yield line, text


def _array_items(f):
    """Values of a JSON array, each as it stands in the file; what is in memory is the value that is being read.

    ijson tells where a value ends: it is handed the file piece by piece, up to each bracket that may be the value's
    last character, and says how deep inside of objects and arrays it stands then. Nothing else is taken from it, as
    it does not read values as `json` does: the half of a surrogate pair becomes "?" or, like a NaN or a byte that is
    not UTF-8, ends the file. `parse_row` reads the text itself, so that such a row is refused, or used, alone.
    """
    line = 1
    while (character := f.read(1)) != "[":
        line += character == "\n"
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events)

    def tell(piece):
        """Hands `piece` to ijson, with a space so that it reports at once what ends there; the events' names."""
        events.clear()
        for ours, theirs in ONLY_JSON_READS:
            piece = piece.replace(ours, theirs)
        try:
            parser.send(piece.encode("ascii", "replace") + b" ")
        except (ijson.JSONError, ValueError, SystemError) as error:  # the latter two: an integer of 4,301 digits
            raise _breaks_off(line, str(error.__cause__ or error).splitlines()[0][:200]) from error
        return [name for name, _ in events]

    tell("[")
    text, at, told, depth = "", 0, 0, 0  # text[at:] is the value that is being read, of which ijson has text[at:told]
    in_string = False  # whether text[told:] goes on with a string
    while True:
        if at == told:  # the value has not begun
            begin = BETWEEN.match(text, at).end()
            line += text.count("\n", at, begin)
            tell(text[at:begin])
            at = told = begin
        first = text[at : at + 1]
        if first == "]":
            break
        end = STRING_END if in_string else ENDS.get(first, OTHER_END)
        found = first and end.match(text, max(told, at + 1))
        if not found:
            more = f.read(max(CHUNK, len(text) - at))
            if not more:
                raise _breaks_off(line, "the file ends")
            if len(text) - at > MAX_ROW:
                raise _breaks_off(line, f"it has more than {MAX_ROW:,} characters")
            text, at, told = text[at:] + more, 0, told - at
            continue
        names = tell(text[told : found.end()])
        told = found.end()
        depth += sum(DEPTHS[name] for name in names)
        # A bracket that ends nothing is part of a string. That is then told whole: of one that comes in pieces, ijson
        # reads all from its start at each.
        in_string = text[told - 1] in LAST and LAST[text[told - 1]] not in names[-1:]
        if names and depth == 0:
            yield line, text[at:told]
            line += text.count("\n", at, told)
            at = told
    tell("]")
    if (text[at + 1 :] + f.read(CHUNK)).strip():
        raise Refused("broken JSON", f"something follows the array's end at line {line}")


def _breaks_off(line, problem):
    return Refused("broken JSON", f"the array breaks off in the value at line {line}: {problem}")


def parse_row(text, number) -> Row:
    """One row of either layout.

    Args:
      text: JSON of an object.
      number: of the row in its file, used as id if it has none.

    Raises:
      Refused: broken JSON, no conversation, an unknown role, a turn that is no text, text that is not UTF-8.
    """
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused("broken JSON", str(error)) from error
    if not isinstance(item, dict):
        raise Refused("broken JSON", f"expected an object, got {type(item).__name__}")
    given = item.get("id")
    id = str(given if isinstance(given, str | int | float) else number)
    try:
        row = Row(id, *_conversation(item))
        "".join([id, *row.images, *row.kinds, *(text for _, text in row.turns)]).encode()
    except Refused as error:
        raise Refused(error.reason, error.detail, id) from error
    except UnicodeEncodeError as error:
        raise Refused("text is not UTF-8", str(error), id) from error
    return row


def _conversation(item):
    """`(images, turns, kinds)` of a row."""
    images = item["image"] if "image" in item else item.get("images")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise Refused("images are not file names", repr(images)[:80])
    found = next((item[key] for key in ("conversations", "messages", "conversation") if key in item), None)
    if not isinstance(found, list) or not found:
        raise Refused("no conversation", "none of conversations, messages, conversation is a list of turns")
    named, turns = [], []
    for n, turn in enumerate(found, start=1):
        if not isinstance(turn, dict):
            raise Refused("no conversation", f"turn {n} is {type(turn).__name__}, not an object")
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in ROLES:
            raise Refused("unknown role", f"turn {n} has {role!r}; known are {', '.join(ROLES)}")
        turns.append((ROLES[role], _text(turn.get("value", turn.get("content")), named, n)))
    if images and named:
        raise Refused("tags do not match pictures", "pictures are named both by the row and inside its turns")
    return tuple(images or named), tuple(turns), tuple(_kind(item, turn) for turn in found)


def _kind(item, turn):
    """Kind of question of a turn, or of its row; null counts as none."""
    kind = next((given["kind"] for given in (turn, item) if given.get("kind") is not None), "")
    if not isinstance(kind, str | int):
        raise Refused("kind is no name", repr(kind)[:80])
    return str(kind)


def _text(content, images, n):
    """Text of a turn; parts of a list become text and `<image>` tags, and named pictures are appended to `images`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Refused("turn without text", f"turn {n} has {type(content).__name__}")
    out = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            out.append(part["text"])
        elif kind == "image":
            out.append(f"{IMAGE_TAG}\n")
            name = part.get("image", part.get("path"))
            if isinstance(name, str):
                images.append(name)
        else:
            raise Refused("turn without text", f"turn {n} has a part of type {kind!r}")
    return "".join(out)


def safe_path(folder, name) -> str:
    """The path of picture `name` inside `folder`, links resolved.

    Raises:
      Refused: the name is absolute, a URL, empty, or leads out of the folder.
    """
    if not name or "\0" in name or "://" in name or os.path.isabs(name):
        raise Refused("picture path leaves the folder", repr(name))
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        raise Refused("picture path leaves the folder", repr(name))
    return path
