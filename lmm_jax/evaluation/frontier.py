"""Curves of accuracy against visual tokens, and how much lies between them. numpy alone.

A curve is an array `[P, 2]` of points (mean visual tokens, accuracy). Between two points it is straight *in tokens*:
whoever asks a share of the questions at one point, chosen by a coin, and the rest at the other, gets just that.
Behind its last point it stays level, as no one has to spend more. Areas are taken over the logarithm of tokens, so
that going from 1 token to 2 counts as much as going from 18 to 36; on a logarithmic axis the area is what is seen,
and a straight piece looks bent.
"""

import itertools

import numpy as np

ROUNDING = 1e-9  # by so much a mean of tokens may be off


def curve(points) -> np.ndarray:
    """Points as a curve `[P, 2]`, in the order of tokens; of several at the same tokens the best is kept.

    Raises:
      ValueError: no points, one that is not two finite numbers, or tokens that are not positive.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1:] != (2,) or not len(points):
        raise ValueError(f"a curve is one pair or more of (tokens, accuracy), got an array of shape {points.shape}")
    if not np.isfinite(points).all() or points[:, 0].min() <= 0:
        raise ValueError("a curve's points are finite, and their tokens positive")
    tokens, place = np.unique(points[:, 0], return_inverse=True)
    best = np.full(len(tokens), -np.inf)
    np.maximum.at(best, place, points[:, 1])
    return np.stack([tokens, best], axis=1)


def hull(points) -> np.ndarray:
    """The upper concave hull of points, `[P, 2]`: the best that choosing among them by a coin can do.

    It begins at the fewest tokens and ends at the most. Errors as of `curve`.
    """
    kept = []
    for point in curve(points):
        while len(kept) > 1 and _turn(kept[-2], kept[-1], point) >= 0:
            kept.pop()
        kept.append(point)
    return np.stack(kept)


def _turn(a, b, c):
    """Above zero if the way from a over b to c turns left, so that b lies below the straight line."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def value(points, tokens) -> np.ndarray:
    """Accuracy of a curve at `tokens`, an array of any shape; level behind its last point, nan before its first."""
    (x, y), tokens = curve(points).T, np.asarray(tokens, np.float64)
    return np.where(tokens < x[0] * (1 - ROUNDING), np.nan, np.interp(tokens, x, y))


def tokens_for(points, accuracy) -> float:
    """The fewest tokens at which a curve reaches an accuracy; infinite where it never does."""
    points = curve(points)
    if points[0, 1] >= accuracy:
        return float(points[0, 0])
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 < accuracy <= y1:
            return float(x0 + (x1 - x0) * (accuracy - y0) / (y1 - y0))
    return float("inf")


def area_between(low, high, first, last, log=True) -> float:
    """The area between two curves from `first` to `last` tokens; negative where `low` lies above `high`.

    Args:
      low, high: curves, see `curve`; both begin at `first` tokens or before.
      first, last: tokens, `first` < `last`.
      log: over the natural logarithm of tokens; over tokens themselves if False.

    Raises:
      ValueError: an interval that is none, or in which a curve has no value.
    """
    low, high = curve(low), curve(high)
    if not 0 < first < last < np.inf:
        raise ValueError(f"expected 0 < first < last tokens, got {first:g} … {last:g}")
    begins = max(low[0, 0], high[0, 0])
    if begins > first * (1 + ROUNDING):
        raise ValueError(f"a curve begins at {begins:g} tokens, and the area is asked for from {first:g} on")
    edges = np.unique(np.clip(np.concatenate([low[:, 0], high[:, 0], [first, last]]), first, last))
    gap = value(high, edges) - value(low, edges)
    x0, x1, y0, y1 = edges[:-1], edges[1:], gap[:-1], gap[1:]
    if not log:
        return float(((y0 + y1) / 2 * (x1 - x0)).sum())
    slope = (y1 - y0) / (x1 - x0)  # the integral of (y0 + slope (x - x0)) / x
    return float(((y0 - slope * x0) * np.log(x1 / x0) + slope * (x1 - x0)).sum())


def gap_closed(fixed, way, oracle, log=True) -> float:
    """Which share of the area between the fixed budgets and the oracle lies below a way of choosing the budget.

    It is taken from the fewest to the most tokens of the fixed budgets. Where `way` begins later, the fixed budgets
    stand in for it: nothing is closed there. 0 is what fixed budgets do, 1 the oracle, below 0 worse than fixed ones.

    Args:
      fixed, way, oracle: curves, see `curve`. The oracle begins at the fewest tokens of `fixed` or before.
      log: see `area_between`.

    Returns:
      the share; nan where the oracle is no better than the fixed budgets, so that there is nothing to close.

    Raises:
      ValueError: a single fixed budget, or an oracle that begins later.
    """
    fixed, way = curve(fixed), curve(way)
    if len(fixed) < 2:
        raise ValueError("a gap lies between two fixed budgets or more, got one")
    first, last = fixed[0, 0], fixed[-1, 0]
    gap = area_between(fixed, oracle, first, last, log)
    if gap <= 1e-12:
        return float("nan")
    begin = max(first, way[0, 0])
    return area_between(fixed, way, begin, last, log) / gap if begin < last else 0.0


def oracle_frontier(scores, tokens) -> np.ndarray:
    """The best that anyone who knows the truth can do at each mean number of tokens.

    Each question takes the budget with the largest score − price · tokens; the curve goes through all prices, from
    one that nobody can pay down to zero. It is concave. Its last point is the oracle of M3: the best score of each
    question at the fewest tokens that reach it.

    Args:
      scores: `[S, n]`, of each budget and question.
      tokens: `[S, n]`, or `[S]` or `[S, 1]` where all questions cost the same, positive.

    Returns:
      a curve `[P, 2]` of (mean tokens, mean score).

    Raises:
      ValueError: no questions, shapes that do not go together, or a number that is none.
    """
    scores, tokens = np.asarray(scores, np.float64), np.asarray(tokens, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"expected scores [budgets, questions], got an array of shape {scores.shape}")
    tokens = tokens[:, None] if tokens.ndim == 1 else tokens
    if tokens.shape not in (scores.shape, (len(scores), 1)):
        raise ValueError(f"expected tokens of the shape of the scores {scores.shape}, got {tokens.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("a score is no finite number")
    tokens = np.broadcast_to(tokens, scores.shape)
    # Questions with the same scores and tokens take the same steps, and there are few kinds of them.
    kinds, count = np.unique(np.concatenate([tokens, scores]), axis=1, return_counts=True)
    start, steps = np.zeros(2), []
    for kind, times in zip(kinds.T.reshape(-1, 2, len(scores)), count, strict=True):
        points = hull(kind.T)
        start += times * points[0]
        step = np.diff(points, axis=0)
        steps.append(times * step[step[:, 1] > 0])
    steps = np.concatenate(steps)
    slope = np.round(steps[:, 1] / steps[:, 0], 12) if len(steps) else np.zeros(0)
    worth, place = np.unique(-slope, return_inverse=True)  # what one more token brings, the most first
    merged = np.zeros((len(worth), 2))
    np.add.at(merged, place, steps)
    return np.concatenate([start[None], start + np.cumsum(merged, axis=0)]) / scores.shape[1]
