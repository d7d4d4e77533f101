"""How certain a score is, whether two differ, and whether a model knows when it is right. numpy alone.

Scores are numbers of single answers, 0 … 1. Several questions about one picture are not independent: where groups are
given, whole groups are drawn, as if other pictures had been asked about (a cluster bootstrap).
"""

import collections.abc
import dataclasses

import numpy as np

LEVEL = 0.95  # of every interval
DRAWS = 2000
TESTED_AT_ONCE, ENOUGH = 1000, 200  # draws of a test, which ends early once so many are as extreme: p is known well
CELLS = 4_000_000  # numbers drawn at once, so that a benchmark of 200,000 questions takes no more memory


def mean_interval(scores, groups=None, seed=0, draws=DRAWS) -> tuple[float, float, float]:
    """The mean of scores with its 95 % interval, by the percentile bootstrap.

    Where all groups score alike, nothing can be resampled and a bootstrap would claim certainty. Then the interval
    reaches as far as what may have been missed: the share of another outcome that is absent among this many groups
    once in 40 times, as in an exact binomial interval (Clopper and Pearson).

    Args:
      scores: `[n]`, 0 … 1.
      groups: `[n]`, which questions belong together; each is its own group if None.
      seed: of the draws; the same scores give the same interval, in whatever order they come.
      draws: resampled sets.

    Returns:
      `(mean, low, high)`.

    Raises:
      ValueError: no scores, one that is no number, or another number of groups.
    """
    scores = _values(scores, "score")
    return _interval(scores, groups, seed, draws, min(0.0, scores.min()), max(1.0, scores.max()))


def paired_difference(first, second, groups=None, seed=0, draws=DRAWS) -> tuple[float, float, float, float]:
    """How much higher the second of two sets of scores of the same questions is.

    The interval is `mean_interval`'s, of the differences. The p-value is that of a sign-flip test: how often the mean
    difference would be as large if for each group a coin decided which of the two is which. For right or wrong
    answers without groups that is McNemar's exact test, up to the number of draws.

    Args:
      first, second: `[n]` scores, of the same question at the same place.
      groups, seed: see `mean_interval`.
      draws: of the interval, and at most ten times as many of the test, so that p is at least 1 / (10 draws + 1).

    Returns:
      `(difference, low, high, p)`, the difference `mean(second) - mean(first)`, two-sided p.

    Raises:
      ValueError: as `mean_interval`, or another number of scores in one than in the other.
    """
    first, second = _values(first, "first score"), _values(second, "second score")
    if len(first) != len(second):
        raise ValueError(f"paired scores are of the same questions, got {len(first):,} and {len(second):,}")
    differences = second - first
    interval = _interval(differences, groups, seed, draws, -1.0, 1.0)
    return *interval, _sign_flip(_totals(differences, groups)[0], seed, 10 * draws)


def _values(values, name):
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"expected one {name} or more, got an array of shape {values.shape}")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name} number {at} is {values[at]}, expected a finite number")
    return values


def _totals(values, groups):
    """Sum and count of the values of each group, `[G]` each; rounded so that equal sums are found to be equal."""
    if groups is None:
        return values, np.ones(len(values))
    groups = np.asarray(groups)
    if groups.shape != values.shape:
        raise ValueError(f"expected a group for each of {len(values):,} scores, got an array of shape {groups.shape}")
    _, number = np.unique(groups, return_inverse=True)
    return np.round(np.bincount(number, values), 12), np.bincount(number).astype(np.float64)


def _interval(values, groups, seed, draws, least, most):
    """`(mean, low, high)`; values lie within `least` … `most`."""
    mean = float(values.mean())
    totals, counts = _totals(values, groups)
    # Groups with the same sum and count are exchangeable. To draw G groups is to draw how often each of these types
    # occurs, of which there are few where answers are right or wrong: the same distribution, far fewer numbers.
    types, multiplicity = np.unique(np.stack([totals, counts]), axis=1, return_counts=True)
    means = types[0] / types[1]
    if np.ptp(means) < 1e-9:
        absent = ((1 - LEVEL) / 2) ** (1 / len(totals))
        low, high = (mean * absent + bound * (1 - absent) for bound in (least, most))
        return mean, float(low), float(high)
    rng, share, found = np.random.default_rng(seed), multiplicity / len(totals), []
    for count in _chunks(draws, len(share)):
        drawn = rng.multinomial(len(totals), share, size=count)
        found.append((drawn @ types[0]) / (drawn @ types[1]))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(min(low, mean)), float(max(high, mean))


def _sign_flip(totals, seed, draws):
    """Two-sided p of the sum of `totals` `[G]` if their signs were of no meaning."""
    sizes, multiplicity = np.unique(np.abs(totals[totals != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    rng, extreme, drawn, seen = np.random.default_rng(seed), 0, 0, abs(totals.sum()) - 1e-9
    for count in _chunks(draws, len(sizes), TESTED_AT_ONCE):
        positive = rng.binomial(multiplicity, 0.5, size=(count, len(sizes)))
        extreme += int((np.abs((2 * positive - multiplicity) @ sizes) >= seen).sum())
        drawn += count
        if extreme >= ENOUGH:
            break
    return (extreme + 1) / (drawn + 1)


def _chunks(draws, width, most=CELLS):
    """`draws` in parts of at most `most`, each of at most `CELLS` numbers if drawn `width` at a time."""
    most = min(most, max(1, CELLS // width))
    return [most] * (draws // most) + [draws % most] * (draws % most > 0)


def p_text(p) -> str:
    """ "p = 0.012", "p < 0.001"."""
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


def holm(p) -> np.ndarray:
    """Which of several tests are significant at 5 % together, by Holm's step-down correction.

    Args:
      p: `[n]` p-values.

    Returns:
      `[n]` bool: the chance that any is true where nothing differs is at most 5 %.
    """
    p = np.asarray(p, np.float64)
    order = np.argsort(p, kind="stable")
    passes = np.logical_and.accumulate(p[order] <= (1 - LEVEL) / np.arange(len(p), 0, -1))
    found = np.zeros(len(p), bool)
    found[order] = passes
    return found


@dataclasses.dataclass(frozen=True)
class Bin:
    """Answers of similar confidence.

    Attributes:
      count: answers.
      confidence: their mean confidence.
      score: their mean score; the same number where a model is calibrated.
      low, high: 95 % interval of the score.
    """

    count: int
    confidence: float
    score: float
    low: float
    high: float


def reliability(confidence, scores, bins=15, groups=None) -> list[Bin]:
    """Answers in bins of as many answers each, from the least to the most confident.

    Answers of the same confidence lie in the same bin, so the bins are uneven, and fewer, where many are alike.

    Args:
      confidence: `[n]`, 0 … 1.
      scores: `[n]`, 0 … 1.
      bins: at most.
      groups: of the intervals, see `mean_interval`.

    Raises:
      ValueError: no answers, a number outside of 0 … 1, or another number of scores than of confidences.
    """
    confidence, scores, number = _bins(confidence, scores, bins)
    found = []
    for inside in (number == n for n in np.unique(number)):
        score, low, high = mean_interval(scores[inside], None if groups is None else np.asarray(groups)[inside])
        found.append(Bin(int(inside.sum()), float(confidence[inside].mean()), score, low, high))
    return found


def calibration_error(confidence, scores, bins=15) -> float:
    """The expected calibration error: how far confidence and score are apart, over bins of as many answers each.

    Arguments and errors as of `reliability`. 0 is calibrated; some of it is chance, about sqrt(bins / n) / 3.
    """
    confidence, scores, number = _bins(confidence, scores, bins)
    return float(np.abs(np.bincount(number, confidence - scores)).sum() / len(scores))


def _bins(confidence, scores, bins):
    """Confidences and scores as arrays, and the number of the bin of each `[n]`."""
    confidence, scores = _values(confidence, "confidence"), _values(scores, "score")
    if len(confidence) != len(scores):
        raise ValueError(f"expected a score for each of {len(confidence):,} confidences, got {len(scores):,}")
    if bins < 1:
        raise ValueError(f"expected 1 bin or more, got {bins}")
    for name, values in (("confidence", confidence), ("score", scores)):
        if values.min() < -1e-9 or values.max() > 1 + 1e-9:
            raise ValueError(f"a {name} lies between 0 and 1, got {values.min():g} … {values.max():g}")
    _, value, count = np.unique(confidence, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - count / 2  # the rank of each value, in the middle of those that share it
    return confidence, scores, (middle / len(scores) * bins).astype(np.int64)[value]


def of_one_picture(examples) -> np.ndarray:
    """Which questions are about the same pictures, as numbers `[n]`, for the `groups` of an interval.

    Args:
      examples: `Example`s. A `group` of their own goes before their pictures. Paths and bytes are the same picture
        where they are equal, opened pictures where they are one object. A question without a picture is alone.
    """
    numbers = {}
    keys = (_key(example) or ("alone", n) for n, example in enumerate(examples))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _key(example):
    if example.group:
        return "group", example.group
    return tuple(image if isinstance(image, collections.abc.Hashable) else id(image) for image in example.images)


def of_records(records) -> np.ndarray:
    """The same for answers, `[n]`, as their `Record`s say it; one that does not know its picture is alone."""
    pictures = np.array([record.picture for record in records], np.int64)
    unknown = pictures < 0
    pictures[unknown] = pictures.max(initial=0) + 1 + np.arange(unknown.sum())
    return pictures
