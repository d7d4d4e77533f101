"""The board of effects: its rows from the runs of `launch/effects.sh`, and its picture.

python -m lmm_jax.tools.effects FOLDER             # prints a row for each run there, draws FOLDER/effects.png
python -m lmm_jax.tools.effects configs/README.md  # draws the board that stands in this file, beside it
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


@dataclasses.dataclass(frozen=True)
class Row:
    """What was trained, and at how many visual tokens it was asked.

    Attributes:
      effect: what is shown, the paper.
      label: what was trained.
      run: name of the workdirs, without the seed.
      scale: token budget at which it was evaluated.
      context: visual tokens in the sequence.
    """

    effect: str
    label: str
    run: str
    scale: int
    context: int


@dataclasses.dataclass(frozen=True)
class Result:
    """One point of the picture.

    Attributes:
      effect, label, context: see `Row`.
      mean, low, high: share of digits read right, over the seeds.
    """

    effect: str
    label: str
    context: int
    mean: float
    low: float
    high: float


M3 = (1, 4, 9, 36)
ROWS = (
    Row("DeepStack", "low resolution", "low", 9, 9),
    Row("DeepStack", "DeepStack-L: its stacks added", "deepstack", 9, 9),
    Row("DeepStack", "DeepStack-V: in the encoder", "deepstack_v", 9, 9),
    Row("DeepStack", "high resolution, all tokens in the sequence", "high", 36, 36),
    *(Row("M3", "one model, all budgets", "m3", s, s) for s in M3),
    *(Row("M3", "one model a budget", f"only_{s}", s, s) for s in M3),
    *(Row("M3", "trained at 36, pooled", "only_36", s, s) for s in M3),
    Row("ConvLLaVA", "3 stages, 32 px", "stage3_32", 4, 4),
    Row("ConvLLaVA", "a stage more, 64 px", "stage4_64", 4, 4),
    Row("ConvLLaVA", "3 stages, 64 px", "stage3_64", 16, 16),
)
COLUMNS = (
    *("effect", "trained", "visual tokens", "digits read right", "lowest–highest"),
    *("seeds", "minutes of a run", "commit", "date"),
)
BETWEEN = " · "  # the budgets of one row


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed of a row.

    Attributes:
      read: share of digits read right.
      minutes: that training took, validation and saving left out; None if its metrics are not there.
      day: on which it was evaluated.
    """

    read: float
    minutes: float | None
    day: datetime.date


def collect(folder) -> list[tuple[Row, list[Run]]]:
    """The runs of each row, one a seed that is there; rows without any are left out."""
    found = []
    for row in ROWS:
        runs = []
        for path in sorted(epath.Path(folder).glob(f"{row.run}-*/evaluation.json")):
            (by_scale,) = json.loads(path.read_text()).values()
            day = datetime.date.fromtimestamp(path.stat().mtime)
            runs.append(Run(by_scale[str(row.scale)]["read"], _minutes(path.parent), day))
        if runs:
            found.append((row, runs))
    return found


def results(found) -> list[Result]:
    """Mean and range over the seeds of what `collect` found."""
    out = []
    for row, runs in found:
        read = [run.read for run in runs]
        out.append(Result(row.effect, row.label, row.context, float(np.mean(read)), min(read), max(read)))
    return out


def table(found, commit) -> str:
    """Lines of the board in Markdown, one for each kind of training with its budgets side by side.

    Args:
      found: what `collect` returned.
      commit: of the code that the runs were made with.
    """
    lines = [_line(COLUMNS), "|---" * len(COLUMNS) + "|"]
    for (effect, label), group in itertools.groupby(found, key=lambda item: (item[0].effect, item[0].label)):
        group = list(group)
        points, runs = results(group), [run for _, of_row in group for run in of_row]
        minutes = [run.minutes for run in runs if run.minutes is not None]
        cells = (
            effect,
            label,
            BETWEEN.join(str(p.context) for p in points),
            BETWEEN.join(f"{p.mean:.3f}" for p in points),
            BETWEEN.join(f"{p.low:.3f}–{p.high:.3f}" for p in points),
            BETWEEN.join(sorted({str(len(of_row)) for _, of_row in group})),
            f"{max(minutes):.1f}" if minutes else "not known",
            commit,
            max(run.day for run in runs).isoformat(),
        )
        lines.append(_line(cells))
    return "\n".join(lines)


def read_board(text) -> list[Result]:
    """The board in a Markdown text.

    Raises:
      ValueError: the text has no table with the board's columns, or a row that cannot be read.
    """
    lines = iter(text.splitlines())
    if _line(COLUMNS) not in lines:  # which also moves on to the line after it
        raise ValueError(f"no table with the columns {', '.join(COLUMNS)}")
    next(lines)
    out = []
    for line in itertools.takewhile(lambda line: line.startswith("|"), lines):
        effect, label, *columns = [cell.strip() for cell in line.strip("|").split("|")]
        try:
            for context, mean, span in zip(*(c.split(BETWEEN) for c in columns[:3]), strict=True):
                low, high = span.split("–")
                out.append(Result(effect, label, int(context), float(mean), float(low), float(high)))
        except ValueError as error:
            raise ValueError(f"a row of the board cannot be read ({error}): {line}") from error
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


def main(path):
    """Draws the board in the file `path`; of a folder of runs prints their rows and draws them."""
    path = epath.Path(path)
    if path.is_file():
        print(draw_effects(read_board(path.read_text()), path.parent))
        return
    found = collect(path)
    print(table(found, _commit()))
    print(draw_effects(results(found), path))


if __name__ == "__main__":
    main(sys.argv[1])
