"""What must happen within some time: where it does not, all stacks are written down and the process ends.

Nothing else would end a run that waits for a reader that is stuck, a disk that is gone, or a device that does not
answer, while its slice costs what it costs.
"""

import contextlib
import faulthandler
import sys
import threading
import time

from lmm_jax.pods.wire import within

LOOK = 0.25  # seconds between two looks at the clock
TELLING = 5.0  # seconds in which the stacks are written down, unless who reads them has stopped to


class Watchdog:
    """A thread that ends the process when something that was begun is not over in time.

    It works while the main thread is in a library, as long as that lets other threads of Python run.
    """

    def __init__(self, end):
        """Args:
        end: called by the thread with a sentence about what took too long, after the stacks are written down; ends
          the process.
        """
        self._end, self._deadlines, self._closed = end, {}, threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def within(self, seconds, what):
        """What is done inside must be over in so many seconds; 0 for any time it takes. Threads may use it too.

        Args:
          seconds: limit.
          what: in words, behind "did not end".
        """
        key = object()
        if seconds:
            self._deadlines[key] = time.monotonic() + seconds, seconds, what
        try:
            yield
        finally:
            self._deadlines.pop(key, None)

    def end(self, sentence):
        """Writes down the stacks of all threads and ends the process, as something took too long."""
        within(TELLING, _tell, sentence)
        self._end(sentence)

    def close(self):
        """Ends the thread; nothing has a limit any more."""
        self._closed.set()

    def _watch(self):
        while not self._closed.wait(LOOK):
            now = time.monotonic()
            for deadline, seconds, what in list(self._deadlines.values()):
                if now > deadline and not self._closed.is_set():
                    self.end(f"{what} did not end in {seconds:g} s")
                    return


def _tell(sentence):
    """Writes the stacks of all threads to stderr; where that is no file, as in a notebook, to the process's own."""
    print(f"\nlmm: {sentence}; what each thread was doing:", file=sys.stderr, flush=True)
    try:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
    except (AttributeError, OSError, ValueError):
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
