"""A disk that fills up: earlier steps stay, nothing half-written stays, and training goes on for a while."""

import contextlib
import os
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.rows import row
from tests.faults.runs import LAST, words
from tests.faults.workdirs import begun_at, being_saved, folders, saved, taken

SIZE = 6 * 2**20  # bytes of the disk; the two steps of a run take 1.3 MB


@contextlib.contextmanager
def disk(folder):
    """A file system of its own, for whoever may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a disk that can be filled")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder, leave):
    """Fills a disk up to so many bytes, further if it was filled before; returns the file."""
    free = shutil.disk_usage(folder).free
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("ab", buffering=0) as f:  # others write at the same time
        f.write(bytes(max(free - leave, 0)))
    return filler


@row(6, few=0, full=20)
def test_training_goes_on_while_saves_fail(trials, server, tiny_args, small_run, tmp_path):
    """Once room is made, the next save succeeds, and the run ends as if nothing had been."""

    def check(number):
        random = trials.random(number)
        with disk(tmp_path / str(number)) as place, small_run.copy(place / "run") as workdir:
            command = words(tiny_args, workdir, "train.save_every=2", "train.max_failed_saves=1000")
            with server.start(*command, plain=trials.full and number == 0) as process:
                process.wait_for(lambda: saved(workdir)[0] > 6)
                filler = fill(place, int(random.integers(100_000, 500_000)))  # metrics still have room
                process.wait_for(lambda: "full" in process.said())
                at, before = taken(workdir), saved(workdir)[0]
                process.wait_for(lambda: taken(workdir) > at)
                assert saved(workdir)[0] >= before
                filler.unlink()
                process.wait_for(lambda: saved(workdir)[0] > before)
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 75, process.said()[-2000:]
            assert saved(workdir)[0] == taken(workdir) and not being_saved(workdir)

    trials.each(check)


@row(6, few=0, full=20)
def test_a_run_on_a_full_disk_stops_with_what_it_had(trials, server, tiny_args, small_run, tmp_path):
    """After `train.max_failed_saves`: exit code 1, no remains; with room again the same command goes on."""

    def check(number):
        random = trials.random(number)
        with disk(tmp_path / str(number)) as place, small_run.copy(place / "run") as workdir:
            command = words(tiny_args, workdir, "train.save_every=2", "train.max_failed_saves=2")
            with server.start(*command) as process:
                process.wait_for(lambda: saved(workdir)[0] > 6)
                leave = int(random.integers(0, 500_000))
                end = time.monotonic() + 120
                while process.poll() is None and time.monotonic() < end:  # what is deleted makes room again
                    filler = fill(place, leave)
                    time.sleep(0.1)
                code = process.code_within(1)
                said = process.said()
                assert code == 1 and "full" in said and "Traceback" not in said, f"ended with {code}\n{said[-2000:]}"
            newest = saved(workdir)[0]
            assert not being_saved(workdir), (list((workdir / "checkpoints").rglob("*")), said[-3000:])
            assert folders(workdir)[0] == newest
            filler.unlink()
            assert small_run.restart(workdir).step == newest
            with server.start(*words(tiny_args, workdir, f"train.steps={min(newest + 4, LAST)}")) as process:
                assert process.wait(120) == 0 and begun_at(process.said()) == newest, process.said()[-2000:]

    trials.each(check)
