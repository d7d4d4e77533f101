"""Rates by path, freezing, clipping, decay."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from lmm_jax.training import optimizer

PARAMS = {
    "vision": {"patches": {"kernel": jnp.ones((4, 4))}, "norm": {"scale": jnp.ones(4)}},
    "projector": {"linear_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}},
    "decoder": {"table": jnp.ones((4, 4))},
}
PATHS = optimizer.flatten_dict(PARAMS, sep="/")


def config(**kwargs):
    fields = dict(learning_rate=1e-2, groups=(), warmup=0.0, final=1.0, b1=0.9, b2=0.999, weight_decay=0.0, clip=0.0)
    return ml_collections.ConfigDict(fields | kwargs)


def first_update(c, grads=None):
    rates = optimizer.rates(c, PATHS)
    trainable, _ = optimizer.split(PARAMS, rates)
    tx = optimizer.make_optimizer(c, 10, rates)
    grads = trainable if grads is None else grads
    state = tx.init(trainable)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, grads), state, trainable)  # the warm-up's first step is 0
    return tx.update(grads, state, trainable)[0]


def test_groups_take_the_first_match_and_zero_freezes():
    c = config(groups=(("vision/norm", 3e-4), ("vision", 0.0), ("projector/", 1e-3)))
    rates = optimizer.rates(c, PATHS)
    assert rates == {
        "vision/patches/kernel": 0.0,
        "vision/norm/scale": 3e-4,
        "projector/linear_0/kernel": 1e-3,
        "projector/linear_0/bias": 1e-3,
        "decoder/table": 1e-2,
    }
    trainable, frozen = optimizer.split(PARAMS, rates)
    assert set(frozen) == {"vision/patches/kernel"} and len(trainable) == 4
    merged = optimizer.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)


def test_rates_act():
    updates = first_update(config(groups=(("projector", 1e-3),)))
    ratio = float(updates["decoder/table"][0, 0] / updates["projector/linear_0/kernel"][0, 0])
    np.testing.assert_allclose(ratio, 10.0, rtol=1e-5)
    assert float(updates["decoder/table"][0, 0]) < 0


def test_each_group_moves_by_its_own_rate_and_frozen_parts_stay():
    """A constant gradient moves Adam by the rate itself, whatever the gradient's size."""
    c = config(groups=(("vision/norm", 3e-4), ("vision", 0.0), ("projector", 1e-3)), warmup=0.5, final=0.0)
    rates = optimizer.rates(c, PATHS)
    trainable, frozen = optimizer.split(PARAMS, rates)
    tx, rng = optimizer.make_optimizer(c, 10, rates), np.random.default_rng(0)
    grads = {path: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for path, x in trainable.items()}
    state, moved = tx.init(trainable), trainable
    for _ in range(4):
        updates, state = tx.update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    after = optimizer.flatten_dict(optimizer.merge(moved, frozen), sep="/")
    travelled = 0.0 + 0.2 + 0.4 + 0.6  # of the peak: five steps of warm-up
    for path, rate in {
        "vision/patches/kernel": 0.0,
        "vision/norm/scale": 3e-4,
        "projector/linear_0/bias": 1e-3,
        "decoder/table": 1e-2,
    }.items():
        expected = 1.0 - (travelled * rate * np.sign(grads[path]) if rate else 0.0)
        np.testing.assert_allclose(after[path], np.broadcast_to(expected, after[path].shape), rtol=1e-6)
    np.testing.assert_array_equal(after["vision/patches/kernel"], PATHS["vision/patches/kernel"])


def test_a_prefix_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no parameter lies under 'vison'"):
        optimizer.rates(config(groups=(("vison", 0.0),)), PATHS)
    with pytest.raises(ValueError, match="no parameter lies under 'vis'"):
        optimizer.rates(config(groups=(("vis", 0.0),)), PATHS)


def test_decay_goes_by_name():
    plain, decayed = first_update(config()), first_update(config(weight_decay=0.5))
    for path in plain:
        changed = not np.allclose(plain[path], decayed[path])
        assert changed == (path.split("/")[-1] in ("kernel", "table")), path


def test_clipping_sees_all_groups_together():
    c = config(clip=1.0, groups=(("projector", 1e-3),))
    rates = optimizer.rates(c, PATHS)
    trainable, _ = optimizer.split(PARAMS, rates)
    tx = optimizer.make_optimizer(c, 10, rates)
    _, state = tx.update(trainable, tx.init(trainable), trainable)
    first_moment = state[1].mu
    norm = np.sqrt(sum(float((m**2).sum()) for m in first_moment.values())) / 0.1
    np.testing.assert_allclose(norm, 1.0, rtol=1e-5)


def test_schedule_warms_up_and_decays():
    schedule = optimizer.schedule(config(warmup=0.1, final=0.1), 100)
    np.testing.assert_allclose([schedule(0), schedule(5), schedule(10), schedule(100)], [0, 0.5, 1, 0.1], atol=1e-6)
