"""The oracle: what each question would have needed, had one known the answer. numpy alone.

As M3's author defines it: a question is counted at the smallest budget at which its answer is right, and one that is
wrong at every budget at the smallest budget there is. Where scores are graded, it is the best score at the fewest
tokens that reach it. The oracle is an upper bound that no system reaches, as it looks at the truth.
"""

import dataclasses

import numpy as np

from lmm_jax.evaluation import statistics

AUTO = "auto"  # among runs: answers at budgets that were chosen for each question
RIGHT = 0.5  # a score of at least this counts as right, where answers are called right or wrong


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What a set of questions needs.

    Attributes:
      budgets: visual tokens of a picture, ascending.
      accuracy: mean score of the best answer to each question.
      tokens: mean smallest budget, as M3 reports it: tokens of a picture, however many pictures a question has.
      visual_tokens: mean positions of pictures in the sequence at these budgets, of all pictures of a question.
      smallest: `[n]`, the smallest sufficient budget of each question: that of its best score; the smallest there is
        where the score is 0 at all of them.
      solved: `[n]` bool, whether any score is above 0.
      share: of each budget, the share of questions that are solved and for which it is the smallest sufficient one.
        What is missing from 1 is wrong everywhere.
      curve: of each budget, `(tokens, accuracy)` of the oracle that has this budget and the smaller ones.
    """

    budgets: tuple[int, ...]
    accuracy: float
    tokens: float
    visual_tokens: float
    smallest: np.ndarray
    solved: np.ndarray
    share: tuple[float, ...]
    curve: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class SampleFall:
    """A question that is right at few tokens and wrong at all larger budgets.

    Attributes:
      place: of the question among the records of each run.
      right_at: the largest budget at which it is right.
      wrong_at: all budgets above.
    """

    place: int
    right_at: int
    wrong_at: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KindFall:
    """A kind of question whose accuracy falls significantly from a budget to a larger one.

    Attributes:
      kind: None for all questions together.
      few, many: budgets.
      questions: of the kind.
      difference, low, high: accuracy at `many` minus that at `few`, negative, with its 95 % interval.
      p: of the paired test.
    """

    kind: str | None
    few: int
    many: int
    questions: int
    difference: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True)
class Falls:
    """What gets worse with more tokens.

    Attributes:
      samples: questions, those first that are wrong at the most budgets after a right one.
      gains: how many questions do the opposite: wrong at the smallest budget, right at a larger one.
      kinds: of each kind whose accuracy falls the pair of budgets between which it falls most; all together first.
    """

    samples: tuple[SampleFall, ...]
    gains: int
    kinds: tuple[KindFall, ...]


def budgets(runs) -> list[int]:
    """The fixed budgets of runs, ascending; "auto" is none."""
    return sorted(int(scale) for scale in runs if scale != AUTO)


def score_table(runs) -> np.ndarray:
    """Scores `[S, n]` of the runs at fixed budgets, ascending.

    Args:
      runs: `{str(scale): [Record]}`, the same questions in the same order in each.

    Raises:
      ValueError: no run at a fixed budget, runs of different questions, or answers without a score of their own.
    """
    scales = budgets(runs)
    if not scales:
        raise ValueError("an oracle chooses among fixed budgets, and there is no run at one; name some by --scales")
    first = runs[str(scales[0])]
    if not first:
        raise ValueError("there are no answers, so that there is nothing to choose among")
    asked = [(record.number, record.id, record.question) for record in first]
    for scale in scales[1:]:
        found = [(record.number, record.id, record.question) for record in runs[str(scale)]]
        if found != asked:
            differ = next((n for n, pair in enumerate(zip(asked, found, strict=False)) if pair[0] != pair[1]), None)
            what = (
                f"{len(asked):,} and {len(found):,} answers" if differ is None else f"answer {differ} is of another"
            )
            raise ValueError(f"the runs at {scales[0]} and {scale} tokens are of different questions: {what}")
    unscored = sum(record.score is None for scale in scales for record in runs[str(scale)])
    if unscored:
        raise ValueError(
            f"{unscored:,} answers have no score of their own: either the truth is not in the files, or the task "
            "scores all answers at once; an oracle needs a score of each answer"
        )
    return np.array([[record.score for record in runs[str(scale)]] for scale in scales], np.float64)


def find_oracle(runs) -> Oracle:
    """The oracle over all questions of runs; arguments and errors as of `score_table`."""
    return _oracle(budgets(runs), score_table(runs), visual_token_table(runs))


def by_kind(runs) -> dict[str, Oracle]:
    """The oracle over the questions of each kind, sorted by name; see `find_oracle`."""
    scales, scores, visual = budgets(runs), score_table(runs), visual_token_table(runs)
    return {kind: _oracle(scales, scores[:, of], visual[:, of]) for kind, of in places_of_kinds(runs).items()}


def places_of_kinds(runs) -> dict[str, np.ndarray]:
    """Of each kind of question, sorted by name, the places of its questions among the records of a run."""
    kinds = np.array([record.kind for record in runs[str(budgets(runs)[0])]], object)
    return {kind: np.flatnonzero(kinds == kind) for kind in sorted(set(kinds))}


def visual_token_table(runs) -> np.ndarray:
    """Positions of pictures `[S, n]` at the fixed budgets, ascending."""
    return np.array([[r.visual_tokens for r in runs[str(scale)]] for scale in budgets(runs)], np.float64)


def _oracle(scales, scores, visual):
    best = scores.argmax(0)  # the first of equal scores, thus the fewest tokens
    tokens, solved = np.array(scales), scores.max(0) > 0
    share = [float(((best == s) & solved).mean()) for s in range(len(scales))]
    among = [scores[: s + 1].argmax(0) for s in range(len(scales))]
    curve = [(float(tokens[b].mean()), float(np.take_along_axis(scores, b[None], 0).mean())) for b in among]
    return Oracle(
        budgets=tuple(scales),
        accuracy=curve[-1][1],
        tokens=curve[-1][0],
        visual_tokens=float(np.take_along_axis(visual, best[None], 0).mean()),
        smallest=tokens[best],
        solved=solved,
        share=tuple(share),
        curve=tuple(curve),
    )


def falls(runs, seed=0) -> Falls:
    """What is right at few tokens and wrong at more: questions one by one, and kinds of them.

    A single question falls by chance too, as the opposite happens by chance, which `gains` counts. A kind is named
    where the paired difference between two budgets passes a sign-flip test at 5 %, corrected by Holm for all pairs of
    budgets and kinds that are looked at.

    Args:
      runs: see `score_table`.
      seed: of the tests.

    Raises:
      ValueError: see `score_table`.
    """
    scales, scores = budgets(runs), score_table(runs)
    right = scores >= RIGHT
    last = np.where(right.any(0), len(scales) - 1 - right[::-1].argmax(0), len(scales) - 1)
    falling = sorted(np.flatnonzero(last < len(scales) - 1), key=lambda n: (last[n], n))
    samples = [SampleFall(int(n), scales[last[n]], tuple(scales[last[n] + 1 :])) for n in falling]
    gains = int((right.any(0) & ~right[0]).sum())
    pictures = statistics.of_records(runs[str(scales[0])])
    places = places_of_kinds(runs)
    looked_at = {None: np.arange(scores.shape[1]), **(places if len(places) > 1 else {})}
    found = [
        KindFall(kind, scales[few], scales[many], len(of), *_difference(scores, few, many, of, pictures, seed))
        for kind, of in looked_at.items()
        for few in range(len(scales))
        for many in range(few + 1, len(scales))
    ]
    passed = [fall for fall, holds in zip(found, statistics.holm([f.p for f in found]), strict=True) if holds]
    worst = {}
    for fall in sorted(passed, key=lambda fall: fall.difference):
        if fall.difference < 0:
            worst.setdefault(fall.kind, fall)
    kinds = [worst[kind] for kind in looked_at if kind in worst]
    return Falls(tuple(samples), gains, tuple(kinds))


def _difference(scores, few, many, of, pictures, seed):
    return statistics.paired_difference(scores[few, of], scores[many, of], pictures[of], seed)
