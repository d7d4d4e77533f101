"""The options of a call of `Model.generate`: numbers and stops of a user are checked, and become one `Sampling` each.

Whatever is wrong with a value is a ValueError whose sentence begins with the argument's name. Scalars of numpy are
numbers as Python's are; True and False are none.
"""

import dataclasses
import math
import numbers
import operator
import reprlib

SEEDS = 1 << 32  # how many seeds there are: 0 … 2**32 - 1
GREEDY_BELOW = 1e-5  # a temperature; see `Sampling.temperature`
LEAST_TOP_P = 1e-6  # see `Sampling.top_p`
MOST_TOP_K = (1 << 31) - 1  # what an int32 holds; no vocabulary has more ids

WHOLE = "a whole number of 1 or more is valid"
TEMPERATURE = "a number from 0, which is greedy, to 100 is valid"
TOP_K = "a whole number of 0 or more is valid, 0 is off"
TOP_P = "a number above 0 and at most 1, which is off, is valid"
PENALTY = "a number from 0.01 to 100 is valid, 1 is off"
SEED = f"a whole number from 0 to {SEEDS - 1} is valid"
STOP = "a text that ends the answer, the id of a token, or a list of such is valid"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the ids of one answer are chosen, and what ends it besides the model itself.

    Attributes:
      temperature: that logits are divided by; 0 is greedy. Numbers below `GREEDY_BELOW` are read as 0: they could not
        be told from it, and dividing by them would overflow.
      top_k: ids are drawn from so many most probable ones; 0 is off.
      top_p: ids are drawn from the fewest most probable ones that have this probability together; 1 is off. At least
        `LEAST_TOP_P`, at which the most probable id alone is left, as with any smaller number.
      repetition_penalty: logits of ids that the prompt or the answer has are divided by it where they are positive,
        and multiplied where they are negative; 1 is off.
      seed: of the answer's random numbers, below `SEEDS`.
      stop_texts: texts that end the answer and are no part of it, none of them empty.
      stop_ids: ids that end the answer and are no part of it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_texts: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


def read_sampling(
    count, many, vocab_size, *, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, stop=(), seed=0
) -> list[Sampling]:
    """The `Sampling` of each of `count` prompts.

    Args:
      count: prompts.
      many: whether the prompts came as a list, so that each option may be a list with one entry for each.
      vocab_size: ids that there are; a stop id is below.
      temperature, top_k, top_p, repetition_penalty: see `Sampling`.
      stop: a text, an id, or a list or tuple of those, which holds for all prompts; where `many`, also a list of such
        lists, one for each. None is as good as an empty list.
      seed: prompt i has the seed `(seed + i) % SEEDS`, so that equal prompts get different answers; of a list, its
        own entry.

    Raises:
      ValueError: which option is not what it may be, and what it may be.
    """
    columns = (
        read_each("temperature", temperature, count, many, _read_temperature),
        read_each("top_k", top_k, count, many, _read_top_k),
        read_each("top_p", top_p, count, many, _read_top_p),
        read_each("repetition_penalty", repetition_penalty, count, many, _read_penalty),
        _read_seeds(seed, count, many),
        _read_stops(stop, count, many, vocab_size),
    )
    return [Sampling(*values, *stops) for *values, stops in zip(*columns, strict=True)]


def read_number(name, value, valid=WHOLE, least=1, most=math.inf) -> int:
    """A whole number from `least` to `most`; ValueError says what `name` is instead, and that `valid` is."""
    plain = _plain(value)
    try:
        number = None if isinstance(plain, bool) else operator.index(plain)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise _refusal(name, value, valid)
    return number


def read_real(name, value, valid, least, most) -> float:
    """A number from `least` to `most`; ValueError says what `name` is instead, and that `valid` is."""
    plain = _plain(value)
    try:
        number = float(plain) if isinstance(plain, numbers.Real) and not isinstance(plain, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not least <= number <= most:  # nothing compares to nan
        raise _refusal(name, value, valid)
    return number


def read_each(name, value, count, many, read) -> list:
    """`count` values, from one that holds for all or, where `many`, a list or tuple with one for each.

    Args:
      read: `read(name, value)` checks one value and returns it.
    """
    if not many or not isinstance(value, list | tuple):
        return [read(name, value)] * count
    _check_count(name, value, count, "one number")
    return [read(f"{name}[{n}]", one) for n, one in enumerate(value)]


def read_numbers(name, value, count, many) -> list[int]:
    """`count` whole numbers of 1 or more; see `read_each`."""
    return read_each(name, value, count, many, read_number)


def read_flag(name, value) -> bool:
    """True or False; ValueError for anything else."""
    if not isinstance(value, bool):
        raise _refusal(name, value, "True or False is valid")
    return value


def kind(value):
    """What a value is, for a message: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def shown(value):
    """A value as Python writes it, cut to a length for a message."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return "…"


def _read_temperature(name, value):
    number = read_real(name, value, TEMPERATURE, 0, 100)
    return number if number >= GREEDY_BELOW else 0.0


def _read_top_k(name, value):
    return min(read_number(name, value, TOP_K, least=0), MOST_TOP_K)


def _read_top_p(name, value):
    return max(read_real(name, value, TOP_P, math.ulp(0.0), 1), LEAST_TOP_P)


def _read_penalty(name, value):
    return read_real(name, value, PENALTY, 0.01, 100)


def _read_seed(name, value):
    return read_number(name, value, SEED, least=0, most=SEEDS - 1)


def _read_seeds(seed, count, many):
    seeds = read_each("seed", seed, count, many, _read_seed)
    if many and not isinstance(seed, list | tuple):
        return [(one + i) % SEEDS for i, one in enumerate(seeds)]
    return seeds


def _read_stops(stop, count, many, vocab_size):
    """`(texts, ids)` of each prompt."""
    if many and isinstance(stop, list | tuple) and any(isinstance(one, list | tuple) for one in stop):
        _check_count("stop", stop, count, "one list")
        for n, one in enumerate(stop):
            if not isinstance(one, list | tuple):
                raise ValueError(
                    f"stop[{n}]={shown(one)} ({kind(one)}) stands beside lists; give one list of texts and ids for "
                    "all prompts, or such a list for each"
                )
        return [_read_stop(f"stop[{n}]", one, vocab_size) for n, one in enumerate(stop)]
    return [_read_stop("stop", stop, vocab_size)] * count


def _read_stop(name, stop, vocab_size):
    """`(texts, ids)` of one prompt, each once."""
    if stop is None:
        return (), ()
    named = {f"{name}[{n}]": one for n, one in enumerate(stop)} if isinstance(stop, list | tuple) else {name: stop}
    texts = [_read_stop_text(n, one) for n, one in named.items() if isinstance(one, str)]
    ids = [_read_stop_id(n, one, vocab_size) for n, one in named.items() if not isinstance(one, str)]
    return tuple(dict.fromkeys(texts)), tuple(dict.fromkeys(ids))


def _read_stop_text(name, text):
    if not text:
        raise ValueError(f"{name} is an empty text, which every answer begins with; {STOP}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode, so that no answer can have it ({error})") from error
    return str(text)


def _read_stop_id(name, value, vocab_size):
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral):
        raise _refusal(name, value, STOP)
    return read_number(name, value, f"ids of this tokenizer are 0 to {vocab_size - 1}", 0, vocab_size - 1)


def _check_count(name, values, count, one):
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} prompts; give {one}, or one for each")


def _plain(value):
    """Python's number of an array without axes, which numpy's scalars are too; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _refusal(name, value, valid):
    return ValueError(f"{name}={shown(value)} ({kind(value)}): {valid}")
