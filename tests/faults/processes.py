"""Processes that tests of faults kill: started in a few milliseconds, watched, and never left behind.

To import what `lmm train` needs takes seconds, of which a hundred kills would need many minutes. So a `Server`
imports it once and forks a child for each trial. A child differs from `python -m lmm_jax …` in this alone:

- its modules were imported before it began, with the environment of the server: what a module reads of the
  environment while it is imported is the server's (`JAX_PLATFORMS`, `JAX_NUM_CPU_DEVICES`, the folder of compiled
  programs). All else is read later, from the environment that the trial gives.
- its parent is the server, which is a live process as a shell would be, and which reaps it.
- the seed of Python's hashes is the server's, the same for all its children.

It is the main thread of a process, session and process group of its own, with the handlers of signals of a fresh
process, runs the module as `__main__`, and ends as any program does, through `sys.exit` and what was registered with
`atexit`. The server has initialised no JAX device and started no thread of its own; that of OpenBLAS, which numpy
starts, is made anew after a fork. That a child trains to the bit what a plain process does is held by
`test_processes.py`.
"""

import contextlib
import json
import os
import pathlib
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]


class Process:
    """A running command: what `subprocess.Popen` has of it, with its output in a file.

    Attributes:
      pid: also of its session and process group.
      returncode: None while it runs; negative, the signal that ended it.
    """

    def __init__(self, out, popen=None, connection=None):
        """`popen` of a plain process, or the `connection` to the server that forks it."""
        self.out, self.returncode, self._popen, self._connection = pathlib.Path(out), None, popen, connection
        self._lines = connection and connection.makefile("r")
        self.pid = popen.pid if popen else int(self._lines.readline())

    def poll(self):
        """The exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=120):
        """The exit code, once it has ended; subprocess.TimeoutExpired if it does not within so many seconds."""
        if self.returncode is None and self._popen:
            self.returncode = self._popen.wait(timeout)
        elif self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.out), timeout)
            self.returncode = int(self._lines.readline())
            self._connection.close()
        return self.returncode

    def code_within(self, seconds):
        """The exit code; fails with what it said if it does not end within so many seconds."""
        try:
            return self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {seconds:.1f} s\n{self.said()[-2000:]}") from None

    def send_signal(self, number):
        """To this process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def said(self):
        """What it printed so far, output and errors."""
        return self.out.read_text(errors="replace")

    def left(self) -> list[int]:
        """Processes of its session that run now, other than itself: its readers, while it runs or after it ended."""
        return [pid for pid in session_of(self.pid) if pid != self.pid]

    def wait_until_none_is_left(self, seconds):
        """Fails unless all processes that it started end within so many seconds."""
        end = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < end, f"processes {left} stay after {self.pid} ended\n{self.said()[-2000:]}"
            time.sleep(0.02)

    def wait_for(self, seen, seconds=120):
        """Waits until `seen()` is true, whose value is returned; fails if the process ends before."""
        end = time.monotonic() + seconds
        while not (found := seen()):
            ended = self.poll() is not None
            assert not ended, f"ended with {self.returncode} before what was waited for\n{self.said()[-3000:]}"
            assert time.monotonic() < end, f"waited {seconds} s in vain\n{self.said()[-3000:]}"
            time.sleep(0.002)
        return found

    def end(self):
        """Kills what is left of it and of its session."""
        for pid in session_of(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(30)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def session_of(number) -> list[int]:
    """Numbers of the processes of a session; those that ended and were not reaped are none."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as f:
                state, _, _, session = f.read().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(session) == number and state not in "ZX":
            found.append(int(entry))
    return found


class Server:
    """Starts modules as processes, forked or plain.

    Args:
      folder: for its socket, an empty folder.
      devices: CPU devices that each process has.
      variables: further environment variables of the server and of what it starts.
    """

    def __init__(self, folder, devices, **variables):
        from tests.conftest import COMPILED

        self._path, self._number = str(folder / "s"), 0
        self.folder = folder
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        command = [sys.executable, "-m", "tests.faults.processes", self._path]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)
        assert self._process.stdout.readline() == b"ready\n"

    def start(self, *words, module="lmm_jax", plain=False, out=None, **variables) -> Process:
        """Starts `python -m MODULE WORD…`.

        Args:
          words: arguments.
          module: to run as `__main__`.
          plain: starts a fresh Python, which imports everything.
          out: file for what it prints.
          variables: of its environment, beside those of the server.
        """
        self._number += 1
        out = pathlib.Path(out or self.folder / f"out_{self._number}")
        words, environment = list(map(str, words)), self.environment | variables
        if plain:
            with out.open("w") as f:
                streams = {"stdin": subprocess.DEVNULL, "stdout": f, "stderr": subprocess.STDOUT}
                command = [sys.executable, "-m", module, *words]
                popen = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
            return Process(out, popen=popen)
        out.touch()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        order = {"module": module, "words": words, "environment": environment, "out": str(out)}
        connection.sendall(json.dumps(order).encode() + b"\n")
        return Process(out, connection=connection)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()  # at which it ends
        self._process.wait(30)


def serve(path):
    """Forks a child for each order that comes in at the socket `path`, until standard input is closed.

    Returns:
      in the server None, and in a child its order.
    """
    import lmm_jax.tools.plots
    import lmm_jax.training.loop  # noqa: F401

    listener, watched, running = socket.socket(socket.AF_UNIX), selectors.DefaultSelector(), {}
    listener.bind(path)
    listener.listen(64)
    watched.register(sys.stdin, selectors.EVENT_READ)
    watched.register(listener, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in watched.select():
            if key.fileobj is sys.stdin:
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                with connection.makefile("r") as lines:
                    order = json.loads(lines.readline())
                pid = os.fork()
                if not pid:
                    for other in (connection, listener, *(c for _, c in running.values())):
                        other.close()
                    for ended in running:
                        os.close(ended)
                    watched.close()
                    return order
                connection.sendall(f"{pid}\n".encode())
                ended = os.pidfd_open(pid)
                running[ended] = pid, connection
                watched.register(ended, selectors.EVENT_READ)
            else:
                pid, connection = running.pop(key.fileobj)
                watched.unregister(key.fileobj)
                os.close(key.fileobj)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError), connection:  # nobody may wait for it
                    connection.sendall(f"{code}\n".encode())


def become(order):
    """Makes this forked process what a shell would have started."""
    os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    nothing, out = (
        os.open(os.devnull, os.O_RDONLY),
        os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
    )
    for stream, file in enumerate((nothing, out, out)):
        os.dup2(file, stream)
    os.close(nothing)
    os.close(out)
    sys.argv = [order["module"], *order["words"]]


if __name__ == "__main__":
    order = serve(sys.argv[1])
    if order:
        become(order)
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
