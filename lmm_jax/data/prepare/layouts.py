"""Files of rows as people have them, whatever the layout of the whole file.

    [row, row, …]                            a JSON array
    row                                      JSON lines: a row each
    row
    {                                        rows that are printed over several lines, one or many
      "messages": …
    }
    {"train": [row, …], "test": [row, …]}    a list for each split
    Parquet                                  the rows of a table, with their pictures as bytes or names

JSON may stand in UTF-8, UTF-16 or UTF-32, with or without a byte order mark, and may be compressed by gzip. Rows are
streamed: a file of any size is read in a few megabytes of memory. Any other file is named, with what to do about it.
"""

import abc
import collections
import gzip
import io
import json
import os
import re
import zlib

import ijson

from lmm_jax.data.prepare.foreign import name_bytes, name_text
from lmm_jax.data.prepare.keys import SPLITS, TURNS
from lmm_jax.data.prepare.refused import Refused

CHUNK = 1 << 20  # characters read at a time
MAX_ROW = 1 << 26  # characters of a row; a quote that is never closed must not read the whole file into memory
HEAD = 1 << 10  # bytes by which a file is recognised
PARQUET_ROWS = 16  # read at a time; their pictures are in memory

# Names that say nothing of a split.
NO_SPLITS = {"data", "rows", "items", "examples", "samples", "instances", "dataset", "annotations", *TURNS}

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)  # what reading a text may end with

# How values are cut out of a text, see `_Values`.
MARK = "\ufeff"  # byte order mark
BETWEEN = re.compile(r"[ \t\r\n,:\ufeff]*")  # what stands between two values
# Up to what a value may end with, by its first character; of a string, from inside of it.
STRING_END = re.compile(r'(?:[^"\\]++|\\.)*+"', re.DOTALL)
ENDS = {"{": re.compile(r"[^}]*+}"), "[": re.compile(r"[^\]]*+\]"), '"': STRING_END}
OTHER_END = re.compile(r"[-+.\w]*+(?=[^-+.\w])")  # of a number or a word
LAST = {"}": "end_map", "]": "end_array"}
# What `json` reads and ijson does not: numbers that are none, and halves of surrogate pairs.
ONLY_JSON_READS = (("NaN", "0"), ("Infinity", "0"), ("\\ud", "\\u0"), ("\\uD", "\\u0"))
# What ijson says, and what that means.
OF_IJSON = (
    (
        "invalid char in json text",
        "a word or sign that JSON does not have; its texts and keys stand in double quotes",
    ),
    ("unallowed token", "a value is missing; is there a comma too many?"),
    ("invalid object key", "a key is missing; is there a comma too many, or a key without double quotes?"),
    ("probable comment", "a comment, which JSON does not have; take it away"),
    ("digits", "a number of more than 4,300 digits"),
)
DEPTHS = collections.defaultdict(int, start_map=1, start_array=1, end_map=-1, end_array=-1)


class RowFile(abc.ABC):
    """An open file of rows; a context manager that closes it. See `open_rows`.

    Attributes:
      size: bytes of the file.
      ignored: count of each key, as "file.NAME", that stands beside the lists of rows and holds none; filled while
        the file is read.
    """

    def __init__(self, size):
        self.size, self.ignored = size, collections.Counter()

    @abc.abstractmethod
    def position(self) -> int:
        """Bytes of the file that are read."""

    @abc.abstractmethod
    def items(self):
        """As `read_items`, from the file's begin on."""

    @abc.abstractmethod
    def close(self):
        """Closes the file."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def open_rows(path) -> RowFile:
    """Opens a file of any layout that we read; what is no such file is refused before a row of it is read.

    Raises:
      OSError: the file cannot be opened.
      ValueError: it is of another layout; the message names it and says what to do.
      ImportError: a Parquet file, and no pyarrow.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"{path} is a folder; name one file of rows (files of JSON lines are put together with `cat`)"
        )
    with open(path, "rb") as f:
        head = f.read(HEAD)
    if head.startswith(b"PAR1"):
        return _Parquet(path)
    compressed = head.startswith(b"\x1f\x8b")
    if compressed:
        try:
            with gzip.open(path) as f:
                head = f.read(HEAD)
        except BROKEN as error:
            raise ValueError(f"{path} {_said(error)}") from error
        if head.startswith(b"PAR1"):
            raise ValueError(f"{path} is a Parquet file inside of gzip; unpack it with `gunzip`")
    if what := name_bytes(head):
        raise ValueError(f"{path} is {'gzip around ' if compressed else ''}{what}")
    return _Json(path, compressed, json.detect_encoding(head))


def read_items(rows):
    """Yields `(split, line, row)` of each row of an open file.

    `split` is what the file names for it, None if it names none. `line` is where the row begins, in a Parquet file
    its number. `row` is what `parse_row` takes: JSON text as it stands there, or the dict that a row of a Parquet
    file is.

    Args:
      rows: a `RowFile`.

    Raises:
      Refused: the file breaks off, or a row has more than `MAX_ROW` characters; nothing that follows can be told
        apart.
    """
    yield from rows.items()


class _Json(RowFile):
    def __init__(self, path, compressed, encoding):
        super().__init__(os.path.getsize(path))
        self._raw = open(path, "rb")  # noqa: SIM115 - `close` closes it
        stream = gzip.GzipFile(fileobj=self._raw) if compressed else self._raw
        # What is not text is kept for `parse_row` to refuse, row by row. Of UTF-16 only lone surrogates can be.
        errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
        encoding = "utf-8-sig" if encoding == "utf-8" else encoding
        self._text = io.TextIOWrapper(stream, encoding, errors)
        try:
            self._cut = _layout(self._text)
        except _Foreign as error:
            self.close()
            raise ValueError(f"{path} {error}") from error
        except BROKEN as error:
            self.close()
            raise ValueError(f"{path} {_said(error)}") from error

    def position(self):
        return self._raw.tell()

    def items(self):
        try:
            self._text.seek(0)
            yield from self._cut(self._text, self.ignored)
        except BROKEN as error:
            raise Refused("broken file", f"after about {self.position():,} bytes it {_said(error)}") from error

    def close(self):
        self._text.close()
        self._raw.close()


class _Parquet(RowFile):
    def __init__(self, path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            needed = "which pyarrow reads: pip install 'lmm_jax[parquet]'"
            raise ImportError(f"{path} is a Parquet file, {needed}") from error
        self._errors = pyarrow.ArrowException
        super().__init__(os.path.getsize(path))
        self._read = 0
        self._pyarrow = pyarrow
        try:
            # Without pre-buffering: a row group may hold a gigabyte of pictures.
            self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK)
        except (self._errors, OSError) as error:
            problem = str(error).splitlines()[0]
            raise ValueError(f"{path} is a broken Parquet file ({problem}); copy or write it anew") from error
        names = collections.Counter(self._file.schema_arrow.names)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            self._file.close()
            raise ValueError(f"{path} is a table with two columns {twice[0]!r}; write it anew with one of them")

    def position(self):
        return self.size * self._read // max(1, self._file.metadata.num_rows)

    def items(self):
        self._read = 0
        batches = self._file.iter_batches(batch_size=PARQUET_ROWS)
        while True:
            try:
                batch = next(batches, None)
                rows = None if batch is None else self._rows(batch)
            except (self._errors, OSError, ValueError, OverflowError) as error:
                problem = str(error).splitlines()[0]
                raise Refused("broken Parquet", f"after row {self._read}: {problem}") from error
            if rows is None:
                return
            for row in rows:
                self._read += 1
                yield None, self._read, row

    def _rows(self, batch):
        """Rows as dicts; what Python has no exact value for, such as nanoseconds, as numbers or text."""
        wanted = [self._plain(field.type) for field in batch.schema]
        pairs = zip(batch.columns, wanted, strict=True)
        columns = [column if column.type == type else column.cast(type) for column, type in pairs]
        return self._pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()

    def _plain(self, type):
        pa, types = self._pyarrow, self._pyarrow.types
        if types.is_temporal(type) and not types.is_interval(type):
            return pa.int32() if type.bit_width == 32 else pa.int64()
        if types.is_decimal(type):
            return pa.string()
        if types.is_struct(type):
            return pa.struct([field.with_type(self._plain(field.type)) for field in type])
        if types.is_list(type):
            return pa.list_(type.value_field.with_type(self._plain(type.value_type)))
        return type

    def close(self):
        self._file.close()


class _Foreign(ValueError):
    """A text that is no JSON; the message goes on "FILE …"."""


def _said(error):
    """What one of `BROKEN` says of a file; goes on "FILE …"."""
    if isinstance(error, UnicodeDecodeError):
        return f"is not {error.encoding.upper()}, as it begins ({error.reason}); write it as UTF-8"
    return f"is broken gzip ({error}); copy the file anew"


def _layout(f):
    """The function that cuts a text into items, by what the text begins with; `f` is anywhere afterwards.

    Raises:
      _Foreign: it is no JSON.
    """
    start = ""
    for line in iter(lambda: f.readline(CHUNK), ""):
        start = line.lstrip()
        if start:
            break
    if start.startswith("["):
        return _array
    if start and not start.startswith("{") and not f.readline(CHUNK).lstrip().startswith("{"):
        raise _Foreign(f"is {name_text(start)}")
    f.seek(0)
    return _object_layout(f)


def _object_layout(f):
    """What follows a first `{`: lines, rows over several lines, or lists of rows. The first value decides.

    It holds lists of rows if the first entry of a list in it has turns, or the list has the name of a split.
    """
    events = ijson.sendable_list()
    parser = ijson.basic_parse_coro(events, multiple_values=True)
    stack, key, begun, ended, line, size = "", None, None, None, 0, 0
    lists, broken = False, False
    for piece in iter(lambda: f.readline(CHUNK), ""):
        size += len(piece)
        try:
            parser.send(_for_ijson(piece))
        except (ijson.JSONError, ValueError, SystemError):
            broken = True
        for event, value in events:
            if ended is not None:  # a second value begins
                return _objects if line == ended or ended > begun else _lines
            begun = line if begun is None else begun
            if lists and stack == "{[":  # the first entry was whole, and something follows in its list
                return _lists
            if stack == "{" and event == "map_key":
                key = value
            if stack == "{[{" and event == "map_key":
                lists = lists or value in TURNS
            if stack == "{[" and event == "start_map":
                lists = lists or key.lower() in SPLITS
            if event in ("start_map", "start_array"):
                stack += "{" if event == "start_map" else "["
            elif event in ("end_map", "end_array"):
                stack = stack[:-1]
            if not stack:
                ended = line
        events.clear()
        line += piece.endswith("\n")
        if ended is not None and (ended > begun or line > ended):
            return _objects if ended > begun else _lines
        if broken or size > MAX_ROW:
            break
    return _lists if lists and not broken else _lines


def _for_ijson(text):
    """Bytes of a piece of JSON in which ijson finds the same values as `json`, at the same places."""
    for ours, theirs in ONLY_JSON_READS:
        text = text.replace(ours, theirs)
    return text.encode("ascii", "replace")


def _lines(f, _):
    for line, text in enumerate(iter(lambda: f.readline(MAX_ROW), ""), start=1):
        if len(text) == MAX_ROW:
            raise Refused("broken JSON", f"line {line} has more than {MAX_ROW:,} characters")
        text = text.lstrip(MARK)  # of a file that others were put to the end of
        if text.strip():
            # A comma stands there if an array was made to lines by taking its brackets away.
            yield None, line, text.rstrip().removesuffix(",") if text.endswith((",\n", ",")) else text


def _array(f, _):
    values = _Values(f, "array")
    yield from _entries(values, None)
    values.end()


def _objects(f, _):
    values = _Values(f, "file", several=True)
    while values.peek():
        yield None, *values.value()


def _lists(f, ignored):
    values = _Values(f, "file")
    values.bracket()
    while values.peek() != "}":
        line, key = values.value()
        key = json.loads(key)
        if values.peek() != "[":
            values.value()  # a title, a version
            ignored[f"file.{key}"] += 1
        elif key.lower() in SPLITS or key.lower() in NO_SPLITS or key.isidentifier():
            yield from _entries(values, None if key.lower() in NO_SPLITS else SPLITS.get(key.lower(), key))
        else:
            raise Refused("no split", f"the list {key[:80]!r} at line {line}; known are {', '.join(SPLITS)}")
    values.bracket()
    values.end()


def _entries(values, split):
    """The entries of an array as items of `split`."""
    values.bracket()
    while values.peek() != "]":
        yield split, *values.value()
    values.bracket()


class _Values:
    """Cuts a JSON text into values, each as it stands in the file; in memory is the value that is being read.

    ijson tells where a value ends: it is handed the file piece by piece, up to each bracket that may be the value's
    last character, and says how deep inside of objects and arrays it stands then. Nothing else is taken from it, as
    it does not read values as `json` does: the half of a surrogate pair becomes "?" or, like a NaN or a byte that is
    not UTF-8, ends the file. `parse_row` reads the text itself, so that such a row is refused, or used, alone.
    """

    def __init__(self, f, what, several=False):
        """
        Args:
          f: text file at its begin.
          what: breaks off if it does: "array" or "file".
          several: whether several values may stand in it one after the other.
        """
        self._f, self._what, self._line = f, what, 1
        self._events = ijson.sendable_list()
        self._parser = ijson.basic_parse_coro(self._events, multiple_values=several)
        # text[at:] is the value that is being read, or what comes before it; of that ijson has text[at:told].
        self._text, self._at, self._told = "", 0, 0

    def peek(self) -> str:
        """The first character of the next value, or the bracket that comes instead; empty at the end."""
        while True:
            end = BETWEEN.match(self._text, self._at).end()
            if end > self._at:
                self._line += self._text.count("\n", self._at, end)
                self._tell(self._text[self._at : end].replace(MARK, ""))
                self._at = self._told = end
            if end < len(self._text):
                return self._text[end]
            self._text, self._at, self._told = self._f.read(CHUNK), 0, 0
            if not self._text:
                return ""

    def bracket(self):
        """Steps over the bracket that comes next.

        Raises:
          Refused: the text ends instead.
        """
        bracket = self.peek()
        if not bracket:
            raise self._breaks_off("the file ends")
        self._tell(bracket)
        self._at = self._told = self._at + len(bracket)

    def value(self) -> tuple[int, str]:
        """`(line, text)` of the next value.

        Raises:
          Refused: the text breaks off in it.
        """
        first = self.peek()
        text, at, told, depth = self._text, self._at, self._told, 0
        in_string = False  # whether text[told:] goes on with a string
        while True:
            end = STRING_END if in_string else ENDS.get(first, OTHER_END)
            found = end.match(text, max(told, at + 1)) if first else None
            if not found:
                more = self._f.read(max(CHUNK, len(text) - at))
                if not more:
                    raise self._breaks_off("the file ends")
                if len(text) - at > MAX_ROW:
                    raise self._breaks_off(f"it has more than {MAX_ROW:,} characters")
                text, at, told = text[at:] + more, 0, told - at
                continue
            names = self._tell(text[told : found.end()])
            told = found.end()
            depth += sum(DEPTHS[name] for name in names)
            # A bracket that ends nothing is part of a string. That is then told whole: of one that comes in pieces,
            # ijson reads all from its start at each.
            in_string = text[told - 1] in LAST and LAST[text[told - 1]] not in names[-1:]
            if names and depth == 0:
                line = self._line
                self._line += text.count("\n", at, told)
                self._text, self._at, self._told = text, told, told
                return line, text[at:told]

    def end(self):
        """Nothing may follow.

        Raises:
          Refused: something does.
        """
        if (self._text[self._at :] + self._f.read(CHUNK)).strip():
            raise Refused("broken JSON", f"something follows the {self._what}'s end at line {self._line}")

    def _tell(self, piece):
        """Hands `piece` to ijson, with a space so that it reports at once what ends there; the events' names."""
        self._events.clear()
        try:
            self._parser.send(_for_ijson(piece) + b" ")
        except (ijson.JSONError, ValueError, SystemError) as error:  # the latter two: an integer of 4,301 digits
            raise self._breaks_off(_in_words(str(error.__cause__ or error)), piece) from error
        return [name for name, _ in self._events]

    def _breaks_off(self, problem, piece=""):
        where = f"the {self._what} breaks off in the value at line {self._line}"
        near = f", near {piece.strip()[:60]!r}" if piece.strip() else ""
        return Refused("broken JSON", f"{where}: {problem}{near}")


def _in_words(message):
    """What ijson says of a text that is no JSON."""
    line = message.splitlines()[0][:200]
    return next((words for begin, words in OF_IJSON if begin in line), line)
