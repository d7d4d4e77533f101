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
    fields |= dict(moments="float32", second_moment="full")
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


def test_random_rounding_is_right_on_average_and_exact_where_it_can_be():
    x = jnp.full(100_000, 1 + 1 / 1024, jnp.float32)  # a quarter of the way from one bfloat16 number to the next
    found = optimizer.round_at_random(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(found)) == {1, 1 + 1 / 128}
    np.testing.assert_allclose((found > 1).mean(), 1 / 8, atol=0.01)
    exact = jnp.asarray([0, 1, -2.5, 1e-30, jnp.inf], jnp.bfloat16).astype(jnp.float32)
    assert np.array_equal(optimizer.round_at_random(exact, jax.random.key(1)).astype(jnp.float32), exact)


def test_moments_in_bfloat16_follow_those_in_float32():
    """A second moment with b2 = 0.999 would stay where it is if it were rounded to the nearest."""
    params, rng = {"a/kernel": jnp.zeros((64, 64))}, np.random.default_rng(0)
    whole, half = (
        optimizer.make_optimizer(config(moments=kind), 10, {"a/kernel": 1.0}) for kind in ("float32", "bfloat16")
    )
    states = [tx.init(params) for tx in (whole, half)]
    assert states[1][1].mu["a/kernel"].dtype == states[1][1].nu["a/kernel"].dtype == jnp.bfloat16
    steps = [jax.jit(tx.update) for tx in (whole, half)]
    for n in range(300):
        grads = {"a/kernel": jnp.asarray(rng.normal(size=(64, 64)) * (1 if n < 100 else 3), jnp.float32)}
        states = [step(grads, state, params)[1] for step, state in zip(steps, states, strict=True)]
    want, found = (state[1].nu["a/kernel"].astype(jnp.float32) for state in states)
    np.testing.assert_allclose(found.mean(), want.mean(), rtol=0.01)
    assert np.abs(found / want - 1).mean() < 0.05
    again = half.init(params)
    for n in range(2):
        again = steps[1]({"a/kernel": jnp.full((64, 64), 0.1 + n)}, again, params)[1]
        if n == 0:
            resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), again)
    resumed = steps[1]({"a/kernel": jnp.full((64, 64), 1.1)}, resumed, params)[1]
    jax.tree.map(np.testing.assert_array_equal, again, resumed)


def test_a_factored_second_moment_keeps_rows_and_columns_and_descends():
    params = {"a/kernel": jnp.ones((3, 256, 128)), "a/bias": jnp.ones(128)}
    rates = dict.fromkeys(params, 1.0)
    tx = optimizer.make_optimizer(config(second_moment="factored", moments="bfloat16"), 10, rates)
    state = tx.init(params)
    sizes = sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)
    assert sizes == [128, 128, 3 * 128, 3 * 256, 3 * 256 * 128]  # and the first moment
    for _ in range(3):
        updates, state = tx.update(params, state, params)  # of half the square
        params = optax.apply_updates(params, jax.tree.map(lambda x: 0.1 * x, updates))
    assert all(float(x.max()) < 1 for x in params.values())


def test_every_moment_has_a_planned_sharding():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor"))
    param = jax.ShapeDtypeStruct((3, 256, 128), jnp.float32)
    want = {
        (3, 256, 128): jax.P(None, "fsdp", "tensor"),
        (3, 256): jax.P(None, "fsdp"),
        (3, 128): jax.P(None, "tensor"),
        (1,): jax.P(),
    }
    for shape, spec in want.items():
        moment = jax.ShapeDtypeStruct(shape, jnp.float32)
        assert optimizer.moment_sharding(moment, param, placed).spec == spec
