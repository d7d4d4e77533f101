"""Batches come in order, one ahead; who waits for one can be asked to stop, and what is stuck is left behind."""

import threading
import time

import pytest

from lmm_jax.training.reader import Reader


class Source:
    """Gives numbers until it is stuck at one, or raises there."""

    def __init__(self, count=5, stuck=None, error=None):
        self.given, self.count, self.stuck, self.error = 0, count, stuck, error
        self.closed, self.released = threading.Event(), threading.Event()

    def __next__(self):
        if self.given == self.stuck:
            if self.error:
                raise self.error
            self.released.wait()
        if self.given == self.count:
            raise StopIteration
        self.given += 1
        return self.given

    def close(self):
        self.closed.set()


def test_batches_come_in_order_and_the_end_is_told():
    source = Source()
    reader = Reader(source)
    assert [reader.take() for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(StopIteration):
        reader.take()
    reader.close()
    assert source.closed.is_set()


def test_no_more_than_one_is_read_ahead():
    source = Source(count=100)
    reader = Reader(source)
    reader.take()
    time.sleep(0.2)
    assert source.given <= 3
    reader.close()
    assert source.closed.is_set()


def test_an_error_is_raised_where_its_batch_is_asked_for():
    reader = Reader(Source(stuck=2, error=OSError("broken")))
    assert [reader.take(), reader.take()] == [1, 2]
    with pytest.raises(OSError, match="broken"):
        reader.take()
    reader.close()


def test_waiting_ends_when_it_is_asked_to_but_not_before_what_is_there():
    source = Source(stuck=2)
    reader = Reader(source)
    time.sleep(0.2)
    assert [reader.take(lambda: True), reader.take(lambda: True)] == [1, 2]
    begin = time.monotonic()
    assert reader.take(lambda: time.monotonic() > begin + 0.2) is None
    assert time.monotonic() - begin < 1
    source.released.set()
    reader.close()


def test_what_is_stuck_does_not_keep_it_from_closing(monkeypatch):
    monkeypatch.setattr("lmm_jax.training.reader.PATIENCE", 0.1)
    source = Source(stuck=0)
    begin = time.monotonic()
    Reader(source).close()
    assert time.monotonic() - begin < 1 and not source.closed.is_set()
    source.released.set()
