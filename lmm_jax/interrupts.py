"""Ctrl-C on the command line: the first lets a command end in its own way, a second one ends it at once."""

import contextlib
import os
import signal
import sys
import threading

STOPPED = 130  # exit code: ended by Ctrl-C
GRACE = 1.0  # seconds after a second Ctrl-C in which a command may end in its own way


@contextlib.contextmanager
def second_interrupt_quits():
    """While it lasts, a second Ctrl-C ends the process, whatever the main thread is waiting in.

    Python tells the main thread alone, and only when it is back from a library: XLA compiles for minutes, a save goes
    on. So a thread of its own reads the number of each signal as it comes in.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    except ValueError:  # this is not the main thread, which alone handles signals
        os.close(read)
        os.close(write)
        yield
        return
    ended = threading.Event()

    def watch():
        count = 0
        with open(read, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                count += number[0] == signal.SIGINT
                if count > 1 and not ended.wait(GRACE):
                    quit()

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(write)


def quit():
    """Ends the process at once: threads that still compile would end the interpreter by a fault on its way out."""
    from lmm_jax.pods.wire import end

    print("lmm: stopped by Ctrl-C", file=sys.stderr)
    end(STOPPED)
