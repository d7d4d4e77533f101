"""The table and the picture of `launch/effects.sh`: python -m lmm_jax.tools.effects FOLDER."""

import dataclasses
import itertools
import json
import os
import sys

import numpy as np
from etils import epath

from lmm_jax.tools.plots import draw_effects


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

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


def collect(folder) -> list[tuple[Row, list[float]]]:
    """Accuracy of reading of each row, one value a seed that is there; rows without any are left out."""
    found = []
    for row in ROWS:
        values = []
        for path in sorted(epath.Path(folder).glob(f"{row.run}-*/evaluation.json")):
            (by_scale,) = json.loads(path.read_text()).values()
            values.append(by_scale[str(row.scale)]["read"])
        if values:
            found.append((row, values))
    return found


def table(found) -> str:
    """Markdown: a line for each kind of training, its budgets side by side; mean and range over the seeds."""
    lines = [
        "| effect | trained | visual tokens | digits read right | lowest–highest | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for (effect, label), group in itertools.groupby(found, key=lambda item: (item[0].effect, item[0].label)):
        rows, values = zip(*group, strict=True)
        columns = [
            [str(row.context) for row in rows],
            [f"{np.mean(v):.3f}" for v in values],
            [f"{min(v):.3f}–{max(v):.3f}" for v in values],
            sorted({str(len(v)) for v in values}),
        ]
        lines.append(f"| {effect} | {label} | {' | '.join(' · '.join(column) for column in columns)} |")
    return "\n".join(lines)


def main(folder):
    found = collect(folder)
    print(table(found))
    print(draw_effects(found, folder))


if __name__ == "__main__":
    main(os.fspath(sys.argv[1]))
