"""Fitting `scale="auto"` to questions with known answers, and what it then takes and reaches.

A question was answered at every budget, so that what a cascade or a router would have done with it is known without
asking again. What an answer's log-probabilities, and a router's expectations, say about scores is fitted by logistic
regression; then the price of a visual token decides how readily more of them are spent. Of all prices, and all
budgets to begin at, those are kept that no other one beats in accuracy and in tokens; the one that is taken reaches
the best accuracy of any fixed budget with the fewest tokens. All of this is decided on the questions that it is
fitted on, mostly a validation split; nothing of the questions that are tested enters.
"""

import dataclasses
import datetime

import numpy as np

from lmm_jax.evaluation.frontier import gap_closed, hull, oracle_frontier, tokens_for
from lmm_jax.evaluation.run import digest
from lmm_jax.evaluation.statistics import calibration_error, mean_interval
from lmm_jax.generation.auto import BOTH, CASCADE, ROUTER, Auto, Way, features, log_odds

ROUNDING = 1e-9  # of a mean that is taken in another order
RIDGE = 1e-2  # keeps the weights finite where an answer is always right
PRICES = (0.0, *np.geomspace(1e-5, 1.0, 81).tolist())  # of a visual token, in score


@dataclasses.dataclass(frozen=True)
class Point:
    """What a way takes and reaches at one price.

    Attributes:
      way: `generation.auto.Way`.
      tokens: mean visual tokens of a question, of all budgets that were tried.
      accuracy: mean score.
    """

    way: Way
    tokens: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Answers:
    """The same questions answered at every budget: S budgets, ascending, and n questions with a picture.

    Attributes:
      scales: S ints.
      score, tokens: `[S, n]`, of each answer, and the visual tokens that it took.
      known: `[S, n, 4]`, see `generation.auto.features`.
      expected: `[S, n]`, see `generation.auto.log_odds`; None without a router.
      pictures: `[n]`, equal for questions about the same picture.
      kinds: `[n]`, of question.
      seconds: `[S]`, mean time of a question.
    """

    scales: tuple[int, ...]
    score: np.ndarray
    tokens: np.ndarray
    known: np.ndarray
    expected: np.ndarray | None
    pictures: np.ndarray
    kinds: np.ndarray
    seconds: np.ndarray


def collect(runs) -> Answers:
    """The answers of `{scale: Records}`, of fixed budgets alone, to questions that have pictures and a score.

    Args:
      runs: of the same questions in the same order.

    Raises:
      ValueError: fewer than two budgets, or no question with a score and a picture.
    """
    scales = tuple(sorted(int(scale) for scale in runs if scale.isdigit()))
    if len(scales) < 2:
        raise ValueError("a model chooses between budgets, so that at least two have to be asked at: --scales all")
    lists = [runs[str(scale)] for scale in scales]
    use = [n for n, record in enumerate(lists[0]) if record.score is not None and record.visual_tokens]
    if not use:
        raise ValueError("no question has a picture and an answer that can be scored")
    picked = [[records[n] for n in use] for records in lists]
    has_router = all(record.expected for records in picked for record in records)
    return Answers(
        scales=scales,
        score=np.array([[record.score for record in records] for records in picked]),
        tokens=np.array([[record.visual_tokens for record in records] for records in picked], np.float64),
        known=np.array([[features(record.logprobs, record.end) for record in records] for records in picked]),
        expected=_expected(picked[0], len(scales)) if has_router else None,
        pictures=np.array([record.picture for record in picked[0]]),
        kinds=np.array([record.kind for record in picked[0]], object),
        seconds=np.array([np.mean([record.seconds for record in records]) for records in lists]),
    )


def _expected(records, count):
    if {len(record.expected) for record in records} != {count}:
        raise ValueError("the router knows the trained budgets, so that these have to be asked at: --scales all")
    return log_odds([record.expected for record in records]).T


def fit(answers, about=None, step=None) -> Auto:
    """Fits all ways to `Answers`, and chooses one.

    Args:
      answers: `Answers`.
      about: what it is fitted on, for `Auto.about`.
      step: see `Auto.step`.
    """
    S = len(answers.scales)
    of_answer = {
        (answers.scales[a], answers.scales[s]): tuple(fit_logistic(answers.known[a], answers.score[s]))
        for a in range(S)
        for s in range(a, S)
    }
    of_router, of_both = {}, {}
    if answers.expected is not None:
        of_router = {
            scale: tuple(fit_logistic(_routed(answers), answers.score[s])) for s, scale in enumerate(answers.scales)
        }
        of_both = {
            (answers.scales[a], answers.scales[s]): tuple(fit_logistic(_both(answers, a), answers.score[s]))
            for a in range(S)
            for s in range(a, S)
        }
    auto = Auto(answers.scales, of_answer, of_router, of_both, {}, "")
    families = {CASCADE: [Way(start, True, price) for start in answers.scales for price in PRICES]}
    if of_router:
        families[ROUTER] = [Way(None, False, price) for price in PRICES]
        families[BOTH] = [Way(None, True, price) for price in PRICES]
    worth = expectations(auto, answers)
    points = {name: best([point(way, answers, worth) for way in ways]) for name, ways in families.items()}
    enough = answers.score.mean(axis=1).max()
    chosen = {name: choose(of_way, enough) for name, of_way in points.items()}
    use = min(chosen, key=lambda name: (chosen[name].accuracy < enough - ROUNDING, chosen[name].tokens))
    about = (about or {}) | {
        "date": datetime.date.today().isoformat(),
        "questions": answers.score.shape[1],
        "accuracy": float(enough),
        **{name: {"tokens": p.tokens, "accuracy": p.accuracy} for name, p in chosen.items()},
    }
    return dataclasses.replace(
        auto,
        ways={name: p.way for name, p in chosen.items()},
        use=use,
        curves={name: tuple(p.way for p in of_way) for name, of_way in points.items()},
        about=about,
        step=step,
    )


def _routed(answers):
    """What is known before the questions are asked, `[n, 1 + S]`."""
    return np.concatenate([np.ones((1, answers.expected.shape[1])), answers.expected]).T


def _both(answers, a):
    """What is known of the answers at budget number `a` with a router's expectations, `[n, 4 + S]`."""
    return np.concatenate([answers.known[a], answers.expected.T], axis=1)


def choose(points, enough) -> Point:
    """The `Point` with the fewest tokens that is accurate enough, or the most accurate if none is."""
    good = [p for p in points if p.accuracy >= enough - ROUNDING]
    return min(good, key=lambda p: p.tokens) if good else max(points, key=lambda p: p.accuracy)


def best(points) -> list[Point]:
    """Those that no other one beats in tokens and in accuracy, by tokens ascending."""
    kept = []
    for p in sorted(points, key=lambda p: (p.tokens, -p.accuracy)):
        if not kept or p.accuracy > kept[-1].accuracy:
            kept.append(p)
    return kept


def fit_logistic(known, score) -> np.ndarray:
    """Weights `[k]` so that the logistic function of `known @ weights` is the mean score; Newton's method.

    Args:
      known: `[n, k]`, the first column ones.
      score: `[n]`, 0 … 1.
    """
    mean, spread = known.mean(axis=0), known.std(axis=0)
    mean[0], spread[0] = 0.0, 1.0
    spread = np.where(spread > 1e-9, spread, np.inf)  # what never differs says nothing
    x = (known - mean) / spread
    x[:, 0] = 1.0
    ridge = RIDGE * np.eye(x.shape[1])
    weights = np.zeros(x.shape[1])
    for _ in range(50):
        expected = 1 / (1 + np.exp(-np.clip(x @ weights, -50, 50)))
        slope = x.T @ (score - expected) - ridge @ weights
        bend = (x * (expected * (1 - expected))[:, None]).T @ x + ridge
        step = np.linalg.solve(bend, slope)
        weights += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-9:
            break
    weights = weights / np.where(np.arange(len(weights)) == 0, 1.0, spread)
    weights[0] -= (weights[1:] * mean[1:]).sum()
    return weights


@dataclasses.dataclass(frozen=True)
class Worth:
    """Expected scores of n questions at S budgets, as an `Auto` has them.

    Attributes:
      by_answer: `[S, S, n]`, at each second budget, given the answer at the first; -inf where the second is smaller.
      by_router: `[S, n]`; None without a router.
      by_both: as `by_answer`, given what the router expects, too; None without a router.
    """

    by_answer: np.ndarray
    by_router: np.ndarray | None
    by_both: np.ndarray | None

    def climbing(self, way) -> np.ndarray:
        """What a `Way` goes up by."""
        return self.by_answer if way.start is not None else self.by_both


def expectations(auto, answers) -> Worth:
    """What an `Auto` expects of `Answers`."""
    scales = answers.scales
    (S, n), by_router, by_both = answers.score.shape, None, None

    def table(known, weights):
        out = np.full((S, S, n), -np.inf)
        for a, asked in enumerate(scales):
            for s in range(a, S):
                out[a, s] = _logistic(known(a) @ np.array(weights[asked, scales[s]]))
        return out

    if auto.of_router and answers.expected is not None:
        by_router = np.array([_logistic(_routed(answers) @ np.array(auto.of_router[scale])) for scale in scales])
        by_both = table(lambda a: _both(answers, a), auto.of_both)
    return Worth(table(lambda a: answers.known[a], auto.of_answer), by_router, by_both)


def _logistic(x):
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


def follow(way, answers, worth) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a `Way` does with each question, as `Auto.first` and `Auto.next` would have it.

    Args:
      way: `Way`.
      answers: `Answers`.
      worth: `Worth`.

    Returns:
      `[n]` each: the number of the budget whose answer counts, the tokens of all that were tried, its score, and the
      mean seconds of all that were tried.
    """
    S, n = answers.score.shape
    cost, each = way.price * np.array(answers.scales)[:, None], np.arange(n)
    if way.start is not None:
        at = np.full(n, answers.scales.index(way.start))
    else:
        at = (worth.by_router - cost).argmax(axis=0)
    tokens, seconds = answers.tokens[at, each].copy(), answers.seconds[at].copy()
    for _ in range(S if way.climbs else 0):
        promise = worth.climbing(way)[at, :, each].T - np.where(np.arange(S)[:, None] == at, 0.0, cost)  # [S, n]
        up = promise.argmax(axis=0)
        if (up == at).all():
            break
        tokens += np.where(up == at, 0.0, answers.tokens[up, each])
        seconds += np.where(up == at, 0.0, answers.seconds[up])
        at = up
    return at, tokens, answers.score[at, each], seconds


def point(way, answers, worth) -> Point:
    """What a `Way` takes and reaches."""
    _, tokens, score, _ = follow(way, answers, worth)
    return Point(way, float(tokens.mean()), float(score.mean()))


def report(auto, answers) -> dict:
    """What fixed budgets, each way and the oracle take and reach, on questions that nothing was fitted on.

    Args:
      auto: `Auto`.
      answers: `Answers`, at the budgets that it was fitted to.

    Returns:
      a dict, in which a point has `tokens` and `accuracy`, and but for the oracle `seconds`, which of a way are those
      of the budgets that it tries, as long as each took on its own:

      fixed: list of points with `scale` and the interval `low`, `high`.
      oracle, and each name of `auto.curves`: list of points, from few tokens to many.
      chosen: for each way the point that its fitting chose, with an interval, and its `kinds` of question.
      gap_closed: for each way the share of the area between the fixed budgets and the oracle, over the logarithm of
        tokens, that lies below its curve.
      calibration: for each way the expected calibration error of the confidence in the answers that it gives.
      tokens_at: for each way and each fixed budget but the smallest, the tokens at which it is as accurate.

    Raises:
      ValueError: answers at other budgets.
    """
    if answers.scales != auto.scales:
        raise ValueError(f"auto was fitted to the budgets {auto.scales}, and these are answers at {answers.scales}")
    worth = expectations(auto, answers)
    fixed = []
    for s, scale in enumerate(answers.scales):
        accuracy, low, high = mean_interval(answers.score[s], answers.pictures)
        tokens, seconds = float(answers.tokens[s].mean()), float(answers.seconds[s])
        fixed.append(
            {"scale": scale, "tokens": tokens, "accuracy": accuracy, "low": low, "high": high, "seconds": seconds}
        )
    of_fixed = [(p["tokens"], p["accuracy"]) for p in fixed]
    oracle = oracle_frontier(answers.score, answers.tokens)
    told = {"fixed": fixed, "oracle": [{"tokens": float(t), "accuracy": float(a)} for t, a in oracle]}
    told |= {"chosen": {}, "gap_closed": {}, "calibration": {}, "tokens_at": {}}
    for name, ways in auto.curves.items():
        if None in {way.start for way in ways} and answers.expected is None:
            continue
        told[name] = [_told(way, answers, worth) for way in ways]
        curve = [(p["tokens"], p["accuracy"]) for p in told[name]]
        told["gap_closed"][name] = gap_closed(of_fixed, curve, oracle)
        told["tokens_at"][name] = {str(p["scale"]): tokens_for(hull(curve), p["accuracy"]) for p in fixed[1:]}
        chosen = _told(auto.ways[name], answers, worth)
        at, tokens, score, _ = follow(auto.ways[name], answers, worth)
        _, chosen["low"], chosen["high"] = mean_interval(score, answers.pictures)
        chosen["kinds"] = {
            kind: {"tokens": float(tokens[of].mean()), "accuracy": float(score[of].mean())}
            for kind in sorted(set(answers.kinds))
            for of in [answers.kinds == kind]
        }
        told["chosen"][name] = chosen
        each = np.arange(len(at))
        way = auto.ways[name]
        sure = worth.climbing(way)[at, at, each] if way.climbs else worth.by_router[at, each]
        told["calibration"][name] = calibration_error(sure, score)
    return told


def _told(way, answers, worth):
    _, tokens, score, seconds = follow(way, answers, worth)
    return {"tokens": float(tokens.mean()), "accuracy": float(score.mean()), "seconds": float(seconds.mean())}


def fit_to(model, found, task) -> Auto:
    """Fits `scale="auto"` of a model to an `Evaluation` of it at fixed budgets.

    Args:
      model: the `Model`.
      found: `Evaluation`.
      task: of it.

    Raises:
      ValueError: see `check_budgets` and `collect`.
    """
    asked, runs = found.asked[task], found.runs[task]
    check_budgets(model, [int(scale) for scale in runs if scale.isdigit()])
    about = {"task": task, "split": asked.split, "folder": asked.folder, "digest": digest(asked.questions)}
    return fit(collect(runs), about, model.step)


def check_budgets(model, budgets):
    """Raises ValueError if nothing can be fitted to answers of a `Model` at these numbers of visual tokens."""
    if len(set(budgets)) < 2:
        raise ValueError(
            "a model chooses between budgets, so that answers at two or more are needed: --scales all, of a model "
            "that was trained at several, as M3 is"
        )
    if model.has_router and set(budgets) != set(model.scales):
        known, asked = (", ".join(map(str, sorted(of))) for of in (model.scales, budgets))
        raise ValueError(
            f"the router knows the trained budgets, {known}, so that these have to be asked at, and not {asked}: "
            "--scales all"
        )


def is_fitted_on(auto, task, asked) -> bool:
    """Whether an `Auto` was fitted on questions among those that are asked, an `Asked` of the task of that name."""
    about = auto.about
    if about.get("digest") == digest(asked.questions):
        return True
    return (about.get("task"), about.get("split"), about.get("folder")) == (task, asked.split, asked.folder)


def report_words(told) -> str:
    """What `report` found, a line for each way."""
    best = max(told["fixed"], key=lambda p: p["accuracy"])
    lines = [f"the best fixed budget, {best['scale']} visual tokens: accuracy {best['accuracy']:.4f}"]
    for name, point in told["chosen"].items():
        lines.append(
            f"  {name:<8} {point['tokens']:.2f} visual tokens a question, accuracy {point['accuracy']:.4f}, "
            f"{told['gap_closed'][name]:.2f} of the gap to the oracle closed, "
            f"calibration error {told['calibration'][name]:.3f}"
        )
    return "\n".join(lines)


def words(auto) -> str:
    """What was fitted, for whoever reads it."""
    about = auto.about
    best = f"{about['questions']:,} questions, whose best accuracy at one budget is {about['accuracy']:.4f}"
    lines = [f"auto was fitted to {best}"]
    for name, way in auto.ways.items():
        begins = "begins where the router says" if way.start is None else f"begins at {way.start}"
        goes = "goes up when unsure" if way.climbs else "never goes up"
        taken = ", and is what scale auto takes" if name == auto.use else ""
        told = f"{about[name]['tokens']:.2f} visual tokens a question, accuracy {about[name]['accuracy']:.4f}"
        lines.append(f"  {name:<8} {told}: {begins}, {goes}{taken}")
    return "\n".join(lines)
