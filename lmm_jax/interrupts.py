"""Ctrl-C and SIGTERM on the command line: when a command may end in its own way, and when it ends at once."""

import contextlib
import os
import select
import signal
import sys
import threading
import time

from lmm_jax.exit_codes import PREEMPTED, STOPPED

GRACE = 1.0  # seconds after a second Ctrl-C in which a command may end in its own way
OBEYED, ENDED = 254, 255  # what is written beside the numbers of signals, which are below 65


@contextlib.contextmanager
def second_interrupt_quits(alone=False):
    """While it lasts, a second Ctrl-C ends the process, whatever the main thread is waiting in.

    Python tells the main thread alone, and only when it is back from a library: XLA compiles for minutes, a save goes
    on. So a thread of its own reads the number of each signal as it comes in.

    Args:
      alone: whether the process ends with this; one that goes on hears SIGTERM afterwards as it did before.
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
    terminate = signal.getsignal(signal.SIGTERM)

    def watch():
        count, quits_at = 0, None
        while True:
            left = None if quits_at is None else max(0.0, quits_at - time.monotonic())
            if not select.select([read], [], [], left)[0]:
                quit()
            (number,) = os.read(read, 1)
            if number == signal.SIGTERM:
                for tell in list(_told):
                    tell()
            if number == ENDED:
                os.close(read)
                return
            count = 0 if number == OBEYED else count + (number == signal.SIGINT)
            quits_at = None if count < 2 else quits_at or time.monotonic() + GRACE

    threading.Thread(target=watch, daemon=True).start()
    _watched.append(write)
    try:
        yield
    finally:
        _watched.remove(write)
        signal.set_wakeup_fd(before)
        if not alone and terminate is not None:  # one of a library in C is not ours to set
            signal.signal(signal.SIGTERM, terminate)
        os.write(write, bytes([ENDED]))
        os.close(write)


_told = []  # what the thread calls at SIGTERM
_watched = []  # where the threads that watch are told; one at most, but for tests


def obeyed():
    """Says that the command did what Ctrl-C asked for and goes on, so that the next one is a first one again."""
    for write in _watched:
        os.write(write, bytes([OBEYED]))


@contextlib.contextmanager
def told_at_once(tell):
    """While it lasts, a thread calls `tell` as soon as SIGTERM comes, whatever the main thread is waiting in.

    For a signal that has a handler, of a process that runs a command; elsewhere nothing is told.
    """
    _told.append(tell)
    try:
        yield
    finally:
        _told.remove(tell)


def ignore_terminate():
    """From now on a command ends in its own way alone: another SIGTERM would turn its exit code into a kill's."""
    if _watched:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_after_saving():
    """Ends a process whose run was preempted, unless other hosts have to part from it.

    Python would wait for threads that read, and those may wait for a disk that does not answer.
    """
    import jax

    from lmm_jax.pods.wire import end

    if jax.process_count() == 1:
        end(PREEMPTED)


def quit():
    """Ends the process at once: threads that still compile would end the interpreter by a fault on its way out."""
    from lmm_jax.pods.wire import end

    print("lmm: stopped by Ctrl-C", file=sys.stderr)
    end(STOPPED)
