"""The whole model: packed copies, stacks from tiles, cached generation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.data.prepared import as_pictures, as_turns
from lmm_jax.training.optimizer import split
from lmm_jax.training.step import loss_and_grads


def nested(program, params, batch):
    """Loss, gradients and group losses without an update."""
    trainable, frozen = split(params, program.rates)
    return jax.jit(loss_and_grads, static_argnums=0)(program.model, trainable, frozen, batch)


def test_packed_copies_equal_one_scale_at_a_time(setup):
    s = setup(1, "train.scales_per_step=4", "data.length=256", "data.targets=80")
    batch = s.host_batch(0)
    loss, grads, group_loss, _ = nested(s.program, s.state.params, s.place(batch))
    losses, total = [], jax.tree.map(jnp.zeros_like, grads)
    for bit in range(4):
        one = {**batch, "group": batch["group"] & (1 << bit)}
        alone, of_one, _, _ = nested(s.program, s.state.params, s.place(one))
        losses.append(alone)
        total = jax.tree.map(lambda a, b: a + b / 4, total, of_one)
    np.testing.assert_allclose(group_loss, losses, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(losses), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, total)


def test_copies_in_other_rows_of_the_pack_give_the_same(setup):
    one_row = setup(1, "train.scales_per_step=4", "data.length=256", "data.targets=80")
    rows = setup(1, "train.scales_per_step=4", "data.rows=3", "data.length=96", "data.targets=80")
    a = nested(one_row.program, one_row.state.params, one_row.place(one_row.host_batch(0)))
    b = nested(rows.program, one_row.state.params, rows.place(rows.host_batch(0)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


@pytest.mark.parametrize(
    "recipe", ["m3", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen3vl_style", "hybrid"))]
)
def test_conversations_packed_with_their_pictures_give_what_each_gives_alone(setup, recipe):
    alone = setup(1, recipe=recipe)
    shape = ("data.rows=2", "data.length=256", "data.views=5", "data.targets=200", "train.batch_size=2")
    packed = setup(1, *shape, recipe=recipe)
    layout, scales, tokenizer = packed.packs.layout, (1, 9), alone.packs.tokenizer
    members = [alone.packs.members(p)[0][1] for p in range(8)]
    packs = []
    for numbers in (members[:4], members[4:]):
        records = [alone.packs.data[0][number] for number in numbers]
        segments, seen = [], [((24, 24), None)]  # a picture that is not shown moves the others
        for record in records:
            (picture,) = as_pictures(record)
            turns, first_grid = as_turns(record), len(seen)
            segments += layout.training_segments(turns, [picture.size], tokenizer, scales, first_grid)
            seen.append((picture.size, layout.see(picture)))
        packs.append(layout.assemble(segments, seen))
    together = {name: np.stack([p[name] for p in packs]) for name in packs[0]}
    a = nested(alone.program, alone.state.params, alone.place(alone.host_batch(0)))
    b = nested(alone.program, alone.state.params, packed.place(together))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_text_alone_needs_no_vision_pass_and_gives_the_same(setup):
    s = setup(1)
    batch = s.host_batch(0)
    batch["slot"] = np.full_like(batch["slot"], -1)
    a = nested(s.program, s.state.params, s.place(batch))
    del batch["pixels"]
    b = nested(s.program, s.state.params, s.place(batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
    assert float(np.abs(b[1]["vision/patches/kernel"]).max()) == 0.0


def test_deepstack_adds_the_features_that_lie_under_each_cell(setup):
    """Stacks against a mosaic that is assembled and strided by hand."""
    s = setup(1, recipe="deepstack")
    model, params = s.program.model, s.state.params
    bank, stacks, (features,) = seen(s)
    features = features.reshape(-1, 5, 3, 3, 16)
    projected = np.asarray(model.projector.apply({"params": params["projector"]}, features))
    np.testing.assert_allclose(bank, projected[:, 0].reshape(-1, 9, 32), atol=1e-5)
    top, bottom = (np.concatenate([projected[:, i], projected[:, i + 1]], axis=2) for i in (1, 3))
    mosaic = np.concatenate([top, bottom], axis=1)
    for k in range(4):
        want = mosaic[:, k // 2 :: 2, k % 2 :: 2].reshape(-1, 9, 32)
        np.testing.assert_allclose(stacks[k], want, atol=1e-5)


def seen(s, model=None):
    """Bank and stacks of a setup's first batch, and what the encoder returns, each `[pack, view, h, w, C]`."""
    model, params = model or s.program.model, s.state.params
    batch = s.host_batch(0)
    bank, stacks = jax.jit(functools.partial(model.apply, method="visual_tokens"))(
        {"params": params}, batch["pixels"], batch.get("gather")
    )
    pixels = batch["pixels"].reshape(-1, *batch["pixels"].shape[2:])
    features = jax.jit(model.vision.apply)({"params": params["vision"]}, pixels)
    G, V = batch["pixels"].shape[:2]
    return bank, stacks, [np.asarray(x).reshape(G, V, *x.shape[1:]) for x in features]


def projected(s, name, features):
    """Features of any shape through the projector `name`."""
    return np.asarray(s.program.model.projector.apply({"params": s.state.params[name]}, features))


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["qwen3vl_style", "hybrid"])
def test_stacks_of_levels_lie_over_their_cells_at_every_scale(setup, recipe):
    """Stack i · n + j of a map n times as fine has in cell (r, c) its cell (rn + i, cn + j), by its own projector."""
    s = setup(1, "data.rows=2", "data.length=256", "data.views=2", "data.targets=200", recipe=recipe)
    bank, stacks, (last, *levels) = seen(s)
    want_bank, want = [projected(s, "projector", last)], []
    for number, level in enumerate(levels):
        level = projected(s, f"level_projectors_{number}", level)
        n = level.shape[2] // 6
        want += [level[:, :, i::n, j::n] for i in range(n) for j in range(n)]
    assert len(want) == len(s.program.model.decoder.inject_layers) == len(stacks)
    layout = s.packs.layout
    for found, grids in zip([bank, *stacks], want_bank + want, strict=True):
        for scale in layout.scales:
            for unit, placed in enumerate(layout.place([(24, 24)] * 2)):
                k = 6 // int(scale**0.5)
                for token, slot in enumerate(layout.slots(dataclasses.replace(placed, first_grid=unit), scale)):
                    r, c = k * np.array(divmod(token, 6 // k))
                    cell = grids[:, unit, r : r + k, c : c + k].mean(axis=(1, 2))
                    np.testing.assert_allclose(found[:, slot], cell, atol=1e-5)


@pytest.fixture
def hd(setup):
    """DeepStack-L-HD at the size of digits, five units with four samples each, and one level of the encoder."""
    encoder = ("model.vision.depth=2", "model.vision.stack_levels=(1,)", "model.newline=True")
    decoder = ("model.decoder.depth=5", "model.decoder.inject_layers=(0,1,2,3,4)")
    visual = ("data.sequence=grid", "data.stacks=zoom", "data.zoom=2", "data.views=25", "data.length=120")
    return setup(1, *encoder, *decoder, *visual, recipe="deepstack")


def test_stacks_of_tiles_come_before_those_of_levels_which_are_of_what_the_bank_shows(hd):
    bank, stacks, (last, level) = seen(hd)
    assert bank.shape == (8, 46, 32) and stacks.shape == (5, 8, 46, 32)
    last = projected(hd, "projector", last)
    np.testing.assert_allclose(bank[:, :45], last[:, :5].reshape(8, 45, 32), atol=1e-5)
    level = projected(hd, "level_projectors_0", level[:, :5])
    np.testing.assert_allclose(stacks[4, :, :45], level.reshape(8, 45, 32), atol=1e-5)
    for unit in range(5):  # the top left cell of its first zoomed tile is its first sample's
        np.testing.assert_allclose(stacks[0, :, 9 * unit], last[:, 5 + 4 * unit, 0, 0], atol=1e-5)


def test_the_newline_is_one_vector_behind_the_bank_and_in_stacks_by_a_switch(hd):
    newline, slot = np.asarray(hd.state.params["image_newline"]), hd.packs.layout.newline
    assert slot == 45 and newline.shape == (32,) and np.abs(newline).min() > 0
    bank, stacks, _ = seen(hd)
    _, without, _ = seen(hd, hd.program.model.clone(newline_in_stacks=False))
    np.testing.assert_array_equal(bank[:, slot], np.tile(newline, (8, 1)))
    np.testing.assert_array_equal(stacks[:, :, slot], np.tile(newline, (5, 8, 1)))
    np.testing.assert_array_equal(without[:, :, slot], np.zeros((5, 8, 32)))
    np.testing.assert_array_equal(without[:, :, :slot], stacks[:, :, :slot])
    ends = np.flatnonzero(hd.host_batch(0)["slot"][0, 0] == slot)
    np.testing.assert_array_equal(np.diff(ends), [7] * 5)  # six rows of six cells and a newline


@pytest.mark.long
def test_deepstack_learns_from_its_stacks(setup):
    s = setup(8, recipe="deepstack")
    state, batch = s.state, s.host_batch(0)
    losses = []
    for _ in range(15):
        state, metrics = s.run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    blind = {**batch, "pixels": batch["pixels"].copy()}
    blind["pixels"][:, 1:] = 0
    assert abs(float(s.run(state, blind)[1]["loss"]) - float(s.run(state, batch)[1]["loss"])) > 1e-4
