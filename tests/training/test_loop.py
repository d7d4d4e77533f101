"""Runs as a user has them: killed, stopped, continued, refused."""

import json
import os
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax import config as c
from lmm_jax.data import digests
from lmm_jax.data.prepared import Prepared
from lmm_jax.training import loop, optimizer
from lmm_jax.training.bad_records import BadData
from lmm_jax.training.events import read_events
from lmm_jax.training.metrics import read_metrics
from lmm_jax.training.plan import check_stream

STEPS = ["--config.train.steps=24", "--config.train.save_every=4", "--config.train.log_every=1"]


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(path, pattern, process, seconds=120):
    """Waits until the file at `path` matches."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and re.search(pattern, path.read_text()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{path} never matched {pattern}")


@pytest.fixture(scope="module")
def uninterrupted(lmm_process, tiny_args, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    code, out, err = finish(lmm_process("train", *tiny_args, *STEPS, "--workdir", workdir, "--json"))
    assert code == 0, out + err
    return workdir, json.loads(out.splitlines()[-1])


def losses(workdir):
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.long) for how in (signal.SIGINT, signal.SIGTERM))],
)
def test_a_stopped_run_continues_as_if_nothing_had_happened(lmm_process, tiny_args, uninterrupted, tmp_path, how):
    """With a reader process, to which a scheduler and a terminal send what they send to the run."""
    command = ["train", *tiny_args, *STEPS, "--config.data.workers=1", "--workdir", tmp_path, "--json"]
    process = lmm_process(*command)
    wait_for(tmp_path / "metrics.jsonl", r'"step": 6,', process)
    if how == signal.SIGKILL:
        process.send_signal(how)
    else:
        os.killpg(process.pid, how)
    code, out, err = finish(process)  # at the end of its output: a reader that stayed would hold it open
    done = max(losses(tmp_path))
    assert done < 24, "the run ended before it was stopped"
    if how != signal.SIGKILL:
        assert code == 75 and f"step {done} is saved" in err and "Traceback" not in err, out + err
        assert ("Ctrl-C once more quits" in err) == (how == signal.SIGINT)
    code, out, err = finish(lmm_process(*command))
    assert code == 0, out + err
    continued = int(re.search(r"from step (\d+) of 24", out).group(1))
    assert continued <= done and continued % 4 == 0 if how == signal.SIGKILL else continued == done
    assert losses(tmp_path) == losses(uninterrupted[0])  # bit by bit, on the same devices
    assert json.loads(out.splitlines()[-1])["loss"] == uninterrupted[1]["loss"]


def test_metrics_and_config_are_in_the_workdir(uninterrupted, digits_folder):
    workdir, result = uninterrupted
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert {"loss", "loss/1", "loss/9", "grad_norm", "tokens_per_second", "input_wait"} <= rows[-2].keys() | rows[
        -1
    ].keys()
    assert result["step"] == 24 and result["tokens_per_second"] > 0
    config = c.read_config(workdir / "config.json")
    share = optimizer.schedule(config.optimizer, 24)
    for row in rows:  # the rate of the step's own update, and how often all 64 records were read by then
        assert row["learning_rate"] == pytest.approx(3e-3 * float(share(row["step"] - 1)), rel=1e-6)
        assert 0 < row["positions_used"] <= 1
    assert [rows[0]["epoch"], rows[7]["epoch"], rows[15]["epoch"]] == [1 / 8, 1, 2]  # 8 packs a step, a record each
    assert c.read_config(workdir / "config.json").train.steps == 24
    assert (workdir / "tokenizer.model").read_bytes() == (digits_folder / "tokenizer.model").read_bytes()
    assert (workdir / "loss.png").read_bytes()[1:4] == b"PNG"


def test_a_finished_run_says_so_and_another_config_is_refused(uninterrupted, tiny, capsys):
    workdir, result = uninterrupted
    again = lmm.train(tiny("train.steps=24", "train.save_every=4", "train.log_every=1", "mesh.data=-1"), workdir)
    assert "all 24 steps are done" in capsys.readouterr().out
    assert again["loss"] == result["loss"] and again["step"] == 24
    with pytest.raises(c.ConfigError, match=r"model.decoder.depth: was 3, now 2"):
        lmm.train(tiny("train.steps=24", "model.decoder.depth=2"), workdir)


def test_validation(tiny, tmp_path):
    result = lmm.train(tiny("train.steps=8", "train.eval_every=4", "train.eval_batches=2"), tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    scales = [rows[0][f"validation_loss/{s}"] for s in (1, 4, 9, 36)]
    np.testing.assert_allclose(rows[0]["validation_loss"], np.mean(scales), rtol=1e-6)
    assert result["validation_loss"] == rows[-1]["validation_loss"]


def test_validation_is_a_mean_over_targets_not_over_batches():
    """Batches of 2 and 6 targets, whose sums of losses are 6 and 2; nothing is of the second scale."""
    batches = [(np.array([6.0, 0.0]), np.array([2, 0])), (np.array([2.0, 0.0]), np.array([6, 0]))]
    losses, counts = loop.validate(lambda params, batch: batch, None, batches)
    assert losses.tolist() == [1, 0] and counts.tolist() == [8, 0]


@pytest.mark.long
def test_profile_and_tensorboard(tiny, tmp_path):
    lmm.train(tiny("train.steps=8", "train.log_every=2", "log.tensorboard=True"), tmp_path, profile=2)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert list(tmp_path.glob("events.out.tfevents*"))


def test_a_run_that_stays_not_finite_stops_and_names_its_records(tiny, tmp_path, monkeypatch):
    real = loop.init_state

    def broken(program):
        state = real(program)
        return state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))

    monkeypatch.setattr(loop, "init_state", broken)
    with pytest.raises(FloatingPointError, match=r"last 3 steps.*records \[\d+"):
        lmm.train(tiny("train.steps=8", "train.log_every=3", "train.max_skipped=3"), tmp_path)


def test_data_that_does_not_match_is_refused(tiny, tmp_path):
    with pytest.raises(c.ConfigError, match="pieces, model.decoder.vocab_size is 64"):
        lmm.train(tiny("model.decoder.vocab_size=64"), tmp_path)
    with pytest.raises(FileNotFoundError, match="lmm prepare"):
        lmm.train(tiny(f"data.path={tmp_path}"), tmp_path)


def test_another_stream_is_refused_with_the_difference(uninterrupted, tiny, tmp_path, digits_folder):
    copy = tmp_path / "data"
    shutil.copytree(digits_folder, copy)
    about = json.loads((copy / "prepared.json").read_text())
    (copy / "prepared.json").write_text(json.dumps(digests.sealed(about | {"fingerprint": "another"})))
    overrides = ("train.steps=24", "train.save_every=4", "train.log_every=1", f"data.path={copy}")
    with pytest.raises(
        c.ConfigError, match=r"another stream of data; nothing is continued\n  data: was \['.*another"
    ):
        lmm.train(tiny(*overrides), uninterrupted[0])
    # The same data in another place is the same stream.
    (copy / "prepared.json").write_text(json.dumps(about))
    assert lmm.train(tiny(*overrides), uninterrupted[0])["step"] == 24


def test_bad_records_are_counted_and_too_many_stop_the_run(tiny, tmp_path, monkeypatch):
    read = Prepared.__getitem__

    def broken(self, row):
        if row % 8 == 3 and self.split == "train":
            raise RuntimeError("Corrupted records file")
        return read(self, row)

    monkeypatch.setattr(Prepared, "__getitem__", broken)
    result = lmm.train(tiny("train.steps=8", "train.log_every=4"), tmp_path / "a")
    assert result["bad_records"] == 8  # one epoch of 64 rows
    lines = [json.loads(line) for line in (tmp_path / "a" / "bad_records.jsonl").read_text().splitlines()]
    assert sorted(line["record"] for line in lines) == list(range(3, 64, 8))
    assert np.isfinite(result["loss"])
    with pytest.raises(BadData, match="8 of 64 records could not be read"):
        lmm.train(tiny("train.steps=8", "data.max_bad_share=0.0007"), tmp_path / "b")


def test_a_run_that_began_when_layouts_had_another_name_goes_on(tmp_path):
    layout = {"size": 24, "cell": 4, "stacks": ""}
    now = {"seed": 0, "visual_layout": layout | {"padding": [122, 116, 104]}}
    check_stream(tmp_path, {"seed": 0, "arrangement": layout}, now)
    for saved in ({"seed": 1, "arrangement": layout}, {"seed": 0, "arrangement": layout | {"cell": 8}}):
        with pytest.raises(c.ConfigError, match="another stream of data"):
            check_stream(tmp_path, saved, now)


def test_a_run_whose_checkpoints_are_gone_begins_again_only_if_it_is_told_to(tiny, tmp_path):
    """Silently at step 0 it would write over what it had."""
    config = tiny("train.steps=4", "train.save_every=2", "train.log_every=2", recipe="full")
    lmm.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(c.ConfigError, match=r"says that step 4 was saved .* give --restart to begin again"):
        lmm.train(config, tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert lmm.train(config, tmp_path, restart=True)["step"] == 4
    assert (tmp_path / "unsaved_metrics.jsonl").exists() and len(read_metrics(tmp_path)) == 2
    with pytest.raises(c.ConfigError, match="holds step 4, from which the same command without --restart goes on"):
        lmm.train(config, tmp_path, restart=True)


def test_checkpoints_of_another_config_than_the_workdir_s_are_refused(tiny, tmp_path):
    """As after a config.json was copied from another run."""
    few = ("train.steps=2", "train.log_every=1")
    lmm.train(tiny(*few, recipe="full"), tmp_path)
    other = tiny(*few, "optimizer.weight_decay=0.5", recipe="full")
    c.save_config(other, tmp_path / "config.json")
    with pytest.raises(
        c.ConfigError, match=r"another config than its config.json.*\n  optimizer.weight_decay: was 0.0"
    ):
        lmm.train(other, tmp_path)


def test_a_later_step_that_is_gone_is_said(tiny, tmp_path, capsys):
    config = tiny("train.steps=4", "train.save_every=2", "train.log_every=2", recipe="full")
    lmm.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/4")
    assert lmm.train(config, tmp_path)["step"] == 4
    assert "step 4 was saved, and is not there any more; going on from step 2" in capsys.readouterr().out
    assert [row["event"] for row in read_events(tmp_path)][-4:] == ["fell_back", "continued", "saved", "done"]


def test_reading_a_checkpoint_has_a_limit(tiny, tmp_path, monkeypatch):
    """A disk that is gone would otherwise hold a run for ever before its first step."""
    told, gone = [], threading.Event()

    def restore(*_, **__):
        assert gone.wait(60)
        raise RuntimeError("the process would have ended")

    monkeypatch.setattr(loop, "end_stalled", lambda words: (told.append(words), gone.set()))
    monkeypatch.setattr(loop.base_lib, "restore", restore)
    with pytest.raises(RuntimeError, match="would have ended"):
        lmm.train(tiny("train.deadline_compile=0.3", recipe="full"), tmp_path / "run")
    assert told == ["reading or making the state to go on from did not end in 0.3 s"]
