"""JSON of others, read without trusting it, and ours: what two readers could understand differently is refused.

Python's `json` takes NaN, turns 1e400 into infinity, lets the last of two equal keys win, and answers deep nesting
with a RecursionError. A config that says such a thing says nothing that can be relied upon.
"""

import collections
import json
import math

from lmm_jax import storage
from lmm_jax.ranges import Range

MOST_BYTES = 16 * 2**20  # of a file; what is read of it may take twenty times as much memory
DEEPEST = 200  # levels; what is read is gone through by functions that call themselves
TOO_DEEP = "it is nested too deeply to be what it claims to be"
SHOWN = 80  # characters of a value in a message


def parse(text):
    """What a JSON text holds.

    Args:
      text: str, or bytes of UTF-8.

    Raises:
      ValueError: it is no JSON, nested too deeply, has a key twice in one object, or a number that is not finite; the
        message says which, and where.
    """
    infinite = []

    def number(written):
        value = float(written)
        if not math.isfinite(value):
            infinite.append(written)
        return value

    try:
        content = json.loads(text, parse_constant=number, parse_float=number, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if _is_deeper(content, DEEPEST):
        raise ValueError(TOO_DEEP)
    if infinite:
        raise ValueError(f"{_where(content) or 'it'} is {infinite[0]}, which is no finite number")
    return content


def _is_deeper(content, levels):
    """Whether lists and objects lie in one another more than `levels` deep."""
    inside = [content]
    for _ in range(levels + 1):
        many = (x.values() if isinstance(x, dict) else x for x in inside if isinstance(x, dict | list))
        inside = [x for values in many for x in values if isinstance(x, dict | list)]
        if not inside:
            return False
    return True


def line(value) -> str:
    """One line of JSON that every reader takes: Python's own writes NaN and Infinity, which JSON does not have.

    Args:
      value: of dicts, lists and what JSON has; a number that is not finite is written as null.
    """
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_bytes(path, most=MOST_BYTES) -> bytes:
    """Bytes of a file of others, which a link may have replaced by a device without end.

    Args:
      path: `epath.Path` of the file.
      most: bytes that it may have.

    Raises:
      OSError: there is no such file, or it cannot be read.
      ValueError: it is no file but a folder, a pipe or a device, or is larger; the message names it.
    """
    size = path.stat().length
    if not storage.is_file(path):
        raise ValueError(f"{path} is no file")
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, more than {most:,} are not read")
    return path.read_bytes()


def read_object(path, most=MOST_BYTES) -> dict:
    """The JSON object that a file holds, see `parse`.

    Args:
      path, most: see `read_bytes`.

    Raises:
      OSError: there is no such file, or it cannot be read.
      ValueError: it is what `read_bytes` or `parse` refuses, or holds no JSON object; the message names the file.
    """
    data = read_bytes(path, most)
    try:
        content = parse(data)
    except ValueError as error:  # bytes that are no UTF-8 are one, too
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys: it is {shown(content)}")
    return content


def fault(content, ranges: dict[str, Range], part="") -> str:
    """What is wrong with the values of an object; "" if nothing is.

    Keys that are missing or null have no value, and keys that `ranges` does not name are not read.

    Args:
      content: the object; lists in it are held to ranges of tuples.
      ranges: what each key may be.
      part: name of the key that holds the object, for the message.
    """
    for key, valid in ranges.items():
        value = content.get(key)
        if value is not None and not valid.holds(as_tuples(value)):
            return f"{f'{part}.' if part else ''}{key} = {shown(value)} is not supported, {valid} is"
    return ""


def as_tuples(value):
    """A value of JSON with tuples in the place of lists."""
    if isinstance(value, dict):
        return {key: as_tuples(x) for key, x in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def shown(value) -> str:
    """A value of any size and kind as one short line, for a message."""
    text = repr(_short(value)).encode(errors="backslashreplace").decode()
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _short(value, depth=3):
    """The beginning of a value, so that a large one is not printed whole first."""
    if isinstance(value, dict):
        return {key: _short(x, depth - 1) for key, x in list(value.items())[:8]} if depth else {}
    if isinstance(value, list | tuple):
        return type(value)(_short(x, depth - 1) for x in value[:8]) if depth else type(value)()
    return value[:SHOWN] if isinstance(value, str) else value


def _distinct(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found


def _where(value):
    """The keys that lead to the first number in `value` that is not finite; "" if there is none."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, x in inside:
        if isinstance(x, float) and not math.isfinite(x):
            return str(key)
        if isinstance(x, dict | list) and (rest := _where(x)):
            return f"{key}.{rest}"
    return ""
