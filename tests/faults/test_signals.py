"""SIGTERM wherever a run stands, once and twice: it saves, ends with 75, and loses no step."""

import signal
import time

from tests.faults.restarts import check_begins_at
from tests.faults.rows import row
from tests.faults.runs import Run, words
from tests.faults.workdirs import begun_at, being_saved, saved, taken

LIMIT = 10  # seconds from the signal to the end


def in_a_step(run, workdir, random):
    """Between and inside steps."""
    run.process.wait_for(lambda: taken(workdir) > 6)
    time.sleep(random.uniform(0, 1))


def in_a_save(run, workdir, random):
    """While the folder of a step is written."""
    run.process.wait_for(lambda: taken(workdir) > 6)
    run.process.wait_for(lambda: being_saved(workdir))
    time.sleep(random.uniform(0, 0.05))


def in_compiling(run, workdir, random):
    """Between the restoring of the last step and the end of the first of its own."""
    run.process.wait_for(lambda: "an epoch is about" in run.process.said())
    time.sleep(random.uniform(0, 3))


MOMENTS = (in_a_step, in_compiling, in_a_save)


def check_nothing_is_lost(run, workdir, small_run):
    """Every step that was taken is saved, and restored with every bit."""
    steps = saved(workdir)
    assert steps[0] == taken(workdir), f"{taken(workdir)} steps were taken and {steps[0]} saved"
    check_begins_at(small_run.restart(workdir), steps[0], small_run.states | run.noted())
    run.process.wait_until_none_is_left(1)


@row(7, few=0, full=50)
def test_sigterm_saves_and_ends_with_75(trials, server, tiny_args, small_run, tmp_path):
    """In a step, in a save, while it compiles; in a full run one in ten has a reader process."""

    def check(number):
        random, moment = trials.random(number), MOMENTS[number % len(MOMENTS)]
        with small_run.copy(tmp_path / str(number)) as workdir:
            workers = ("data.workers=1",) if number % 10 == 9 else ()
            command = words(tiny_args, workdir, *workers)
            with Run(server, workdir / "notes", command, plain=trials.full and number == 0) as run:
                moment(run, workdir, random)
                begin = time.monotonic()
                run.process.send_signal(signal.SIGTERM)
                code = run.process.code_within(LIMIT)
                seconds = time.monotonic() - begin
                assert code == 75, f"ended with {code} after {seconds:.1f} s\n{run.process.said()[-2000:]}"
                check_nothing_is_lost(run, workdir, small_run)
        return moment.__name__

    trials.each(check)


@row(7, few=0, full=10)
def test_sigterm_ends_a_run_whose_next_batch_never_comes(trials, server, tiny_args, small_run, tmp_path):
    """What was trained until then is saved."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            command = words(tiny_args, workdir, "data.threads=2")
            process = server.start(random.integers(30, 90), *command, module="tests.faults.stuck", plain=number == 0)
            with process:
                process.wait_for(lambda: taken(workdir) > 6)
                last = 0
                while taken(workdir) > last:  # until it waits
                    last = taken(workdir)
                    time.sleep(2)
                process.send_signal(signal.SIGTERM)
                assert process.code_within(LIMIT) == 75, process.said()[-2000:]
            assert saved(workdir)[0] == taken(workdir) >= last
            assert small_run.restart(workdir).step == saved(workdir)[0]

    trials.each(check)


@row(8, few=1, full=20)
def test_a_second_signal_spoils_nothing(trials, server, tiny_args, small_run, tmp_path):
    """At any time until the process is gone, 1 s later in every third trial; one in four has a reader process."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            workers = ("data.workers=1",) if number % 4 == 3 else ()
            with Run(server, workdir / "notes", words(tiny_args, workdir, *workers)) as run:
                in_a_step(run, workdir, random)
                run.process.send_signal(signal.SIGTERM)
                for pause in (1.0, 0.2) if number % 3 == 2 else random.uniform(0, 0.8, 2):
                    time.sleep(pause)
                    run.process.send_signal(signal.SIGTERM)
                assert run.process.code_within(LIMIT) == 75, run.process.said()[-2000:]
                check_nothing_is_lost(run, workdir, small_run)

    trials.each(check)


@row(8, few=0, full=10)
def test_a_signal_after_the_last_step_spoils_nothing(trials, server, tiny_args, small_run, tmp_path):
    """While the end of a run is saved and drawn: it ends with 0, or with 75 and nothing is left to do."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            command = words(tiny_args, workdir, "train.steps=8")
            run = Run(server, workdir / "notes", command)
            with run:
                run.process.wait_for(lambda: taken(workdir) == 8)
                time.sleep(random.uniform(0, 0.5))
                run.process.send_signal(signal.SIGTERM)
                assert run.process.code_within(LIMIT) in (0, 75), run.process.said()[-2000:]
                assert begun_at(run.process.said()) == 6
            check_nothing_is_lost(run, workdir, small_run)

    trials.each(check)
