"""Configs that compose the parts of several papers: they train and shard like any recipe.

Their packed rows and their cached generation are held by test_lmm.py.
"""

import jax
import numpy as np
import pytest

from lmm_jax.config import visual_layout
from lmm_jax.models.lmm import build
from lmm_jax.training.optimizer import split
from lmm_jax.training.step import eval_step, loss_and_grads

SHARDED = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


@pytest.mark.parametrize(("recipe", "strides"), [("qwen3vl_style", (1, 1)), ("hybrid", (2,))])
def test_the_data_knows_the_encoder_s_grid_and_the_decoder_its_stacks(tiny, recipe, strides):
    config = tiny(recipe=recipe)
    model = build(config.model)
    assert visual_layout(config).view_grid == (model.vision.grid,) * 2 == (6, 6)
    assert model.vision.level_strides == strides and len(model.level_projectors) == len(strides)
    assert len(model.decoder.inject_layers) == sum(n * n for n in strides)


@pytest.fixture(scope="module")
def case(setup):
    """Two steps on eight devices as (state, metrics), and loss, gradients and group losses of the first on one.

    Of the hybrid; the other's parts are those of recipes that others do.
    """
    many, one = setup(8, *SHARDED, recipe="hybrid"), setup(1, recipe="hybrid")
    steps, state = [], many.state
    for i in range(2):
        state, metrics = many.run(state, many.host_batch(i))
        steps.append((state, metrics))
    parts = split(one.state.params, one.program.rates)
    batch = one.place(one.host_batch(0))
    return steps, jax.jit(loss_and_grads, static_argnums=0)(one.program.model, *parts, batch)


@pytest.mark.long
def test_two_steps_are_finite_and_differ(case):
    (_, first), (state, second) = case[0]
    assert first["finite"] and second["finite"] and int(state.step) == 2 and int(state.skipped) == 0
    assert 1 < float(first["loss"]) < 8 and float(first["loss"]) != float(second["loss"])


def test_gradients_reach_every_parameter_of_every_layer(case):
    grads = case[1][1]
    assert {path.split("/")[0] for path in grads} >= {"projector", "level_projectors_0", "vision", "decoder"}
    for path, grad in grads.items():
        if path.endswith("/k/bias"):
            continue  # a softmax does not see what is added to all keys
        scanned = "layers/" in path or "blocks" in path
        by_layer = np.abs(grad).reshape(len(grad) if scanned else 1, -1).max(axis=1)
        assert (by_layer > (1e-5 if "projector" in path else 0)).all(), path


def test_eight_devices_give_the_losses_and_gradients_of_one(case):
    ((state, metrics), _), (loss, grads, group_loss, _) = case
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-5)
    np.testing.assert_allclose(metrics["group_loss"], group_loss, atol=1e-5)
    norm = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for path, moment in state.opt_state[1].mu.items():  # Adam's first is a tenth of the clipped gradient
        np.testing.assert_allclose(
            10 * np.asarray(moment), np.asarray(grads[path]) / max(norm, 1), atol=1e-5, err_msg=path
        )


@pytest.mark.parametrize("what", [eval_step, pytest.param(loss_and_grads, marks=pytest.mark.long)])
def test_pictures_on_a_wider_canvas_give_what_they_give_alone(setup, what):
    """ConvLLaVA's own aspect ratios, with the finer stage's stacks and both budgets: the canvas must not show."""
    alone = setup(1, recipe="hybrid")
    wider = setup(1, "data.aspect=own", "data.canvas=(24, 40)", recipe="hybrid")
    batch = wider.host_batch(0)
    assert batch["pixels"].shape[-3:-1] == (24, 40) and (batch["extent"] == 24).all()
    parts = (alone.state.params,) if what is eval_step else split(alone.state.params, alone.program.rates)
    run = jax.jit(what, static_argnums=0)
    a = run(alone.program.model, *parts, alone.place(alone.host_batch(0)))
    b = run(wider.program.model, *parts, wider.place(batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
