"""Two result files beside each other: is one better, on which questions, and what else differs between them."""

import collections
import dataclasses
from typing import Any

import numpy as np

from lmm_jax.config import ConfigError
from lmm_jax.evaluation import statistics
from lmm_jax.evaluation.records import Record

MUST_AGREE = ("task", "split", "metric")
# Of a header, what does not change how a question is answered or scored.
OF_A_RUN = {"format", "questions", "left_out", "missing", "limit", "date", *MUST_AGREE}
SHOWN = 20  # changed answers that are printed
CUT = 60  # characters of a text that is printed


@dataclasses.dataclass(frozen=True)
class Paired:
    """Scores of the same questions in two files.

    Attributes:
      questions: that both answered.
      first, second: mean scores.
      difference, low, high, p: second minus first, its 95 % interval and the p-value, see
        `statistics.paired_difference`.
      wins, losses: questions that score higher in the second file, and in the first.
    """

    questions: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    wins: int
    losses: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
      names: of the two files.
      task, split: of both.
      all: over all questions of both.
      kinds: over those of each kind, sorted by name.
      only: how many questions the first and the second file have alone.
      settings: `(key, first, second)` of all that differs between the headers; parts of a section as "section.key".
      changed: `(first, second)` records whose scores differ, losses before wins, the largest changes first.
      reworded: how many answers differ without a change of the score.
    """

    names: tuple[str, str]
    task: str
    split: str
    all: Paired
    kinds: dict[str, Paired]
    only: tuple[int, int]
    settings: tuple[tuple[str, Any, Any], ...]
    changed: tuple[tuple[Record, Record], ...]
    reworded: int


def compare(first, second, names=("A", "B"), seed=0) -> Comparison:
    """Compares two result files over the questions that both have.

    Questions are matched by id and text. Where a file has several alike, as questions without an id of their own,
    they are matched by their number too, which is the same only where both files have the same questions.

    Args:
      first, second: `(header, records)` as `records.read` gives them.
      names: of the files, for what is said of them.
      seed: of the intervals.

    Raises:
      ConfigError: files of unlike tasks, splits or metrics, without common questions, with questions that cannot be
        told apart, with other true answers to the same question, or without scores of single answers.
    """
    headers, records = (first[0], second[0]), (first[1], second[1])
    for key in MUST_AGREE:
        values = [header.get(key) for header in headers]
        if values[0] != values[1]:
            raise ConfigError(
                f"{names[0]} and {names[1]} cannot be compared: their {key} is {values[0]!r} and {values[1]!r}"
            )
    found = _by_key(records, names)
    common = [key for key in found[0] if key in found[1]]
    if not common:
        raise ConfigError(
            f"{names[0]} and {names[1]} have no question in common; compare answers to the same files and split"
        )
    pairs = [(found[0][key], found[1][key]) for key in common]
    _check(pairs, names)
    scores = np.array([[a.score, b.score] for a, b in pairs], np.float64).T
    pictures = statistics.of_records([a for a, _ in pairs])
    kinds = np.array([a.kind for a, _ in pairs], object)
    gain = scores[1] - scores[0]
    changed = [pairs[n] for n in np.argsort(gain, kind="stable") if gain[n] < 0]
    changed += [pairs[n] for n in np.argsort(-gain, kind="stable") if gain[n] > 0]
    return Comparison(
        names=tuple(names),
        task=headers[0].get("task"),
        split=headers[0].get("split"),
        all=_paired(*scores, pictures, seed),
        kinds={k: _paired(*scores[:, kinds == k], pictures[kinds == k], seed) for k in sorted(set(kinds))},
        only=tuple(len(of) - len(common) for of in found),
        settings=tuple(_differences(*headers)),
        changed=tuple(changed),
        reworded=sum(a.answer != b.answer and a.score == b.score for a, b in pairs),
    )


def _by_key(records, names):
    """The records of each of two files by what they are matched by."""
    keys = [[(record.id, record.question) for record in of] for of in records]
    if all(len(set(of)) == len(of) for of in keys):
        return [dict(zip(key, of, strict=True)) for key, of in zip(keys, records, strict=True)]
    numbered = [[(record.number, record.id, record.question) for record in of] for of in records]
    twice = [[key for key, count in collections.Counter(of).items() if count > 1] for of in numbered]
    for name, of in zip(names, twice, strict=True):
        if of:
            raise ConfigError(f"{name} has question number {of[0][0]} twice; it was put together of several files")
    if set(numbered[0]) != set(numbered[1]):
        raise ConfigError(
            f"several questions of {names[0]} or {names[1]} have the same id and text, and can only be matched by "
            "their number where both files have the same questions; evaluate both with the same data and --limit"
        )
    return [dict(zip(key, of, strict=True)) for key, of in zip(numbered, records, strict=True)]


def _check(pairs, names):
    other = [a for a, b in pairs if set(a.truths) != set(b.truths)]
    if other:
        raise ConfigError(
            f"{names[0]} and {names[1]} have other true answers to {len(other):,} of the same questions, the first "
            f"of them number {other[0].number}, {_cut(other[0].question)!r}; they were scored against different files"
        )
    for name, of in zip(names, zip(*pairs, strict=True), strict=True):
        unscored = sum(record.score is None for record in of)
        if unscored:
            raise ConfigError(
                f"{name} has {unscored:,} answers without a score of their own: the truth is not in its files, or "
                "the task scores all answers at once; only scores of single answers can be paired"
            )


def _paired(first, second, groups, seed):
    difference, low, high, p = statistics.paired_difference(first, second, groups, seed)
    wins, losses = int((second > first).sum()), int((second < first).sum())
    return Paired(len(first), float(first.mean()), float(second.mean()), difference, low, high, p, wins, losses)


def _differences(first, second):
    first, second = _flat(first), _flat(second)
    for key in dict.fromkeys([*first, *second]):
        if key.split(".")[0] not in OF_A_RUN and first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def _flat(header, prefix=""):
    """Sections of a header in one dict, with keys as "section.key"."""
    found = {}
    for key, item in header.items():
        found |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return found


def text(comparison) -> str:
    """A `Comparison` as a person reads it: the difference, by kind, what differs in the settings, what changed."""
    a, b = comparison.names
    whole = comparison.all
    lines = [
        f"{comparison.task}, split {comparison.split}: {whole.questions:,} questions that both files answer",
        f"  A  {a}  {whole.first:.3f}",
        f"  B  {b}  {whole.second:.3f}",
        f"  B - A = {_signed(whole)}: {_verdict(whole)}",
        f"  B is better on {whole.wins:,} questions, A on {whole.losses:,}; {comparison.reworded:,} answers are "
        "worded differently and score alike",
    ]
    for name, count in zip("AB", comparison.only, strict=True):
        if count:
            lines.append(f"  {count:,} questions are in {name} alone, and are left out")
    if len(comparison.kinds) > 1:
        width = max(4, *map(len, comparison.kinds))
        lines += ["", f"{'kind':<{width}}  questions       A       B   B - A     95 % interval"]
        for kind, of in comparison.kinds.items():
            interval = f"{of.low:+.3f} … {of.high:+.3f}"
            lines.append(
                f"{kind:<{width}}  {of.questions:>9,}  {of.first:.3f}   {of.second:.3f}  {of.difference:+.3f}  "
                f"{interval:>15}  {statistics.p_text(of.p)}"
            )
    lines += ["", "Settings that differ" + (":" if comparison.settings else ": none")]
    lines += [f"  {key}: {first!r} | {second!r}" for key, first, second in comparison.settings]
    if comparison.changed:
        shown = _spread(comparison.changed)
        more = f", {len(shown)} of {len(comparison.changed):,}" if len(shown) < len(comparison.changed) else ""
        lines += ["", f"Answers whose score changed{more}:"]
        for first, second in shown:
            lines.append(
                f"  {_cut(first.question)} (truth: {_cut(', '.join(first.truths))}; {first.id or first.number})"
            )
            lines.append(
                f"    A {first.score:.2f} {_cut(first.answer)!r}  ->  B {second.score:.2f} {_cut(second.answer)!r}"
            )
    return "\n".join(lines)


def _signed(paired):
    interval = f"{paired.low:+.3f} … {paired.high:+.3f}"
    return f"{paired.difference:+.3f}, 95 % interval {interval}, {statistics.p_text(paired.p)}"


def _verdict(paired):
    if paired.p > 1 - statistics.LEVEL:
        return "no difference that could not be chance"
    return f"{'B' if paired.difference > 0 else 'A'} is better"


def _spread(changed):
    """At most `SHOWN` of the changes: half of them from the losses, half from the wins, more where one has few."""
    losses = [pair for pair in changed if pair[1].score < pair[0].score]
    wins = changed[len(losses) :]
    lost = min(len(losses), max(SHOWN // 2, SHOWN - len(wins)))
    return [*losses[:lost], *wins[: SHOWN - lost]]


def _cut(words):
    """One line of a text, cut where it is long; a terminal's control characters as escapes."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(words))
    return line if len(line) <= CUT else line[: CUT - 1] + "…"
