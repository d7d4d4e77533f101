"""What never ends by itself is ended: with the stacks of all threads, a code of its own, and no process left."""

import os
import re
import signal
import time

from lmm_jax.exit_codes import STALLED
from tests.faults.rows import row
from tests.faults.runs import words
from tests.faults.workdirs import saved, taken

DEADLINE = 30  # seconds, `train.deadline_batch`; two readers start within, on a busy machine too
MORE = 10  # seconds that the end itself may take on a busy machine


def check_it_ends(process, begin):
    """Within the deadline and a little, with stacks and without children."""
    code = process.code_within(DEADLINE + MORE)
    said = process.said()
    assert code == STALLED, f"ended with {code} after {time.monotonic() - begin:.1f} s\n{said[-2000:]}"
    assert re.search(r"[Tt]hread 0x[0-9a-f]+ .*\(most recent call first\)", said), said[-2000:]
    assert re.search(rf"lmm: waiting for the batch of step \d+ did not end in {DEADLINE} s;", said), said[-2000:]
    process.wait_until_none_is_left(2)


@row(10, few=0, full=20)
def test_a_reader_process_that_stands_still_ends_the_run(trials, server, tiny_args, small_run, tmp_path):
    """One of two, or both, at any time after the first step."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            command = words(tiny_args, workdir, "data.workers=2", f"train.deadline_batch={DEADLINE}")
            with server.start(*command, plain=trials.full and number == 0) as process:
                process.wait_for(lambda: taken(workdir) > 6)
                time.sleep(random.uniform(0, 0.5))
                readers = readers_of(process)
                for pid in readers if number % 2 else readers[:1]:
                    os.kill(pid, signal.SIGSTOP)
                begin, last = time.monotonic(), taken(workdir)
                while taken(workdir) > last:  # batches that were read before
                    begin, last = time.monotonic(), taken(workdir)
                    time.sleep(1)
                check_it_ends(process, begin)
            assert small_run.restart(workdir).step == saved(workdir)[0]

    trials.each(check)


def readers_of(process) -> list[int]:
    """Processes that read for a run: those that Python's multiprocessing spawned, without its resource tracker."""
    found = []
    for pid in process.left():
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            if b"spawn_main" in f.read():
                found.append(pid)
    assert found, f"no reader among {process.left()}"
    return sorted(found)


@row(10, few=0, full=10)
def test_a_disk_that_never_answers_ends_the_run(trials, server, tiny_args, small_run, tmp_path):
    """Read by threads of the run itself."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            command = words(tiny_args, workdir, "data.threads=2", f"train.deadline_batch={DEADLINE}")
            with server.start(random.integers(20, 60), *command, module="tests.faults.stuck") as process:
                process.wait_for(lambda: taken(workdir) > 6)
                begin, last = time.monotonic(), 0
                while taken(workdir) > last:
                    begin, last = time.monotonic(), taken(workdir)
                    time.sleep(1)
                check_it_ends(process, begin)

    trials.each(check)
