"""The board of effects: rows from the runs that are there, mean and spread over seeds, and its picture."""

import json
import pathlib
import re

import pytest

from lmm_jax.tools import effects

ROOT = pathlib.Path(__file__).parents[2]
BOARD = ROOT / "configs/README.md"


def test_a_row_shows_mean_spread_minutes_and_commit_of_the_runs_that_are_there(tmp_path):
    for seed, read in enumerate((0.9, 0.94, 0.95)):
        folder = tmp_path / f"deepstack-{seed}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"digits": {"9": {"read": read}}}))
        logged = [{"step": step, "loss": 1.0, "seconds_per_step": 0.1 * (seed + 1)} for step in (500, 1000)]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in logged))
    found = effects.collect(tmp_path)
    assert [(row.run, [run.read for run in runs]) for row, runs in found] == [("deepstack", [0.9, 0.94, 0.95])]
    table = effects.table(found, "abc1234")
    assert "| 9 | 0.930 | 0.900–0.950 | 3 | 5.0 | abc1234 | " in table  # 1,000 steps of 0.3 s, the slowest
    assert effects.read_board(table) == [
        effects.Result("DeepStack", "DeepStack-L: its stacks added", 9, 0.93, 0.9, 0.95)
    ]


def test_a_run_without_metrics_has_no_minutes(tmp_path):
    (tmp_path / "low-0").mkdir()
    (tmp_path / "low-0/evaluation.json").write_text(json.dumps({"digits": {"9": {"read": 0.5}}}))
    assert "| 1 | not known |" in effects.table(effects.collect(tmp_path), "abc1234")


def test_the_board_holds_every_row_and_a_picture_is_drawn_of_it(tmp_path):
    results = effects.read_board(BOARD.read_text())
    assert {(r.effect, r.label, r.context) for r in results} == {
        (row.effect, row.label, row.context) for row in effects.ROWS
    }
    assert all(r.low <= r.mean <= r.high for r in results)
    (tmp_path / "README.md").write_text(BOARD.read_text())
    effects.main(tmp_path / "README.md")
    assert (tmp_path / "effects.png").stat().st_size > 10_000


def test_a_board_that_cannot_be_read_is_refused_by_its_row():
    with pytest.raises(ValueError, match="no table with the columns effect, trained"):
        effects.read_board("nothing")
    with pytest.raises(ValueError, match="cannot be read.*low resolution"):
        effects.read_board(BOARD.read_text().replace("0.583–0.590", "about half"))


def test_every_row_has_a_run_of_the_script_at_its_scale():
    script = (ROOT / "launch/effects.sh").read_text()
    runs = dict(re.findall(r"^ +(\w+) +(?:digits|pages) +\S+ +(\S+)$", script, re.M))
    assert {row.run for row in effects.ROWS} == runs.keys() - {"pages"}  # what others start from
    for row in effects.ROWS:
        assert runs[row.run] == "all" or str(row.scale) in runs[row.run].split(",")
