"""The whole model: packed copies, stacks from tiles, cached generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.data.prepared import as_pictures, as_turns
from lmm_jax.generation import generate_tokens
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


def test_conversations_packed_with_their_pictures_give_what_each_gives_alone(setup):
    alone = setup(1)
    packed = setup(1, "data.rows=2", "data.length=256", "data.views=5", "data.targets=200", "train.batch_size=2")
    layout, scales, tokenizer = packed.packs.layout, (1, 9), alone.packs.tokenizer
    members = [alone.packs.members(p)[0][1] for p in range(8)]
    packs = []
    for rows in (members[:4], members[4:]):
        records = [alone.packs.data[0][row] for row in rows]
        segments, seen = [], [((24, 24), None)]  # a picture that is not shown moves the others
        for record in records:
            (picture,) = as_pictures(record)
            segments += layout.training_segments(as_turns(record), [picture.size], tokenizer, scales, unit=len(seen))
            seen.append((picture.size, layout.see(picture)))
        packs.append(layout.assemble(segments, seen))
    together = {name: np.stack([p[name] for p in packs]) for name in packs[0]}
    a = nested(alone.program, alone.state.params, alone.place(alone.host_batch(0)))
    b = nested(alone.program, alone.state.params, packed.place(together))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_text_alone_needs_no_vision_pass_and_gives_the_same(setup):
    s = setup(8)
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
    batch = {name: jnp.asarray(x) for name, x in s.host_batch(0).items()}
    bank, stacks = model.apply({"params": params}, batch["pixels"], batch["source"], method="visual_tokens")
    pixels = batch["pixels"].reshape(-1, *batch["pixels"].shape[2:])
    features = model.vision.apply({"params": params["vision"]}, pixels).reshape(-1, 5, 3, 3, 16)
    projected = np.asarray(model.projector.apply({"params": params["projector"]}, features))
    np.testing.assert_allclose(bank, projected[:, 0].reshape(-1, 9, 32), atol=1e-5)
    top, bottom = (np.concatenate([projected[:, i], projected[:, i + 1]], axis=2) for i in (1, 3))
    mosaic = np.concatenate([top, bottom], axis=1)
    for k in range(4):
        want = mosaic[:, k // 2 :: 2, k % 2 :: 2].reshape(-1, 9, 32)
        np.testing.assert_allclose(stacks[k], want, atol=1e-5)


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


@pytest.mark.parametrize("recipe", ["m3", "deepstack"])
def test_cached_generation_equals_rereading_everything(setup, recipe):
    s = setup(8, recipe=recipe)
    model, params = s.program.model, s.state.params
    layout, tokenizer = s.packs.layout, s.packs.tokenizer
    scale, new = layout.scales[-1], 6
    requests = [("digit at b2?", 0), ("how many 7s are there?", 1), ("read all", 2)]
    layout = dataclasses.replace(layout, scales=(scale,), rows=1, length=64, targets=0)

    def batch_of(suffixes):
        packs = []
        for (question, row), suffix in zip(requests, suffixes, strict=True):
            pictures = as_pictures(s.packs.data[0][row])
            sizes = [picture.size for picture in pictures]
            (segment,) = layout.segments([("user", f"<image>\n{question}")], sizes, tokenizer, (scale,))
            longer = dataclasses.replace(
                segment,
                id=np.concatenate([segment.id, suffix]).astype(np.int32),
                slot=np.concatenate([segment.slot, np.full(len(suffix), -1)]).astype(np.int32),
                target=np.concatenate([segment.target, np.full(len(suffix), -1)]).astype(np.int32),
            )
            packs.append(layout.assemble([longer], [(p.size, layout.see(p)) for p in pictures]))
        return {name: jnp.stack([p[name] for p in packs]) for name in packs[0]}

    cached, lengths = jax.jit(generate_tokens, static_argnums=(0, 3, 4, 5))(
        model, params, batch_of([[]] * 3), scale, new, -1
    )
    assert (lengths == new).all()

    @jax.jit
    def next_token(batch):
        last = (batch["segment"][:, 0] > 0).sum(-1) - 1
        h = model.clone(scales=(scale,)).apply({"params": params}, batch)
        return model.apply({"params": params}, h[jnp.arange(3), 0, last], method="logits").argmax(-1)

    suffixes = np.zeros((3, 0), np.int32)
    for _ in range(new):
        suffixes = np.concatenate([suffixes, np.asarray(next_token(batch_of(suffixes)))[:, None]], axis=1)
    np.testing.assert_array_equal(cached, suffixes)
