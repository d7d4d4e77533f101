"""Reader processes that die: an error at once, and no record is lost or read twice by who goes on."""

import copy
import errno
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from lmm_jax.data.pipeline import Packs, batches
from tests.faults.rows import row
from tests.opened import open_packs

HERE = {"threads": 1, "workers": 0}  # who reads, if nothing happens
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGTERM)  # SIGTERM is for the run: they stay


@row(24, few=0, full=20)
def test_a_reader_that_dies_is_an_error_at_once_and_nothing_is_lost_or_doubled(trials, tiny):
    """One or two readers, at a random batch; the batches from there on are those of a stream that was not stopped."""
    packs = open_packs(tiny(), "train", packs_per_step=8, shuffle=True)
    expected = [batch["record_index"] for batch in batches(packs, np.arange(8), 0, 60, **HERE)]

    def check(number):
        random, how = trials.random(number), SIGNALS[number % 4]
        iterator = batches(packs, np.arange(8), 0, 100_000, threads=1, workers=1 + number % 2)
        found = [next(iterator)["record_index"] for _ in range(int(random.integers(1, 30)))]
        readers = multiprocessing.active_children()
        os.kill(readers[int(random.integers(len(readers)))].pid, how)
        begin = time.monotonic()
        if how == signal.SIGTERM:
            found += [next(iterator)["record_index"] for _ in range(20)]
            iterator.close()
        else:
            with pytest.raises(Exception) as raised:
                while time.monotonic() < begin + 20:
                    found.append(next(iterator)["record_index"])
            assert time.monotonic() - begin < 5, raised.value
            iterator.close()
        goes_on(packs, found, expected, readers)

    trials.each(check)


class Raising(Packs):
    """Raises at one position, as a disk does that answers with an error."""

    def __getitem__(self, position):
        if position == self.raises_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "train-00000.array_record")
        return super().__getitem__(position)


@row(24, few=0, full=10)
def test_a_reader_that_raises_is_its_error_at_once_and_nothing_is_lost_or_doubled(trials, tiny):
    """In this process, or in one of one or two readers, at a random pack: all batches before come, and its error."""
    packs = open_packs(tiny(), "train", packs_per_step=8, shuffle=True)
    expected = [batch["record_index"] for batch in batches(packs, np.arange(8), 0, 60, **HERE)]

    def check(number):
        random = trials.random(number)
        broken = copy.copy(packs)
        broken.__class__, broken.raises_at = Raising, int(random.integers(8, 30 * 8))
        iterator = batches(broken, np.arange(8), 0, 100_000, threads=1, workers=number % 3)
        found = [next(iterator)["record_index"]]
        readers, begin = multiprocessing.active_children(), time.monotonic()
        with pytest.raises(Exception, match=r"train-00000\.array_record"):
            while time.monotonic() < begin + 20:
                found.append(next(iterator)["record_index"])
                begin = time.monotonic()
        assert time.monotonic() - begin < 5 and len(found) == broken.raises_at // 8
        iterator.close()
        goes_on(packs, found, expected, readers)

    trials.each(check)


def goes_on(packs, found, expected, readers):
    """What was read, and what is read from there on, is what a stream gives that was not stopped; no reader stays."""
    np.testing.assert_array_equal(found[:60], expected[: len(found)])
    if len(found) < 60:
        rest = batches(packs, np.arange(8), len(found), 60, **HERE)
        np.testing.assert_array_equal([batch["record_index"] for batch in rest], expected[len(found) :])
    end = time.monotonic() + 10
    while any(reader.is_alive() for reader in readers):
        assert time.monotonic() < end, "readers stay"
        time.sleep(0.02)
