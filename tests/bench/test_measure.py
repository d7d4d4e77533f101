"""Rows of a table, and the ceilings that they are compared with; times are given, not taken."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from lmm_jax.bench import measure
from lmm_jax.bench.measure import Measurement


def test_a_row_says_what_it_is_compared_with_or_why_nothing_was_measured():
    rows = [
        Measurement("train", 12345.678, "ms", 0.5, "the peer"),
        Measurement("m3", None, "ms", against="does not fit into memory"),
        Measurement("positions", 28, "positions"),
    ]
    first, second, third = measure.table(rows).splitlines()
    assert first.split() == ["train", "12,346", "ms", "0.50", "×", "the", "peer"]
    assert second.split()[:3] == ["m3", "–", "ms"] and second.endswith("does not fit into memory")
    assert third.split() == ["positions", "28", "positions"]


def test_the_warm_up_is_not_counted(monkeypatch, capsys):
    clock = itertools.accumulate([0, 90, 0, 4, 0, 1, 0, 3])  # seconds between begin and end of each call
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert measure.time_steps(lambda: calls.append(1), 3, "a step") == 3
    assert len(calls) == 4 and capsys.readouterr().err.count("a step: ") == 4


def test_rates_are_operations_and_bytes_by_the_least_time(monkeypatch):
    """A ceiling is what a machine can do: of several times the shortest."""
    asked = []

    def time_steps(step, steps, what, of):
        asked.append((jax.block_until_ready(step()), of))
        return 2.0

    monkeypatch.setattr(measure, "time_steps", time_steps)
    assert measure.matmul_rate("float32") == 16 * 2 * 32**3 / 2
    assert measure.copy_rate() == 2 * 4096 / 2
    (product, first), (copy, second) = asked
    assert first is second is min
    assert product.shape == (32, 32) and product.dtype == jnp.float32 and (product == 1).all()
    assert copy.nbytes == 4096


def test_a_peer_of_a_tpu_is_refused(monkeypatch):
    class Done:
        stdout = "tpu\n"

    monkeypatch.setattr(measure.subprocess, "run", lambda *args, **options: Done)
    with pytest.raises(ValueError, match="--peer runs on a CPU or a GPU, and this is a tpu"):
        measure.peer_device()
    Done.stdout = "gpu\n"
    assert measure.peer_device() == "cuda"
