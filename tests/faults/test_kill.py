"""kill -9: nothing is lost beyond the last commit, whatever the run was doing."""

import os
import signal
import time

from tests.faults.restarts import check_begins_at
from tests.faults.rows import row
from tests.faults.runs import LAST, Run, words
from tests.faults.workdirs import begun_at, being_deleted, being_saved, folders, saved, taken
from tests.training.test_hosts import Pod


def kill_at_random(process, workdir, random):
    """While it starts, takes steps or saves."""
    time.sleep(random.uniform(2, 9))


def kill_after_a_commit(process, workdir, random):
    """A little later than a step of its own was saved."""
    first = saved(workdir)[0]
    process.wait_for(lambda: saved(workdir)[0] > first)
    time.sleep(random.uniform(0, 1.5))


def kill_inside_a_save(process, workdir, random):
    """While the folder of a step is written, or is just given its name."""
    first = saved(workdir)[0]
    process.wait_for(lambda: saved(workdir)[0] > first + random.integers(0, 3))
    process.wait_for(lambda: being_saved(workdir))
    time.sleep(random.uniform(0, 0.1))


def kill_inside_a_deletion(process, workdir, random):
    """While the oldest step is deleted: stands when it has lost its name, and maybe some of its files."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if being_deleted(workdir):
            process.send_signal(signal.SIGSTOP)
            if being_deleted(workdir):
                return
            process.send_signal(signal.SIGCONT)
        assert process.returncode is None and (random.random() > 0.01 or process.poll() is None), process.said()
    raise AssertionError("no deletion was met within a minute")


AIMS = (kill_at_random, kill_after_a_commit, kill_inside_a_deletion, kill_inside_a_save)


@row(1, few=1, full=100)
def test_a_run_that_is_killed_goes_on_from_its_last_commit(trials, server, tiny_args, small_run, tmp_path):
    """In a full run, the first trial is of a plain process, and one in ten is continued by the same command."""

    def check(number):
        random, aim = trials.random(number), AIMS[(number + 2) % len(AIMS)]
        with small_run.copy(tmp_path / str(number)) as workdir:
            first = saved(workdir)[0]
            with Run(server, workdir / "notes", words(tiny_args, workdir), trials.full and number == 0) as run:
                aim(run.process, workdir, random)
                run.process.kill()
                assert run.process.wait(10) == -signal.SIGKILL, run.process.said()
            newest, unfinished = saved(workdir)[0], being_saved(workdir)
            assert newest >= folders(workdir)[0] - 1  # of which the last may be about to be finished
            check_begins_at(small_run.restart(workdir), newest, small_run.states | run.noted())
            if trials.full and number % 10 == 0:
                go_on(server, tiny_args, workdir, newest, small_run)
        if aim is kill_inside_a_deletion:
            return "inside a deletion"
        committed = "after a commit" if newest > first else "before a commit"
        return "inside a save, " + committed if unfinished else committed

    kinds = trials.each(check)
    if trials.full and len(trials.numbers) == 100:
        assert kinds["inside a deletion"] >= 20, kinds
        assert sum(count for kind, count in kinds.items() if not kind.endswith("before a commit")) >= 50, kinds


def go_on(server, tiny_args, workdir, newest, small_run):
    """The same command, for three more steps."""
    with Run(server, workdir / "notes", words(tiny_args, workdir, f"train.steps={newest + 3}")) as run:
        assert run.process.wait() == 0 and begun_at(run.process.said()) == newest, run.process.said()
    assert saved(workdir)[0] == taken(workdir) == newest + 3
    check_begins_at(small_run.restart(workdir), newest + 3, run.noted())


@row(1, few=0, full=20)
def test_two_hosts_that_are_killed_go_on_from_their_last_commit(trials, tiny_args, small_run, tmp_path):
    """Both at once, or one whose partner ends by itself; one host then continues what two had saved."""

    def check(number):
        random = trials.random(number)
        workdir = tmp_path / str(number)
        command = words(tiny_args, workdir, "mesh.data=2")
        pod = Pod(tmp_path / f"pod_{number}", 2, *command)
        pod.wait_until_said(0, rf"step {random.integers(1, 6)}/{LAST}", 240)
        time.sleep(random.uniform(0, 1))
        for host in [[0, 1], [0], [1]][number % 3]:
            pod.processes[host].kill()
        codes = pod.codes(60)
        assert all(codes.values()), codes
        newest = max(saved(workdir), default=0)
        one = Pod(tmp_path / f"one_{number}", 1, *command, f"--config.train.steps={newest + 3}", devices=2)
        assert one.codes(240) == {0: 0}, one.said(0)
        assert begun_at(one.said(0)) == newest, one.said(0)
        assert saved(workdir)[0] == newest + 3
        return "with a commit" if newest else "before the first"

    trials.each(check)


@row(1, few=0, full=10)
def test_readers_end_with_a_run_that_is_killed(trials, server, tiny_args, small_run, tmp_path):
    """Processes that read for a run, and those that they started, are gone within seconds."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            command = words(tiny_args, workdir, "data.workers=2")
            with server.start(*command, plain=number == 0) as process:
                process.wait_for(lambda: len(process.left()) >= 2, 60)
                if number % 2:  # or while they start
                    process.wait_for(lambda: taken(workdir) > 6)
                time.sleep(random.uniform(0, 2))
                os.kill(process.pid, signal.SIGKILL)
                assert process.wait(10) == -signal.SIGKILL
                process.wait_until_none_is_left(10)

    trials.each(check)
