"""What a value may be: the ranges of config fields, each with the words that a refusal says.

A range is made by one of the functions below, `whole(1, 8)` for instance, and asked by `holds(value)`. Types are
taken at their word: True is no number, 2.0 is not whole, and "8" is neither.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable

MOST = 2**31 - 1  # of a whole number: what counters on devices hold


@dataclasses.dataclass(frozen=True)
class Range:
    """What a value may be.

    Attributes:
      kind: type of the values, `str`, `int`, `float`, `bool` or `tuple`.
      words: what is valid, "a whole number from 1 to 8".
      holds: whether a value is valid.
      optional: whether None is valid, which says that a field is not set.
    """

    kind: type
    words: str
    holds: Callable[[object], bool]
    optional: bool = False

    def __str__(self):
        return self.words


def whole(least=0, most=MOST, special="") -> Range:
    """Whole numbers; `special` says what the first of them means where that is out of line."""
    return Range(
        int,
        f"a whole number from {least:,} to {most:,}{special and f'; {special}'}",
        lambda x: type(x) is int and least <= x <= most,
    )


def number(least=0.0, most=math.inf, above=False, below=False, special="") -> Range:
    """Finite numbers, whole ones among them.

    Args:
      least, most: the ends.
      above, below: whether the lower or the upper end itself is left out.
      special: what a value means that is out of line.
    """
    lower = f"above {least:g}" if above else f"from {least:g}"
    upper = "" if most == math.inf else f" to below {most:g}" if below else f" to {most:g}"

    def holds(x):
        if type(x) not in (int, float) or not math.isfinite(x):
            return False
        return (x > least if above else x >= least) and (x < most if below else x <= most)

    return Range(float, f"a number {lower}{upper}{special and f'; {special}'}", holds)


def flag() -> Range:
    """True or False."""
    return Range(bool, "True or False", lambda x: type(x) is bool)


def one_of(names: Iterable[str]) -> Range:
    """One of some words."""
    shown = [name or "''" for name in names]
    words = " or ".join(shown) if len(shown) < 3 else ", ".join(shown)
    return Range(str, f"one of {words}", lambda x: type(x) is str and x in names)


def text(what) -> Range:
    """Any text but the empty one; `what` says of what."""
    return Range(str, what, lambda x: type(x) is str and bool(x.strip()) and "\0" not in x)


def unset(valid) -> Range:
    """What `valid` holds, or None."""
    return dataclasses.replace(
        valid,
        words=f"{valid.words}, or None",
        holds=lambda x: x is None or valid.holds(x),
        optional=True,
    )


def each(valid, least=0, most=None, distinct=False, what="") -> Range:
    """Tuples whose members are all of one range.

    Args:
      valid: of each member.
      least, most: numbers of members; any number if `most` is None.
      distinct: whether no two members are equal.
      what: words for the whole of it, instead of those that the arguments give.
    """
    count = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
    different = " different" if distinct else ""
    words = what or f"a tuple of {count}{different} values, each {valid.words}"

    def holds(x):
        sized = type(x) is tuple and least <= len(x) and (most is None or len(x) <= most)
        return sized and all(map(valid.holds, x)) and not (distinct and len(set(x)) < len(x))

    return Range(tuple, words, holds)


def together(*valid, what) -> Range:
    """Tuples with a range for each member; `what` says what they are."""

    def holds(x):
        return type(x) is tuple and len(x) == len(valid) and all(r.holds(y) for r, y in zip(valid, x, strict=True))

    return Range(tuple, what, holds)


def either(*valid) -> Range:
    """What any of some ranges holds; its kind is that of the first."""
    return Range(valid[0].kind, ", or ".join(r.words for r in valid), lambda x: any(r.holds(x) for r in valid))


def like(default) -> Range:
    """The range of a field that says nothing but its default: all values of that type, numbers finite."""
    kinds = {
        bool: flag(),
        int: whole(-MOST),
        float: number(-math.inf),
        str: Range(str, "text", lambda x: type(x) is str),
        tuple: Range(tuple, "a tuple", lambda x: type(x) is tuple),
    }
    return kinds[type(default)]


COLOUR = each(number(0, 1), 3, 3, what="three numbers from 0 to 1: red, green, blue")
SPREAD = each(number(0.001, 1), 3, 3, what="three numbers from 0.001 to 1: red, green, blue")
