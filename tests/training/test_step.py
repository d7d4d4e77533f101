"""The step on real meshes: sharding, accumulation and precision change nothing but rounding."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmm_jax import sharding
from lmm_jax.aot.compile import abstract_batch
from lmm_jax.training import optimizer
from lmm_jax.training.state import make_program
from lmm_jax.training.step import token_losses

SHARDED = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
FOUR_MICRO_BATCHES = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4", "train.micro_batches=4")


def losses_over(setup, steps):
    state, losses = setup.state, []
    for i in range(steps):
        state, metrics = setup.run(state, setup.host_batch(i % 4))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def one_device(setup):
    return losses_over(setup(1), 20)


def test_eight_devices_give_the_losses_of_one(setup, one_device):
    losses, _ = losses_over(setup(8, *SHARDED), 20)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    assert one_device[0][-1] < one_device[0][0] - 1  # the comparison is of a run that learns


def test_fsdp_and_tensor_sharding_are_really_applied(setup):
    s = setup(8, *SHARDED)
    sharding.assert_sharded(s.state, s.program.shardings, "train state")
    state, _ = s.run(s.state, s.host_batch(0))
    sharding.assert_sharded(state, s.program.shardings, "train state")
    up = state.params["decoder"]["layers"]["up"]["kernel"]
    assert up.sharding.spec == P(None, "fsdp", "tensor")
    assert up.addressable_shards[0].data.shape == (3, 16, 32)
    moment = state.opt_state[1].mu["decoder/layers/up/kernel"]
    assert moment.sharding.is_equivalent_to(up.sharding, 3)


def test_accumulation_equals_one_batch(setup):
    whole, accumulated = setup(8, *SHARDED), setup(8, *FOUR_MICRO_BATCHES)
    for i in range(2):  # the first steps of both recipes of scales
        batch = whole.host_batch(i)
        a, m = whole.run(whole.state, batch)
        b, n = accumulated.run(whole.state, batch)
        np.testing.assert_allclose(m["loss"], n["loss"], atol=1e-5)
        np.testing.assert_allclose(m["grad_norm"], n["grad_norm"], atol=1e-5)
        np.testing.assert_allclose(m["group_loss"], n["group_loss"], atol=1e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a.params, b.params)


def test_accumulation_counts_targets_over_all_micro_batches(setup):
    """Micro-batches with very different numbers of targets: a mean of means would differ."""
    whole, accumulated = setup(8, *SHARDED), setup(8, *FOUR_MICRO_BATCHES)
    batch = whole.host_batch(0)
    batch["group"] = batch["group"].copy()
    batch["group"][4:, 3:] = 0
    a, b = (s.run(whole.state, batch)[1]["loss"] for s in (whole, accumulated))
    np.testing.assert_allclose(a, b, atol=1e-5)
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        part = {k: np.concatenate([v[half], v[half]]) for k, v in batch.items()}
        halves.append(float(whole.run(whole.state, part)[1]["loss"]))
    assert abs(np.mean(halves) - float(a)) > 1e-3


def test_a_batch_that_is_not_finite_changes_nothing_and_is_counted(setup):
    s = setup(8, *SHARDED)
    state, _ = s.run(s.state, s.host_batch(0))
    broken = jax.tree.map(lambda x: x, state.params)
    broken["decoder"]["norm"]["scale"] = broken["decoder"]["norm"]["scale"] * np.nan
    bad, metrics = s.run(state.replace(params=broken), s.host_batch(0))
    assert not metrics["finite"] and int(bad.skipped) == int(bad.skipped_in_row) == 1
    for old, new in ((broken, bad.params), (state.opt_state, bad.opt_state)):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    good, metrics = s.run(bad.replace(params=state.params), s.host_batch(0))
    assert metrics["finite"] and int(good.skipped) == 1 and int(good.skipped_in_row) == 0


def test_no_targets_give_no_loss_and_no_gradient(setup):
    s = setup(8, *SHARDED)
    batch = s.host_batch(0)
    batch["group"] = np.zeros_like(batch["group"])
    _, metrics = s.run(s.state, batch)
    assert float(metrics["loss"]) == 0.0 and float(metrics["grad_norm"]) == 0.0


def test_frozen_parts_stay_and_have_no_state(setup):
    s = setup(1, 'optimizer.groups=(("vision", 0.0),)', recipe="full")
    state, _ = s.run(s.state, s.host_batch(0))
    state, _ = s.run(state, s.host_batch(1))
    jax.tree.map(np.testing.assert_array_equal, s.state.params["vision"], state.params["vision"])
    assert not any(path.startswith("vision") for path in state.opt_state[1].mu)
    moved = np.abs(
        state.params["projector"]["linear_0"]["kernel"] - s.state.params["projector"]["linear_0"]["kernel"]
    )
    assert moved.max() > 0


@pytest.mark.parametrize("where", [(1,), pytest.param((8, *SHARDED), marks=pytest.mark.long)])
def test_bfloat16_compute_stays_near_float32(setup, one_device, where):
    losses, state = losses_over(setup(*where, "model.dtype=bfloat16"), 20)
    np.testing.assert_allclose(losses, one_device[0], atol=0.1)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(tiny, trained):
    """Of the encoder only what enters the projector is kept; if it trains, each block's input at least."""
    rate = 1e-4 if trained else 0.0
    program = make_program(tiny(f'optimizer.groups=(("vision", {rate}),)', "train.scales_per_step=1"))
    batch = {name: x.update(shape=x.shape[1:]) for name, x in abstract_batch(program.config, program.mesh).items()}
    trainable, frozen = optimizer.split(nn.unbox(program.boxed), program.rates)

    def kept(trainable, frozen, batch):
        def losses(trainable):
            return token_losses(program.model, optimizer.merge(trainable, frozen), batch)[0]

        return jax.vjp(losses, trainable)[1]

    with program.use():
        shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(kept, trainable, frozen, batch)) if x.ndim > 2]
    G, width = 8, 16
    of_tower = [shape for shape in shapes if shape[-1] == width and G in shape]
    assert len(of_tower) == 1 if not trained else len(of_tower) > 2
