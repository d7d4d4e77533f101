"""What takes too long ends the process with all stacks; what is over in time does nothing."""

import subprocess
import sys
import threading
import time

import pytest

from lmm_jax.exit_codes import STALLED
from lmm_jax.watchdog import Watchdog


@pytest.fixture
def watched():
    """A watchdog, and the sentences that it would have ended the process with."""
    told = []
    watchdog = Watchdog(told.append)
    yield watchdog, told
    watchdog.close()


def wait(holds, seconds=5):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def test_what_is_over_in_time_does_nothing(watched):
    watchdog, told = watched
    for _ in range(20):
        with watchdog.within(0.4, "a step"):
            time.sleep(0.03)
    with watchdog.within(0, "anything"):
        time.sleep(0.6)
    assert not told


def test_one_of_several_that_takes_too_long_is_named(watched, capfd):
    watchdog, told = watched
    with watchdog.within(60, "a save"), watchdog.within(0.2, "the batch of step 7"):
        assert wait(lambda: told)
    assert told == ["the batch of step 7 did not end in 0.2 s"]
    err = capfd.readouterr().err
    assert "what each thread was doing" in err and "test_one_of_several_that_takes_too_long" in err


def test_it_counts_what_other_threads_do(watched):
    watchdog, told = watched
    release = threading.Event()

    def work():
        with watchdog.within(0.2, "a save"):
            release.wait()

    thread = threading.Thread(target=work)
    thread.start()
    assert wait(lambda: told)
    release.set()
    thread.join()


def test_a_process_ends_with_a_code_of_its_own_whatever_it_waits_in():
    code = (
        "import ctypes, os\nfrom lmm_jax.exit_codes import STALLED\nfrom lmm_jax.watchdog import Watchdog\n"
        "with Watchdog(lambda words: os._exit(STALLED)).within(0.3, 'sleeping'):\n    ctypes.CDLL(None).sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == STALLED == 124
    assert "sleeping did not end in 0.3 s" in done.stderr and 'File "<string>", line 5' in done.stderr


def test_who_does_not_read_its_words_cannot_keep_a_process():
    """As a terminal that is stopped, or a log on the very disk that is gone."""
    code = (
        "import os, sys, threading\nfrom lmm_jax import watchdog\nwatchdog.TELLING = 0.3\n"
        "class Stuck:\n    def write(self, text):\n        threading.Event().wait()\n    flush = fileno = write\n"
        "sys.stderr = Stuck()\n"
        "with watchdog.Watchdog(lambda words: os._exit(9)).within(0.1, 'it'):\n    threading.Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 9
