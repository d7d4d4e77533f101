"""Being asked to stop, by SIGTERM or Ctrl-C, wherever a run stands."""

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable

import jax

from lmm_jax import interrupts
from lmm_jax.exit_codes import PREEMPTED
from lmm_jax.pods import hosts
from lmm_jax.pods.wire import end


@dataclasses.dataclass(frozen=True)
class Stop:
    """What is known of a wish to stop.

    Attributes:
      asked: whether it is known that there is one, so that waiting for a batch ends; on several hosts, which must
        agree on a step first, it never is.
      is_last: of a step that is done, asked once after each: whether it is the last.
      begun: says that a step is done, so that from here on something would be lost.
    """

    asked: Callable[[], bool]
    is_last: Callable[[int], bool]
    begun: Callable[[], None]


@contextlib.contextmanager
def stop_signal(held):
    """Turns SIGTERM and Ctrl-C into a wish to stop, wherever a run stands; yields a `Stop`.

    Several hosts, of which any may get it, agree on the step. On one, only the main thread can have a handler. Until
    a step is done, which may take minutes of reading and compiling, there is nothing to wait for at SIGTERM.

    Args:
      held: the `lock.Hold` of the workdir, released before the process ends; None on all hosts but the first.
    """
    if jax.process_count() > 1:
        with interrupts.told_at_once(hosts.ask_to_stop):
            yield Stop(lambda: False, hosts.is_last, lambda: None)
        return
    asked, begun = threading.Event(), threading.Event()
    try:
        old = hosts.handle_signals(asked.set)
    except ValueError:
        yield Stop(lambda: False, lambda step: False, lambda: None)
        return

    def end_now():
        if not begun.is_set():
            print("lmm: asked to stop before a step was taken; the same command continues", file=sys.stderr)
            held.release()
            end(PREEMPTED)

    try:
        with interrupts.told_at_once(end_now):
            yield Stop(asked.is_set, lambda step: asked.is_set(), begun.set)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        interrupts.ignore_terminate()  # what is left of a command is short, and its exit code says how the run ended
