"""Another host is killed, or stands still: the others end soon, say so, and leave no process behind."""

import os
import re
import signal
import subprocess
import time

from lmm_jax.training.events import read_events
from tests.faults.rows import row
from tests.faults.runs import words
from tests.faults.workdirs import begun_at, saved
from tests.training.test_hosts import Pod

KILLED, FROZEN = 15, 35  # seconds until the other host has ended


def start(folder, tiny_args, *overrides):
    """Two hosts that train, past their third step; processes that read for them are theirs."""
    pod = Pod(folder, 2, *words(tiny_args, folder / "run", "mesh.data=2", *overrides))
    pod.wait_until_said(0, r"step 3/", 240)
    return pod


def processes_of(pod) -> list[int]:
    """All processes of a pod that run now: they have its address in their environment."""
    found, address = [], f"JAX_COORDINATOR_ADDRESS=localhost:{pod.port}".encode()
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/environ", "rb") as f:
                mine = entry.isdigit() and address in f.read().split(b"\0")
            with open(f"/proc/{entry}/stat") as f:
                mine = mine and f.read().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:  # no process, or it ended meanwhile
            continue
        if mine:
            found.append(int(entry))
    return found


def check_the_other_ends(pod, host, seconds):
    """The host that was left ends in time, by an error that names the one that was lost."""
    begin = time.monotonic()
    try:
        code = pod.processes[1 - host].wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"host {1 - host} goes on after {seconds} s\n{pod.said(1 - host)[-1500:]}") from None
    took = time.monotonic() - begin
    said = pod.said(1 - host)
    assert code not in (0, 2, 75), f"host {1 - host} ended with {code} after {took:.0f} s\n{said[-1500:]}"
    assert re.search(rf"host {host}\b", said), said[-1500:]


def end(pod):
    """Kills what is left."""
    for pid in processes_of(pod):
        os.kill(pid, signal.SIGKILL)
    for process in pod.processes.values():
        process.wait(30)


def check_none_stays(pod, seconds=10):
    limit = time.monotonic() + seconds
    while left := processes_of(pod):
        assert time.monotonic() < limit, f"processes {left} stay"
        time.sleep(0.05)


@row(9, few=0, full=20)
def test_a_host_that_is_killed_ends_the_other(trials, tiny_args, tmp_path):
    """Either of two; every fourth pod has reader processes. The same command on both goes on."""

    def check(number):
        random, folder, host = trials.random(number), tmp_path / str(number), number % 2
        workers = ("data.workers=1",) if number % 4 < 2 else ()
        pod = start(folder, tiny_args, *workers)
        try:
            time.sleep(random.uniform(0, 1))
            pod.processes[host].kill()
            check_the_other_ends(pod, host, KILLED)
            check_none_stays(pod)
            if host == 1:  # host 0 writes the events
                told = [row["words"] for row in read_events(folder / "run") if row["event"] == "failed"]
                assert any(one.startswith("host 1: ") for one in told), told
        finally:
            end(pod)
        newest = saved(folder / "run")[0]
        if number % 5 == 0:
            more = (f"train.steps={newest + 2}", "mesh.data=2")
            again = Pod(folder / "again", 2, *words(tiny_args, folder / "run", *more))
            assert again.codes(240) == {0: 0, 1: 0}, again.said(0)
            assert begun_at(again.said(0)) == newest

    trials.each(check)


@row(10, few=0, full=10)
def test_a_host_that_stands_still_ends_the_other(trials, tiny_args, tmp_path):
    """SIGSTOP to either of two. It is let go on afterwards, and ends too."""

    def check(number):
        random, host = trials.random(number), number % 2
        pod = start(tmp_path / str(number), tiny_args)
        try:
            time.sleep(random.uniform(0, 1))
            pod.processes[host].send_signal(signal.SIGSTOP)
            check_the_other_ends(pod, host, FROZEN)
            pod.processes[host].send_signal(signal.SIGCONT)
            assert pod.processes[host].wait(30)
            check_none_stays(pod)
        finally:
            end(pod)

    trials.each(check)
