"""The router: what it reads and what not, what it learns from, and that nothing else changes by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.config import ConfigError
from lmm_jax.models.router import Router
from lmm_jax.training import optimizer
from lmm_jax.training.state import make_program
from lmm_jax.training.step import loss_and_grads, token_losses
from tests.conftest import Setup

ROUTER = ("model.router.width=8", "model.router.heads=2", "model.router.tokens=8")
ALL_SCALES = ("train.scales_per_step=4", "data.length=404", "data.views=2", "data.targets=160")
FROZEN = ('optimizer.groups=(("vision", 0.0), ("projector", 0.0), ("decoder", 0.0))',)
SHARDED = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2")
OF_ROUTER = ("question", "question_grids", "answer")


@pytest.fixture(scope="module")
def head():
    """A router, its parameters, and what it is given: packs of three grids and two questions of four words."""
    router, key = Router(scales=3, width=8, heads=2), jax.random.key(0)
    grids = jax.random.normal(key, (2, 3, 2, 2, 6))
    words = jax.random.normal(jax.random.key(1), (2, 2, 4, 6))
    shown = jnp.array([[[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [1, 1, 1]]], bool)
    real = jnp.array([[[1, 1, 1, 1], [1, 1, 0, 0]], [[1, 0, 0, 0], [1, 1, 1, 0]]], bool)
    params = router.init(key, grids, shown, words, real)
    return functools.partial(router.apply, params), grids, shown, words, real


def test_only_grids_that_are_shown_and_words_that_are_there_count(head):
    run, grids, shown, words, real = head
    logits = run(grids, shown, words, real)
    assert logits.shape == (2, 2, 3) and logits.dtype == jnp.float32
    changed = jnp.where(shown[0, 0][:, None, None, None], grids[0], 7.0)
    np.testing.assert_allclose(run(grids.at[0].set(changed), shown, words, real)[0, 0], logits[0, 0], atol=1e-6)
    assert (run(grids.at[0].set(changed), shown, words, real)[0, 1] != logits[0, 1]).any()
    padded = jnp.where(real[..., None], words, 7.0)
    np.testing.assert_allclose(run(grids, shown, padded, real), logits, atol=1e-6)
    assert (run(grids, shown, words[::-1], real) != logits).all()


def test_more_room_for_grids_questions_and_words_changes_nothing(head):
    run, grids, shown, words, real = head
    wide = (
        jnp.pad(grids, ((0, 0), (0, 2), (0, 0), (0, 0), (0, 0)), constant_values=3.0),
        jnp.pad(shown, ((0, 0), (0, 1), (0, 2))),
        jnp.pad(words, ((0, 0), (0, 1), (0, 3), (0, 0)), constant_values=3.0),
        jnp.pad(real, ((0, 0), (0, 1), (0, 3))),
    )
    found = run(*wide)
    np.testing.assert_allclose(found[:, :2], run(grids, shown, words, real), atol=1e-6)
    assert jnp.isfinite(found).all()  # of a question without pictures and without words too


def test_a_router_needs_something_to_choose_from_and_heads_that_divide_it(tiny):
    with pytest.raises(
        ConfigError, match=r"model\.router\.width=8: .* several scales .* model\.scales=\(36,\) is one"
    ):
        tiny(*ROUTER, recipe="full")
    with pytest.raises(ConfigError, match=r"model\.router\.width=8 does not divide into model\.router\.heads=3"):
        tiny(*ROUTER, "model.router.heads=3")


def run(s, batch, program=None, params=None):
    """`loss_and_grads` on a host batch of a setup's program, or of another; parameters as those of the setup."""
    program = program or s.program
    params = s.state.params if params is None else params
    with program.use():
        params = jax.device_put(params, program.shardings.params)
        placed = Setup(program).place(batch)
        parts = optimizer.split(params, program.rates)
        return jax.jit(loss_and_grads, static_argnums=0)(program.model, *parts, placed)


@pytest.fixture(scope="module")
def packed(setup):
    """A setup whose packs hold several mosaics at all scales, a batch of it, and what the step makes of that."""
    s = setup(1, *ROUTER, *ALL_SCALES)
    batch = s.host_batch(0)
    assert (batch["segment"].max(axis=(1, 2)) >= 8).any()  # two mosaics of four copies
    return s, batch, run(s, batch)


@pytest.fixture(scope="module")
def plan(tiny):
    """`plan(devices, *overrides)`: the program of such a run on so many devices, without a state."""

    def make(devices, *overrides):
        config = tiny(*ALL_SCALES, *overrides)
        return make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))

    return make


def test_labels_are_what_separate_forward_passes_make_of_each_answer(packed):
    """By hand: each copy of a conversation alone in a row, its probabilities, and logits of `expect` one by one."""
    s, batch, (_, _, losses, counts) = packed
    model, params = s.program.model, {"params": s.state.params}
    expect = jax.jit(functools.partial(model.apply, method="expect"))
    see = jax.jit(functools.partial(model.apply, method="grids"))
    logprobs = jax.jit(lambda batch: -token_losses(model.clone(router=None), plain, batch)[0])
    plain = {name: x for name, x in s.state.params.items() if name != "router"}
    sums, numbers = np.zeros(4), np.zeros(4)
    for pack in range(2):
        arrays = {name: x[pack] for name, x in batch.items()}
        grids = see(params, arrays["pixels"][None])[0][0]  # the bank's, of the only path
        probability = np.zeros((len(arrays["question"]), 4))
        for number in range(1, arrays["segment"].max() + 1):
            of_copy = arrays["segment"] == number
            own = of_copy.reshape(-1)[arrays["target_at"]] & (arrays["group"] > 0)
            alone = {name: np.where(of_copy, arrays[name], 0) for name in ("id", "position", "segment")}
            alone |= {name: arrays[name] for name in ("target_at", "target", "pixels")}
            alone["slot"] = np.where(of_copy, arrays["slot"], -1)
            found = np.asarray(logprobs({name: x[None] for name, x in alone.items()}))[0]
            scale = int(np.log2(arrays["group"][own][0]))
            for question in np.unique(arrays["answer"][own & (arrays["answer"] >= 0)]):
                probability[question, scale] = np.exp(found[own & (arrays["answer"] == question)].mean())
        for question in np.flatnonzero(arrays["question_grids"].any(axis=1)):
            shown, ids = (arrays[name][question][None] for name in ("question_grids", "question"))
            expected = np.asarray(expect(params, grids, shown > 0, ids), np.float64)[0]
            label = probability[question]
            assert (label > 0).all()
            sums -= label * np.log(expected) + (1 - label) * np.log(1 - expected)
            numbers += 1
    few = {name: np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) < 2, x, 0) for name, x in batch.items()}
    _, _, losses, counts = run(s, few)
    np.testing.assert_array_equal(counts[4:], numbers)
    np.testing.assert_allclose(losses[4:] * counts[4:], sums, rtol=1e-4)


def test_the_model_s_loss_and_gradient_are_those_of_one_without_a_router(plan, packed):
    s, batch, (loss, grads, losses, counts) = packed
    params = {name: x for name, x in s.state.params.items() if name != "router"}
    old = {name: x for name, x in batch.items() if name not in OF_ROUTER}
    want, want_grads, want_losses, want_counts = run(s, old, plan(1), params)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(losses[:4], want_losses, rtol=1e-6)
    np.testing.assert_array_equal(counts[:4], want_counts)
    assert {path.split("/")[0] for path in grads.keys() - want_grads.keys()} == {"router"}
    for path, grad in want_grads.items():
        np.testing.assert_allclose(grads[path], grad, atol=1e-6, err_msg=path)
    for path, grad in grads.items():
        assert np.abs(grad).max() > 0 or path.endswith("/k/bias"), path


def test_with_all_else_frozen_the_router_s_gradient_is_the_same_on_any_devices(plan, packed):
    """On one device, and on four with micro-batches."""
    s, batch, (loss, grads, losses, counts) = packed
    for program in (plan(1, *ROUTER, *FROZEN), plan(4, *ROUTER, *FROZEN, *SHARDED, "train.micro_batches=2")):
        found_loss, found, found_losses, found_counts = run(s, batch, program)
        np.testing.assert_allclose(found_loss, loss, atol=1e-5)
        np.testing.assert_allclose(found_losses, losses, atol=1e-5)
        np.testing.assert_array_equal(found_counts, counts)
        assert {path.split("/")[0] for path in found} == {"router"}
        for path, grad in found.items():
            np.testing.assert_allclose(grad, grads[path], atol=1e-5, err_msg=path)


def test_scales_that_do_not_train_in_a_step_and_text_alone_have_no_part(packed):
    s, batch, _ = packed
    one = batch | {"group": np.where(batch["group"] == 2, 2, 0)}  # as of a step of one scale
    _, _, losses, counts = run(s, one)
    np.testing.assert_array_equal(counts[4:] > 0, [False, True, False, False])
    np.testing.assert_array_equal(losses[4:] > 0, [False, True, False, False])
    unseen = batch | {"question_grids": np.zeros_like(batch["question_grids"])}
    _, grads, _, counts = run(s, unseen)
    assert not counts[4:].any() and not any(x.any() for path, x in grads.items() if path.startswith("router"))
    text = {name: x for name, x in batch.items() if name not in ("pixels", *OF_ROUTER)}
    text["slot"] = np.full_like(batch["slot"], -1)
    loss, grads, losses, counts = run(s, text)
    assert np.isfinite(loss) and not losses[4:].any() and not counts[4:].any()
    assert not any(x.any() for path, x in grads.items() if path.startswith("router"))
