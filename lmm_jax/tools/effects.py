"""The board of effects: its rows from the runs of `launch/effects.sh`, and its picture.

python -m lmm_jax.tools.effects FOLDER                    # prints the rows of its runs, draws FOLDER/effects.png
python -m lmm_jax.tools.effects FOLDER configs/README.md  # puts them into the board in this file, and draws that
python -m lmm_jax.tools.effects configs/README.md         # draws the board in this file, beside it
"""

import dataclasses
import datetime
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
from etils import epath

from lmm_jax.tools.plots import draw_effects
from lmm_jax.training.metrics import read_metrics

SEEDS = 5  # that a row should have
DISAGREE = 0.05  # seeds of which the best and the worst differ by more than this share do


@dataclasses.dataclass(frozen=True)
class Row:
    """What was trained, and at how many visual tokens it was asked.

    Attributes:
      effect: what is shown, mostly a paper.
      label: what was trained, or how it was asked.
      run: name of the folders of `launch/effects.sh`, without the seed.
      scale: token budget at which it was evaluated, which is how many visual tokens stand in the sequence; "auto"
        where the model chose, whose tokens are the mean that was counted.
      kind: of question whose score is shown: "read", or "all" for the mean over all questions.
    """

    effect: str
    label: str
    run: str
    scale: int | str
    kind: str = "read"


@dataclasses.dataclass(frozen=True)
class Result:
    """One point of the picture.

    Attributes:
      effect, label: see `Row`.
      tokens: visual tokens in the sequence.
      mean, low, high: share that is right, over the seeds.
      values: of each seed; () if they are not known.
    """

    effect: str
    label: str
    tokens: float
    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()

    @property
    def disagree(self) -> bool:
        """Whether the seeds differ by more than `DISAGREE`."""
        return self.high - self.low > DISAGREE + 1e-9


M3 = (1, 4, 9, 36)
CHOICE = (1, 4, 9, 18, 36)  # of which pooling cannot give 18
VIT = (1, 4, 16, 64)
CHOSEN, WHICH, WHICH_PAGES = "Tokens chosen by the model", "Which tokens", "Which tokens, pages"
ROWS = (
    Row("DeepStack", "low resolution", "low", 9),
    Row("DeepStack", "DeepStack-L: its stacks added", "deepstack", 9),
    Row("DeepStack", "DeepStack-V: in the encoder", "deepstack_v", 9),
    Row("DeepStack", "high resolution, all tokens in the sequence", "high", 36),
    *(Row("M3", "one model, all budgets", "m3", s) for s in M3),
    *(Row("M3", "one model a budget", f"only_{s}", s) for s in M3),
    *(Row("M3", "trained at 36, pooled", "only_36", s) for s in M3),
    Row("ConvLLaVA", "3 stages, 32 px", "stage3_32", 4),
    Row("ConvLLaVA", "a stage more, 64 px", "stage4_64", 4),
    Row("ConvLLaVA", "3 stages, 64 px", "stage3_64", 16),
    *(Row(CHOSEN, "one budget for all questions", "m3", s, "all") for s in M3),
    Row(CHOSEN, "a cascade: goes up when unsure", "cascade", "auto", "all"),
    Row(CHOSEN, "with a router", "routed", "auto", "all"),
    *(Row(WHICH, "VisionZip: the most attended to", "m3_zip", s) for s in CHOICE),
    *(Row(WHICH, "random cells", "m3_random", s) for s in CHOICE),
    *(Row(WHICH, "evenly spaced cells", "m3_strided", s) for s in CHOICE),
    *(Row(WHICH_PAGES, "nested pooling (M3)", "pages_vit", s) for s in VIT),
    *(Row(WHICH_PAGES, "VisionZip: the most attended to", "pages_zip", s) for s in VIT),
    *(Row(WHICH_PAGES, "random cells", "pages_random", s) for s in VIT),
    *(Row(WHICH_PAGES, "evenly spaced cells", "pages_strided", s) for s in VIT),
)
# Rows of one effect that stand in the picture of another, to compare with: the models are the same.
BESIDE = {WHICH: ("M3", "one model, all budgets")}
COLUMNS = (
    *("effect", "trained", "visual tokens", "right", "lowest–highest", "each seed"),
    *("seeds", "minutes of a run", "commit", "date"),
)
BETWEEN = " · "  # the budgets of one row
UNKNOWN = "–"  # values that were not kept; minutes of what needs no training
DIFFER = " (disagree)"  # behind a range


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of a row.

    Attributes:
      seed: of the run.
      right: share that is right of what the row shows.
      tokens: visual tokens in the sequence, the mean of all questions.
      minutes: that training took, validation and saving left out; None where nothing was trained.
      commit: of the code that it was evaluated with; None if that is not known.
      day: on which it was evaluated.
    """

    seed: int
    right: float
    tokens: float
    minutes: float | None
    commit: str | None
    day: datetime.date


def collect(folder) -> list[tuple[Row, list[Run]]]:
    """The runs of each row, one a seed that is there, by seed; rows without any are left out."""
    found = []
    for row in ROWS:
        runs = [_read_run(row, path.parent) for path in epath.Path(folder).glob(f"{row.run}-*/evaluation.json")]
        runs = sorted((run for run in runs if run is not None), key=lambda run: run.seed)
        if runs:
            found.append((row, runs))
    return found


def _read_run(row, workdir):
    """The `Run` of a row in its folder; None if it was not asked at the row's scale."""
    path = workdir / "evaluation.json"
    (by_scale,) = json.loads(path.read_text()).values()
    values = by_scale.get(str(row.scale), {})
    right = _of_all(values) if row.kind == "all" else values.get(row.kind)
    if right is None:
        return None
    commit = (workdir / "commit").read_text().strip() if (workdir / "commit").exists() else None
    return Run(
        seed=int(workdir.name.rpartition("-")[2]),
        right=right,
        tokens=values["tokens"] if row.scale == "auto" else row.scale,
        minutes=_minutes(workdir),
        commit=commit or None,
        day=datetime.date.fromtimestamp(path.stat().mtime),
    )


def _of_all(values):
    """Mean score over the questions of all kinds, each question counting alike; None if they were not counted."""
    kinds = {kind: values[f"n_{kind}"] for kind in values if f"n_{kind}" in values}
    return sum(values[kind] * n for kind, n in kinds.items()) / sum(kinds.values()) if kinds else None


def results(found) -> list[Result]:
    """Mean, range and values of the seeds of what `collect` found."""
    out = []
    for row, runs in found:
        right = tuple(run.right for run in runs)
        tokens = float(np.mean([run.tokens for run in runs]))
        out.append(Result(row.effect, row.label, tokens, float(np.mean(right)), min(right), max(right), right))
    return out


def rows_of(found, commit) -> dict[tuple[str, str], str]:
    """Lines of the board in Markdown by effect and label, one for each with its budgets side by side.

    Args:
      found: what `collect` returned.
      commit: of the code that runs were made with which do not say so.
    """
    lines = {}
    for (effect, label), group in itertools.groupby(found, key=lambda item: (item[0].effect, item[0].label)):
        group = list(group)
        points, runs = results(group), [run for _, of_row in group for run in of_row]
        minutes = [run.minutes for run in runs if run.minutes is not None]
        cells = (
            effect,
            label,
            BETWEEN.join(_number(p.tokens) for p in points),
            BETWEEN.join(f"{p.mean:.3f}" for p in points),
            BETWEEN.join(f"{p.low:.3f}–{p.high:.3f}{DIFFER if p.disagree else ''}" for p in points),
            BETWEEN.join(" ".join(f"{value:.3f}" for value in p.values) for p in points),
            BETWEEN.join(sorted({_seeds(len(of_row)) for _, of_row in group})),
            f"{max(minutes):.1f}" if minutes else UNKNOWN,
            ", ".join(dict.fromkeys(run.commit or commit for run in runs)),
            max(run.day for run in runs).isoformat(),
        )
        lines[effect, label] = _line(cells)
    return lines


def _number(tokens):
    return f"{tokens:.0f}" if tokens == round(tokens) else f"{tokens:.2f}"


def _seeds(count):
    return str(count) if count >= SEEDS else f"{count} of {SEEDS}"


def table(lines) -> str:
    """The board of the lines that `rows_of` or `_lines` gave, in the order of `ROWS`."""
    order = dict.fromkeys((row.effect, row.label) for row in ROWS)
    return "\n".join([_line(COLUMNS), "|---" * len(COLUMNS) + "|", *(lines[key] for key in order if key in lines)])


def updated(text, lines) -> str:
    """A Markdown text in whose board `lines`, see `rows_of`, stand in the place of those of the same name.

    Raises:
      ValueError: the text has no board.
    """
    old = _lines(text)
    before, _, rest = text.partition(_line(COLUMNS))
    behind = list(itertools.dropwhile(lambda line: line.startswith("|"), rest.lstrip("\n").split("\n")))
    return before + table(old | lines) + "\n" + "\n".join(behind)


def _lines(text) -> dict[tuple[str, str], str]:
    """Lines of the board in a Markdown text, by effect and label; ValueError if there is none."""
    lines = iter(text.splitlines())
    if _line(COLUMNS) not in lines:  # which also moves on to the line after it
        raise ValueError(f"no table with the columns {', '.join(COLUMNS)}")
    next(lines)
    found = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return {tuple(_cells(line)[:2]): line for line in found}


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def read_board(text) -> list[Result]:
    """The board in a Markdown text.

    Raises:
      ValueError: the text has no table with the board's columns, or a row that cannot be read.
    """
    out = []
    for line in _lines(text).values():
        try:
            out += _read_row(*_cells(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"a row of the board cannot be read ({error}): {line}") from error
    return out


def _read_row(effect, label, tokens, means, spans, values, *_):
    """The `Result`s of a line's cells."""
    budgets = [cell.split(BETWEEN) for cell in (tokens, means, spans)]
    each = values.split(BETWEEN) if values != UNKNOWN else [""] * len(budgets[0])
    out = []
    for count, mean, span, of_seeds in zip(*budgets, each, strict=True):
        low, high = map(float, span.removesuffix(DIFFER).split("–"))
        found = tuple(map(float, of_seeds.split()))
        if found and (abs(min(found) - low) > 1e-6 or abs(max(found) - high) > 1e-6):
            raise ValueError(f"{span} is not the range of {of_seeds}")
        result = Result(effect, label, float(count), float(mean), low, high, found)
        if result.disagree != span.endswith(DIFFER):
            raise ValueError(
                f"{span}: seeds that differ by more than {DISAGREE} say '{DIFFER.strip()}', others do not"
            )
        out.append(result)
    return out


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _minutes(workdir):
    if not (workdir / "metrics.jsonl").exists():
        return None
    steps, seconds = 0, 0.0
    for row in read_metrics(workdir):
        if "seconds_per_step" in row:
            seconds += row["seconds_per_step"] * (row["step"] - steps)
            steps = row["step"]
    return seconds / 60 if steps else None


def _commit():
    """The commit of this clone, with "-dirty" where files are changed."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=pathlib.Path(__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "not known"


def main(path, board=None):
    """Draws the board in the file `path`; prints the rows of a folder of runs and draws them, or updates `board`."""
    path = epath.Path(path)
    if path.is_file():
        print(draw_effects(read_board(path.read_text()), path.parent, BESIDE))
        return
    found = collect(path)
    lines = rows_of(found, _commit())
    print(table(lines))
    if board is None:
        print(draw_effects(results(found), path, BESIDE))
        return
    board = epath.Path(board)
    board.write_text(updated(board.read_text(), lines))
    main(board)


if __name__ == "__main__":
    main(*sys.argv[1:3])
