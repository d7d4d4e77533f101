"""What a run counts and says of its saves, without training; how it trains is tested in test_loop.py."""

import contextlib
import errno
import os
import threading
import types

import pytest

from lmm_jax.training import run as run_lib
from lmm_jax.training.events import Events, read_events
from lmm_jax.training.run import Run

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE), "checkpoints")


class Checkpoints:
    """Saves that fail or not, one after another, as told."""

    def __init__(self, *fates):
        self._fates = list(fates)

    def wait(self):
        if fate := self._fates.pop(0):
            raise fate


@pytest.fixture
def run(tmp_path):
    """`run(*fates)`: a `Run` of a host that is not the first, whose next saves end so."""
    limits = types.SimpleNamespace(deadline_save=60.0, max_failed_saves=3)
    program = types.SimpleNamespace(config=types.SimpleNamespace(train=limits))
    plan = types.SimpleNamespace(program=program, workdir=tmp_path)
    with contextlib.ExitStack() as stack:

        def make(*fates):
            one = Run(plan, Checkpoints(*fates), None, Events(tmp_path), None, False, None, None, 0)
            stack.enter_context(contextlib.closing(one.watchdog))
            return one

        yield make


def save(one, step):
    one.coming = step
    one.finish_saving(lambda words: None)


def test_saves_that_failed_are_forgotten_after_one_that_did_not_on_every_host(run):
    one = run(STALE, STALE, None, STALE, STALE, None)
    for step, known in ((10, 0), (20, 0), (30, 30), (40, 30), (50, 30), (60, 60)):
        save(one, step)
        assert one.saved == known and one.coming is None
    assert one.failed_saves == 0


def test_so_many_in_a_row_end_it_and_each_is_told_by_its_own_step(run, tmp_path):
    one = run(None, STALE, STALE, STALE)
    for step in (10, 20, 30):
        save(one, step)
    with pytest.raises(OSError, match="checkpoints"):
        save(one, 40)
    assert [(row["event"], row["step"]) for row in read_events(tmp_path)] == [
        ("save_failed", 20),
        ("save_failed", 30),
    ]
    assert one.saved == 10


def test_where_no_save_is_under_way_none_is_waited_for(run):
    one = run()
    one.finish_saving(lambda words: None)
    assert one.saved == 0


def test_what_is_written_down_and_the_beginning_of_a_save_have_a_limit(run, monkeypatch):
    """As on a network disk that is gone: who looks at the lock, or writes a line, waits in a system call."""
    told, gone = [], threading.Event()
    monkeypatch.setattr(run_lib, "end_stalled", lambda words: (told.append(words), gone.set()))

    def write(one):
        with one.writing(7):
            gone.wait(30)

    for begin in (lambda one: one.save(types.SimpleNamespace(step=7), None, lambda words: None), write):
        one = run()
        one.plan.program.config.train.deadline_save = 0.3
        one.held = types.SimpleNamespace(check=lambda: gone.wait(30) and 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            begin(one)
        assert gone.is_set()
        gone.clear()
    assert told == ["beginning to save step 7 did not end in 0.3 s", "writing down step 7 did not end in 0.3 s"]


def test_what_another_host_ended_is_written_down(run, tmp_path):
    run()._ended_by_another("host 1: is gone")
    (row,) = read_events(tmp_path)
    assert row["event"] == "failed" and row["words"] == "host 1: is gone"
