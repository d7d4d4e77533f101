"""What is forked is what a shell starts: the same signals, session and environment, the same training to the bit."""

import signal

import numpy as np

from tests.faults.rows import row
from tests.faults.states import state_of


def test_a_forked_process_is_as_a_plain_one(server, tmp_path):
    said = []
    for plain in (False, True):
        with server.start("one", "two", module="tests.faults.tell_process", plain=plain, LMM_TOLD="here") as process:
            assert process.wait(60) == 7, process.said()
            said.append(process.said())
            assert not process.left()
    assert said[0] == said[1] and "LMM_TOLD=here" in said[0], said


def test_a_process_that_is_killed_is_seen(server):
    with server.start("wait", module="tests.faults.tell_process") as process:
        process.wait_for(lambda: "waiting" in process.said())
        assert process.poll() is None and len(process.left()) == 1  # a process of its own
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert len(process.left()) == 1
    process.wait_until_none_is_left(5)
    assert process.left() == []


@row(11, few=0, full=1)
def test_a_forked_process_trains_what_a_plain_one_does(trials, server, tiny_args, tmp_path):
    def check(number):
        steps = ("--config.train.steps=6", "--config.train.save_every=6", "--config.train.log_every=1")
        for name in ("forked", "plain"):
            words = ("train", *tiny_args, *steps, "--workdir", tmp_path / name)
            with server.start(*words, plain=name == "plain") as process:
                assert process.wait(120) == 0, process.said()
        forked, plain = (state_of(tmp_path / name / "checkpoints/6") for name in ("forked", "plain"))
        assert forked.keys() == plain.keys()
        for name, x in forked.items():
            np.testing.assert_array_equal(x, plain[name], name)

    trials.each(check)
