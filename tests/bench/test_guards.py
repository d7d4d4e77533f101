"""The rows of what guards cost; no test looks at a clock."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.bench import guards


class Step:
    """A step that is not compiled, of a state that is small."""

    def __init__(self, program, batch, max_skipped, skip_spikes):
        self.what, self.metrics = "without" if max_skipped is None else "with", {}
        self.state = types.SimpleNamespace(params={"x": jnp.zeros(3)}, opt_state=(), step=0)

    def __call__(self):
        return self.metrics


def test_every_place_has_its_share_and_all_together_theirs(monkeypatch, shape_file):
    seconds = iter([2.0, 2.2, 4.0, 4.4, 3.0, 3.3])
    monkeypatch.setattr(guards, "time_steps", lambda step, steps, what, **_: (step(), next(seconds, 5.0))[1])
    monkeypatch.setattr(guards, "_time_host", lambda batch, metrics: 0.03)
    monkeypatch.setattr(guards, "_Step", Step)
    monkeypatch.setattr(guards, "check_replicas", lambda state: None)
    rows = {row.name: row for row in guards.bench_guards(shape_file, "float32", 3)}
    assert rows["a step without guards"].value == 3.0
    assert rows["guards in the step"].ratio == pytest.approx(0.1)
    assert rows["guards on the host, each step"].ratio == pytest.approx(0.01)
    assert rows["guards before a save, every 500 steps"].value == pytest.approx(0.01)
    assert rows["all guards"].ratio == pytest.approx(0.1 + 0.01 + 0.01 / 3)


@pytest.mark.long
def test_the_guards_of_a_small_model_are_timed(shape_file):
    rows = guards.bench_guards(shape_file, "float32", 2)
    assert [row.unit for row in rows] == ["s"] * 5 and all(row.value is not None for row in rows)


def test_what_the_host_does_is_done(shape_file):
    metrics = {name: jnp.zeros(()) for name in ("skipped_in_row", "spike")} | {"finite": jnp.ones(())}
    assert guards._time_host({"id": np.zeros(3)}, metrics) > 0
