"""Reading what benchmarks publish, and saying what is wrong with it.

Every fault is a sentence with file, item and field. Items of a list are numbered from 0, as Python does: `data[3]`.
Lines are numbered from 1, as editors do.
"""

import collections
import hashlib
import json

from etils import epath

NAMED = 3  # of what is missing, the first few are named
_OF_TYPE = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def find(folder, names):
    """The first of the paths `names` under a folder that is there.

    Raises:
      FileNotFoundError: naming all of them.
    """
    found = first_of(folder, names)
    if not found.exists():
        elsewhere = f" (nor {', nor '.join(names[1:])})" if names[1:] else ""
        raise FileNotFoundError(f"{folder} has no {names[0]}{elsewhere}; `--describe` says where it is published")
    return found


def first_of(folder, names):
    """The first of the paths `names` under a folder that is there; the first of all if none is."""
    paths = [epath.Path(folder) / name for name in names]
    return next((path for path in paths if path.exists()), paths[0])


def read_text(path) -> str:
    """Contents of a file in UTF-8.

    Raises:
      ValueError: it is in another encoding, or only stands for a file that is kept elsewhere.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.start:,}); download it again") from None
    if text.startswith("version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS instead of the file; fetch it by `git lfs pull`")
    return text


def read_json(path, kind):
    """The JSON of a file, which is of a type `kind`: dict or list.

    Raises:
      ValueError: naming the line that is no JSON.
    """
    return _as(kind, _parse(read_text(path), path), path)


def read_lines(path):
    """Yields (where, object) of a file of JSON lines; empty lines do not count. Raises ValueError with the line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _as(dict, _parse(line, path, number), where)


def _parse(text, path, line=1):
    """The JSON of a text that begins at a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = not text[error.pos :].strip() or error.msg.startswith("Unterminated")
        why = "it ends in the middle" if cut else f"{error.msg}, column {error.colno}"
        where = f"{path}, line {line + error.lineno - 1}"
        raise ValueError(f"{where}: no JSON ({why}); download the file again") from None
    except RecursionError:
        raise ValueError(f"{path}: no file of questions, as it is nested too deeply") from None


def entries(whole, key, path):
    """Yields (where, item) of the list of objects that stands under a key of a file's JSON object."""
    path = str(path)  # once, of a million items
    for n, item in enumerate(field(whole, key, list, path)):
        where = f"{path}: {key}[{n}]"
        yield where, _as(dict, item, where)


def field(item, key, kind, where):
    """`item[key]`, which is of a type: str, int, list or dict.

    Raises:
      ValueError: it is missing, or of another type.
    """
    if key not in item:
        raise ValueError(f"{where} has no field '{key}'; it has {', '.join(map(str, item)) or 'none'}")
    value = item[key]
    return value if type(value) is kind else _as(kind, value, f"{where}, field '{key}'")


def _as(kind, value, where):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: expected {_OF_TYPE[kind]}, found {json.dumps(value)[:60]}")
    return value


def question(item, key, where) -> str:
    """The text of a question, which says something."""
    found = field(item, key, str, where)
    if not found.strip():
        raise ValueError(f"{where}, field '{key}': the question is empty")
    return found


def texts(item, key, where, least=1) -> tuple[str, ...]:
    """A list of at least so many texts, each of which may be empty."""
    found = field(item, key, list, where)
    if len(found) < least:
        raise ValueError(f"{where}, field '{key}': the list is empty")
    where = f"{where}, field '{key}'"
    return tuple(_as(str, text, where) for text in found)


def one_of(item, key, options, where) -> str:
    """A text that is one of `options`, whatever its case."""
    found = field(item, key, str, where)
    if found.strip().lower() not in options:
        raise ValueError(f"{where}, field '{key}': expected {' or '.join(options)}, found {found[:60]!r}")
    return found.strip().lower()


def picture(folder: str, name, where) -> str:
    """Path of the picture of this name in a folder.

    Raises:
      ValueError: the name leads elsewhere.
    """
    if name.startswith(".") or set(name) & set("/\\\0") or not name:
        raise ValueError(f"{where}: {name[:60]!r} is no name of a picture")
    return f"{folder}/{name}"


def limited(examples, limit):
    """The first `limit` examples of each kind; all if it is None."""
    found = collections.Counter()
    for example in examples:
        if limit is None or found[example.kind] < limit:
            found[example.kind] += 1
            yield example


def check(read, folder, split, questions=(), digests=None) -> list[str]:
    """What is missing of a benchmark, or broken, or not as its authors published it.

    Args:
      read: function from (folder, split) to `Example`s whose pictures are paths.
      folder, split: of the benchmark.
      questions: how many questions the published versions have; nothing is known if it is empty.
      digests: function from (folder, split) to {path: SHA-256 in hexadecimal} of files whose digest is known.

    Returns:
      sentences; none if everything is there. Those that begin with "not as published:" hinder nobody from asking.
    """
    try:
        examples = list(read(folder, split))
        known = digests(folder, split) if digests else {}
    except (OSError, ValueError) as error:
        return [str(error)]
    faults = [f"{folder} holds no question of split '{split}'"] if not examples else []
    if missing := missing_pictures(examples):
        of_all = len({image for example in examples for image in example.images})
        more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
        faults.append(f"{len(missing):,} of {of_all:,} pictures are missing: {', '.join(missing[:NAMED])}{more}")
    if questions and len(examples) not in questions:
        published = " or ".join(f"{number:,}" for number in questions)
        faults.append(f"not as published: split '{split}' has {len(examples):,} questions, published are {published}")
    times = collections.Counter((example.id, example.question) for example in examples)
    if twice := [asked for asked in times if times[asked] > 1]:
        faults.append(f"not as published: {len(twice):,} questions stand there several times, such as {twice[0][0]}")
    for path, digest in known.items():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            faults.append(f"not as published: the SHA-256 of {path} is {found[:12]}…, published is {digest[:12]}…")
    return faults


def first_fault(examples, folder, split) -> list[str]:
    """Why a folder of `lmm prepare` cannot be asked about, as `examples` says it; [] if it can."""
    try:
        next(iter(examples(folder, split, 1)), None)
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def missing_pictures(examples) -> list[str]:
    """The pictures of `Example`s that are not there, each once, in the order that they are asked about."""
    paths = dict.fromkeys(image for example in examples for image in example.images)
    names = {}
    for path in paths:  # a folder is listed once, as asking a bucket for each of 40,000 pictures takes minutes
        parent = epath.Path(path).parent
        if parent not in names:
            names[parent] = {file.name for file in parent.iterdir()} if parent.is_dir() else set()
    return [path for path in paths if epath.Path(path).name not in names[epath.Path(path).parent]]


def answers_by_id(name, form, pairs) -> tuple[str, bytes]:
    """A submission file called `name` as EvalAI takes it: each question's id, and `form(answer)`."""
    return name, as_json([{"question_id": example.id, "answer": form(answer)} for example, answer in pairs])


def as_json(rows) -> bytes:
    """A file that a server takes."""
    return json.dumps(rows).encode()
