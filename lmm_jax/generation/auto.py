"""`scale="auto"`: which number of visual tokens a question is asked at, and whether its answer is good enough.

Two things can be known. Before a question is asked, a *router* looks at its pictures and its text and says what
to expect at each budget (`models/router.py`). Once there is an answer, its log-probabilities say how sure the model
is of it, and so what may be expected of asking again with more tokens: a *cascade*.

    way        begins at                         goes up while a larger budget promises more than it costs
    cascade    one budget, the same for all      by the answer
    router     the budget it expects most of     never
    both       the budget it expects most of     by the answer and by what the router expects

What a budget promises is an expected score, 0 … 1; what it costs is a price for each visual token. Both are fitted
on questions with known answers, by `lmm_jax.evaluation.auto`, and are kept in `auto.json` beside the model.
"""

import dataclasses
import hashlib
import json
import math

import numpy as np
from etils import epath

from lmm_jax import storage, strict_json

FILE = "auto.json"
FORMAT = 1
CASCADE, ROUTER, BOTH = WAYS = ("cascade", "router", "both")


def features(logprobs, end) -> np.ndarray:
    """What is known of an answer, `[4]`: one, and the sum, the mean and the least of its log-probabilities.

    Args:
      logprobs: of its tokens.
      end: of its end, 0 where something else ended it.
    """
    known = np.array([*logprobs, end], np.float64)
    return np.array([1.0, known.sum(), known.mean(), known.min()])


def log_odds(expected) -> np.ndarray:
    """What is known of a router's expectations: their logarithmic odds, of the same shape."""
    inside = np.clip(np.asarray(expected, np.float64), 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside))


def logistic(weights, known) -> float:
    """The expected score, 0 … 1."""
    return float(1 / (1 + np.exp(-np.clip(np.dot(weights, known), -50, 50))))


@dataclasses.dataclass(frozen=True)
class Way:
    """One of `WAYS` at one price.

    Attributes:
      start: budget that it begins at; None is the router's choice.
      climbs: whether it asks again at a larger budget.
      price: expected score that a visual token of a square view has to bring.
    """

    start: int | None
    climbs: bool
    price: float


@dataclasses.dataclass(frozen=True)
class Auto:
    """How a model chooses.

    Attributes:
      scales: budgets that it chooses from, ascending.
      of_answer: `{(asked, scale): weights [4]}`, what `features` of an answer at the budget `asked` say about the
        score at `scale`, the same or a larger one.
      of_router: `{scale: weights [1 + S]}`, what one and the `log_odds` of all S expectations of a router say about
        the score at the scale; empty without a router.
      of_both: as `of_answer`, weights `[4 + S]`: what `features` and the `log_odds` of all S expectations say; empty
        without a router.
      ways: `{name: Way}`.
      use: the way that is taken.
      curves: `{name: Ways}`, from few tokens to many: what else there was to choose from, for a report.
      about: what it was fitted on, for whoever reads the file.
      step: of the checkpoint that it was fitted to; None where the model has no steps.
    """

    scales: tuple[int, ...]
    of_answer: dict[tuple[int, int], tuple[float, ...]]
    of_router: dict[int, tuple[float, ...]]
    of_both: dict[tuple[int, int], tuple[float, ...]]
    ways: dict[str, Way]
    use: str
    curves: dict[str, tuple[Way, ...]] = dataclasses.field(default_factory=dict)
    about: dict = dataclasses.field(default_factory=dict)
    step: int | None = None

    @property
    def way(self) -> Way:
        """The one that is taken."""
        return self.ways[self.use]

    @property
    def identity(self) -> str:
        """A text that two share only if they choose alike: of the way that is taken, the budgets and all weights."""
        weights = [sorted(of.items()) for of in (self.of_answer, self.of_router, self.of_both)]
        told = [self.scales, dataclasses.asdict(self.way), weights]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def first(self, way, expected=None) -> int:
        """The budget that a `Way` begins at.

        Args:
          way: `Way`.
          expected: what the router expects at each of `scales`, in their order; None where no router is asked.
        """
        if way.start is not None:
            return way.start
        known = np.concatenate([[1.0], log_odds(expected)])
        worth = {scale: logistic(self.of_router[scale], known) - way.price * scale for scale in self.scales}
        return max(worth, key=worth.get)

    def next(self, way, asked, logprobs, end, expected=None) -> int | None:
        """The larger budget to ask again at, given the answer at the budget `asked`; None if the answer will do.

        Args:
          way: `Way`.
          asked: budget of the answer.
          logprobs, end: see `features`.
          expected: see `first`.
        """
        if not way.climbs:
            return None
        known, weights = features(logprobs, end), self.of_answer
        if way.start is None:
            known, weights = np.concatenate([known, log_odds(expected)]), self.of_both
        worth = {asked: logistic(weights[asked, asked], known)}
        for scale in self.scales:
            if scale > asked:
                worth[scale] = logistic(weights[asked, scale], known) - way.price * scale
        best = max(worth, key=worth.get)
        return None if best == asked else best

    def save(self, folder):
        """Writes it beside a model."""
        text = {
            "format": FORMAT,
            "step": self.step,
            "scales": list(self.scales),
            "use": self.use,
            "ways": {name: dataclasses.asdict(way) for name, way in self.ways.items()},
            "curves": {name: [dataclasses.asdict(way) for way in ways] for name, ways in self.curves.items()},
            "of_answer": [[asked, scale, list(w)] for (asked, scale), w in sorted(self.of_answer.items())],
            "of_both": [[asked, scale, list(w)] for (asked, scale), w in sorted(self.of_both.items())],
            "of_router": [[scale, list(w)] for scale, w in sorted(self.of_router.items())],
            "about": self.about,
        }
        storage.write_text(epath.Path(folder) / FILE, json.dumps(text, indent=1) + "\n")


def by_density(scales, coarse, threshold) -> Auto:
    """How a model with a `DensityRouter` chooses between two of its scales, as its authors have it.

    Args:
      scales: of the model.
      coarse: the one for pictures that do not need the largest.
      threshold: probability of needing it from which on it is taken.
    """
    fine, pairs = max(scales), [(coarse, coarse), (coarse, max(scales)), (max(scales), max(scales))]
    nothing = (0.0,) * (1 + len(scales))
    least = 1e-9  # so that the threshold itself is enough
    return Auto(
        scales=(coarse, fine),
        of_answer=dict.fromkeys(pairs, (0.0,) * 4),
        # The odds of needing it against those of the threshold; at an expected score of 1/2 both are worth as much.
        of_router={coarse: nothing, fine: (least - float(log_odds(threshold)), *nothing[2:], 1.0)},
        of_both=dict.fromkeys(pairs, (0.0,) * (4 + len(scales))),
        ways={ROUTER: Way(None, False, 0.0)},
        use=ROUTER,
        about={"fitted": "by the model's authors: a router by density", "threshold": threshold},
    )


def load_auto(folder) -> Auto | None:
    """What `Auto.save` wrote beside a model; None if nothing was.

    Raises:
      ValueError: the file is none of these, or says something that makes no sense.
    """
    path = epath.Path(folder) / FILE
    if not path.exists():
        return None
    try:
        read = strict_json.read_object(path)
        if read["format"] != FORMAT:
            raise ValueError(f"format {read['format']!r} instead of {FORMAT}")
        auto = Auto(
            scales=tuple(int(scale) for scale in read["scales"]),
            of_answer={(int(a), int(s)): _numbers(w, 4) for a, s, w in read["of_answer"]},
            of_router={int(s): _numbers(w, 1 + len(read["scales"])) for s, w in read["of_router"]},
            of_both={(int(a), int(s)): _numbers(w, 4 + len(read["scales"])) for a, s, w in read["of_both"]},
            ways={name: _way(way) for name, way in read["ways"].items()},
            use=read["use"],
            curves={name: tuple(_way(way) for way in ways) for name, ways in read["curves"].items()},
            about=read["about"],
            step=read["step"],
        )
        _check(auto)
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        told = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{path} is not what `lmm evaluate --fit-auto` writes ({told}); fit it again, or delete it"
        ) from error
    return auto


def _way(read):
    return Way(None if read["start"] is None else int(read["start"]), read["climbs"], float(read["price"]))


def _numbers(values, count):
    if len(values) != count or not all(math.isfinite(value) for value in values):
        raise ValueError(f"{values} instead of {count} numbers")
    return tuple(map(float, values))


def _check(auto):
    """Raises ValueError for what `first` and `next` would stumble over."""
    scales = auto.scales
    if not scales or list(scales) != sorted(set(scales)):
        raise ValueError(f"scales {scales}")
    pairs = {(a, s) for a in scales for s in scales if s >= a}
    of_router = (set(auto.of_router), set(auto.of_both))
    if set(auto.of_answer) != pairs or of_router not in ((set(), set()), (set(scales), pairs)):
        raise ValueError("of_answer, of_router and of_both do not go with scales")
    if auto.use not in auto.ways:
        raise ValueError(f"use {auto.use!r} is none of {', '.join(auto.ways)}")
    for name, way in [*auto.ways.items(), *((name, way) for name, ways in auto.curves.items() for way in ways)]:
        starts = scales if auto.of_router == {} else (None, *scales)
        if name not in WAYS or way.start not in starts or not isinstance(way.climbs, bool):
            raise ValueError(f"the way {name!r}: {way}")
        if not math.isfinite(way.price):
            raise ValueError(f"the price of the way {name!r}: {way.price}")
