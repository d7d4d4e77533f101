"""The table of effects: what is there, mean and spread over seeds, and the runs that the script trains."""

import json
import pathlib
import re

from lmm_jax.tools import effects

ROOT = pathlib.Path(__file__).parents[2]


def test_the_table_shows_mean_and_spread_of_the_runs_that_are_there(tmp_path):
    for seed, read in enumerate((0.9, 0.94, 0.95)):
        folder = tmp_path / f"deepstack-{seed}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"digits": {"9": {"read": read}}}))
    found = effects.collect(tmp_path)
    assert [(row.run, values) for row, values in found] == [("deepstack", [0.9, 0.94, 0.95])]
    assert "| 9 | 0.930 | 0.900–0.950 | 3 |" in effects.table(found)


def test_every_row_has_a_run_of_the_script_at_its_scale():
    script = (ROOT / "launch/effects.sh").read_text()
    runs = dict(re.findall(r"^ +(\w+) +(?:digits|pages) +\S+ +(\S+)$", script, re.M))
    assert {row.run for row in effects.ROWS} == runs.keys() - {"pages"}  # what others start from
    for row in effects.ROWS:
        assert runs[row.run] == "all" or str(row.scale) in runs[row.run].split(",")
