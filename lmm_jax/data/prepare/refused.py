"""A row that is left out: why, in words that can be counted; and how values of any origin are told in them."""


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


def is_absent(value) -> bool:
    """Whether a value says nothing: null, NaN, or an empty text, list or object, also one of nothing but such."""
    if isinstance(value, (str, bytes)):
        return not value
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_absent, value))
    return value is None or value != value  # NaN, which pandas writes, is not itself


def kind_of(value):
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")


def short(value) -> str:
    """A value as Python writes it, cut to a length for messages."""
    return repr(value)[:80]
