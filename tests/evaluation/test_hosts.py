"""Several processes as the hosts of a pod evaluate together: they answer as one, and go on where all were killed."""

import dataclasses
import signal
import time

import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.evaluation import records
from tests.training.test_hosts import Pod

TOLERANCE = 1e-5  # of log-probabilities; rows stand in other batches


@pytest.mark.long
def test_two_hosts_that_were_killed_go_on_and_answer_as_one(tiny, digits_folder, tmp_path):
    workdir = tmp_path / "run"
    lmm.train(tiny("train.steps=2"), workdir)

    def command(out):
        return ["evaluate", "--workdir", workdir, "--data", digits_folder, "--scales", "1,9", "--out", tmp_path / out]

    pod = Pod(tmp_path / "first", 2, *command("pod"))
    end = time.monotonic() + 120
    while not list((tmp_path / "pod").glob("evaluation/digits/1.part-1-*")) and time.monotonic() < end:
        time.sleep(0.01)
    for process in pod.processes.values():
        process.send_signal(signal.SIGKILL)
    pod.codes()
    pod = Pod(tmp_path / "second", 2, *command("pod"))
    assert pod.codes(300) == {0: 0, 1: 0}, pod.said(0) + pod.said(1)
    one = Pod(tmp_path / "third", 1, *command("one"))
    assert one.codes(300) == {0: 0}, one.said(0)
    assert "digits tokens" in pod.said(0) and "digits tokens" not in pod.said(1)  # host 0 alone tells the result
    for scale in ("1", "9"):
        found = [records.read(tmp_path / run / f"evaluation/digits/{scale}.jsonl")[1] for run in ("pod", "one")]
        assert len(found[0]) == len(found[1]) == 80
        for a, b in zip(*found, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=TOLERANCE)
            assert dataclasses.replace(a, logprobs=(), end=0.0, seconds=0.0) == dataclasses.replace(
                b, logprobs=(), end=0.0, seconds=0.0
            )
    assert not list((tmp_path / "pod").glob("evaluation/digits/*part*"))
