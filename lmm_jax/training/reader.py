"""The next batch, taken by a thread of its own: who waits for it can be asked to stop meanwhile."""

import multiprocessing
import queue
import threading

LOOK = 0.05  # seconds between two looks whether to go on waiting
PATIENCE = 1.0  # seconds that an iterator may take to be closed


class Reader:
    """Takes batches from an iterator, one ahead."""

    def __init__(self, iterator):
        """Args:
        iterator: of batches, with `close`; the thread alone uses it.
        """
        self._iterator, self._closed = iterator, threading.Event()
        self._taken = queue.Queue(maxsize=1)
        self._others = set(multiprocessing.active_children())  # processes that are not the iterator's
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._thread.start()

    def take(self, stop=lambda: False):
        """The next batch; None as soon as `stop()` holds and none is there.

        Raises:
          StopIteration: there is none any more.
          Exception: whatever the iterator raised.
        """
        while True:
            try:
                batch, error = self._taken.get(timeout=LOOK)
            except queue.Empty:
                if stop():
                    return None
                continue
            if error is not None:
                raise error
            return batch

    def close(self):
        """Ends the thread and closes the iterator; reader processes that do not end are killed."""
        self._closed.set()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            for child in set(multiprocessing.active_children()) - self._others:
                child.kill()
            self._thread.join(PATIENCE)

    def _read(self):
        try:
            while not self._closed.is_set():
                try:
                    found = next(self._iterator), None
                except BaseException as error:  # it is raised where the batch is asked for
                    found = None, error
                self._offer(found)
                if found[1] is not None:
                    return
        finally:
            self._iterator.close()

    def _offer(self, found):
        while not self._closed.is_set():
            try:
                self._taken.put(found, timeout=LOOK)
                return
            except queue.Full:
                continue
