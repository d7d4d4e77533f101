"""Metrics of a run: what is written, what is read after a kill and a resume, and what is shown without a terminal."""

import json
import math
import sys
import types

import pytest

from lmm_jax import strict_json
from lmm_jax.training.metrics import MetricWriter, Progress, read_metrics


def config(**log):
    return types.SimpleNamespace(log=types.SimpleNamespace(**({"tensorboard": False, "wandb": False} | log)))


def write(workdir, rows, **options):
    writer = MetricWriter(workdir, config(), **options)
    for step, values in rows:
        writer.write(step, values)
    writer.close()


def test_rows_are_lines_and_a_continued_run_adds_its_own(tmp_path):
    write(tmp_path, [(1, {"loss": 2.5, "loss/9": 2.0})])
    write(tmp_path, [(2, {"loss": 1.5})])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.5, "loss/9": 2.0}, {"step": 2, "loss": 1.5}]


def test_of_a_step_that_was_taken_again_the_later_row_counts(tmp_path):
    """A killed run goes on from a checkpoint before its last steps. Validation has rows of its own."""
    write(tmp_path, [(1, {"loss": 5.0}), (2, {"loss": 4.0}), (2, {"validation_loss": 9.0}), (3, {"loss": 3.0})])
    write(tmp_path, [(2, {"loss": 4.5}), (2, {"validation_loss": 8.0})])
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.5},
        {"step": 2, "validation_loss": 8.0},
        {"step": 3, "loss": 3.0},
    ]


def test_what_is_no_finite_number_is_null_in_the_file_and_nan_for_who_reads_it(tmp_path):
    write(tmp_path, [(1, {"loss": float("nan"), "loss/9": float("-inf"), "rate": 0.5})])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert strict_json.parse(text) == {"step": 1, "loss": None, "loss/9": None, "rate": 0.5}
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"]) and math.isnan(row["loss/9"]) and row["rate"] == 0.5


def test_half_a_line_is_left_out(tmp_path):
    write(tmp_path, [(1, {"loss": 5.0})])
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 5.0}]


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path, [(1, {"loss": 5.0})], active=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"config.log.{name} needs {package}: pip install 'lmm_jax\[{name}\]'"):
        MetricWriter(tmp_path, config(**{name: True}))


def test_without_a_terminal_progress_is_lines_with_the_time_left(capsys, monkeypatch):
    clock = iter([100.0, 130.0])  # thirty seconds for three steps
    monkeypatch.setattr("lmm_jax.training.metrics.time.monotonic", lambda: next(clock))
    progress = Progress(start=4, steps=19)
    progress.show(7, {"loss": 1.23456, "tokens_per_second": 12345.6})
    progress.close()
    assert capsys.readouterr().out == "step 7/19: loss 1.2346, 12,346 tokens/s, 2m00s left\n"


def test_other_processes_say_nothing(capsys):
    progress = Progress(0, 2, active=False)
    progress.advance()
    progress.show(1, {"loss": 1.0, "tokens_per_second": 1.0})
    progress.note("a word")
    progress.close()
    assert capsys.readouterr() == ("", "")
