"""The vision transformer's levels and its regrouping of tiles, against blocks in a Python loop."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.models.encoders.vit import ViT, ViTBlock, class_attention
from lmm_jax.models.layers import LayerNorm, normalise

SMALL = {"image_size": 8, "patch_size": 2, "width": 12, "depth": 7, "heads": 2, "mlp_dim": 20, "level": -2}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)


def varied(model, pixels):
    """Random parameters, as numpy arrays."""
    rng = np.random.default_rng(1)
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), pixels)))["params"]
    return jax.tree.map(lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes)


def unrolled(model, params, pixels, regroup=None):
    """Every hidden state without its class token, `[N, g, g, C]`, block by block.

    Args:
      regroup: `f(x) -> (x, added)` where tiles enter: what goes on, and what is added to it before each later block.
    """
    g, p = model.grid, model.patch_size
    x = np.asarray(normalise(pixels, model.mean, model.std)).reshape(-1, g, p, g, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), g * g, -1) @ params["patches"]["kernel"]
    cls = jnp.broadcast_to(params["cls"], (len(x), 1, model.width))
    x = LayerNorm(model.norm_eps).apply(
        {"params": params["norm_pre"]}, jnp.concatenate([cls, x], 1) + params["position"]
    )
    module, states, added = ViTBlock(model.heads, model.mlp_dim, model.norm_eps, model.dtype), [], []
    block = jax.jit(lambda variables, x: module.apply(variables, x, None, None)[0])
    for i in range(model.depth + 1 + model.level):
        (start,) = (start for start, end in model.runs() if start <= i < end)
        if regroup is not None and i == model.regroup[0]:
            x, added = regroup(x)
        states.append(x[:, 1:].reshape(-1, g, g, model.width))
        if added:
            x = x.at[:, 1:].add(added.pop(0))
        x = block({"params": jax.tree.map(lambda leaf, n=i - start: leaf[n], params[f"blocks_{start}"])}, x)
    if added:  # what a block past the last would be given
        x = x.at[:, 1:].add(added[0])
    return [*states, x[:, 1:].reshape(-1, g, g, model.width)]


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, [(0, 6)]),
        ({"level": -1}, [(0, 7)]),
        ({"stack_levels": (4, 2)}, [(0, 2), (2, 4), (4, 6)]),
        ({"stack_levels": (-3,)}, [(0, 5), (5, 6)]),
        ({"regroup": (2, 2)}, [(0, 2), (2, 6)]),
        ({"regroup": (2, 2), "stack_levels": (3, 3)}, [(0, 2), (2, 3), (3, 6)]),
    ],
)
def test_runs_end_where_a_state_is_wanted_or_tiles_enter(fields, want):
    assert ViT(**SMALL | fields).runs() == want


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"level": 0}, "vision.level"),
        ({"level": -8}, "vision.level"),
        ({"stack_levels": (6,)}, "vision.stack_levels"),
        ({"stack_levels": (2, -1)}, "vision.stack_levels"),
        ({"stack_levels": (0,)}, "vision.stack_levels"),
        ({"regroup": (6, 2)}, "vision.regroup"),
        ({"regroup": (2, 2), "stack_levels": (2,)}, "vision.regroup"),
    ],
)
def test_levels_outside_the_blocks_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        ViT(**SMALL | fields).runs()


def test_levels_are_hidden_states_in_the_order_asked_for(pixels):
    model = ViT(**SMALL, stack_levels=(4, -6))
    params = varied(model, pixels)
    states = unrolled(model, params, pixels)
    got = jax.jit(model.apply)({"params": params}, pixels)
    for x, number in zip(got, (6, 4, 2), strict=True):
        np.testing.assert_allclose(x, states[number], atol=1e-4)
    assert np.abs(states[4] - states[2]).max() > 0.1


@pytest.mark.parametrize("first", [1, 4])
def test_tiles_enter_the_whole_picture_sample_by_sample(pixels, first):
    """Two pictures of 1 + 4 views: after `first` blocks there are 5 blocks for 4 samples, or 2."""
    levels = (first + 1,)
    model = ViT(**SMALL, regroup=(first, 2), stack_levels=levels)
    params = varied(model, pixels)

    def regroup(x):
        whole, added = x[::5], []
        tiles = np.asarray(x[:, 1:]).reshape(2, 5, 4, 4, 12)[:, 1:]
        mosaics = np.stack([by_hand(*four) for four in tiles])
        for i in range(2):
            for j in range(2):
                added.append(mosaics[:, i::2, j::2].reshape(2, 16, 12))
        return whole, added

    states = unrolled(model, params, pixels, regroup)
    got = jax.jit(model.apply)({"params": params}, pixels)
    for x, number in zip(got, (6, *levels), strict=True):
        np.testing.assert_allclose(x, states[number], atol=1e-4)
    assert model.extra_views == 4 and got[0].shape == (2, 4, 4, 12)


def by_hand(top_left, top_right, bottom_left, bottom_right):
    rows = [np.concatenate(pair, axis=1) for pair in ((top_left, top_right), (bottom_left, bottom_right))]
    return np.concatenate(rows, axis=0)


def test_pictures_of_another_size_are_refused(pixels):
    with pytest.raises(ValueError, match="8×8 pictures, got 8×6"):
        ViT(**SMALL).init(jax.random.key(0), pixels[:, :, :6])
    with pytest.raises(ValueError, match="8×8"):
        ViT(**SMALL).init(jax.random.key(0), pixels, jnp.full((10, 2), 8))


def test_heads_that_do_not_divide_the_width_are_named():
    model = ViT(image_size=8, patch_size=4, width=10, depth=1, heads=4, mlp_dim=8, level=-1)
    with pytest.raises(ValueError, match="width 10 does not divide into 4 heads"):
        model.check()


def class_attention_of(model, params, hidden):
    """What the class token gives each patch in a block, by the textbook; of hidden states `[N, T, C]`."""
    y = LayerNorm(model.norm_eps).apply({"params": params["norm_1"]}, hidden)
    q, k = (np.einsum("ntc,chd->nhtd", y, params[n]["kernel"]) + params[n]["bias"][:, None] for n in "qk")
    scores = np.exp(np.einsum("nhtd,nhsd->nhts", q, k) / np.sqrt(q.shape[-1]))
    return (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=1)[:, 0, 1:]


@pytest.mark.parametrize("fields", [{}, {"stack_levels": (2,)}, {"level": -1, "remat": False}])
def test_importance_is_the_class_token_s_attention_in_the_last_block_that_is_built(pixels, fields):
    model = ViT(**SMALL | fields)
    params = varied(model, pixels)
    apply = jax.jit(model.apply, static_argnames="importance")
    *maps, importance = apply({"params": params}, pixels, importance=True)
    for found, want in zip(maps, apply({"params": params}, pixels), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5)  # nothing else changes
    # The input of the last block is the hidden state of a model that is built up to there, class token included.
    start, end = model.runs()[-1]
    hidden = inputs_of_last_block(model, params, pixels)
    block = jax.tree.map(lambda leaf: np.asarray(leaf[end - 1 - start]), params[f"blocks_{start}"])
    want = class_attention_of(model, block, hidden)
    assert importance.shape == (10, 4, 4, 1) and importance.dtype == jnp.float32
    np.testing.assert_allclose(importance.reshape(10, 16), want, atol=1e-5)
    assert np.ptp(want, axis=1).min() > 1e-3 and (want.sum(axis=1) < 1).all()


def inputs_of_last_block(model, params, pixels):
    """Hidden states with the class token, `[N, T, C]`, block by block."""
    g, p = model.grid, model.patch_size
    x = np.asarray(normalise(pixels, model.mean, model.std)).reshape(-1, g, p, g, p, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), g * g, -1) @ params["patches"]["kernel"]
    x = np.concatenate([np.broadcast_to(params["cls"], (len(x), 1, model.width)), x], axis=1) + params["position"]
    x = LayerNorm(model.norm_eps).apply({"params": params["norm_pre"]}, x)
    module = ViTBlock(model.heads, model.mlp_dim, model.norm_eps, model.dtype)
    block = jax.jit(lambda variables, x: module.apply(variables, x, None, None)[0])
    for start, end in model.runs():
        for i in range(start, min(end, model.depth + model.level)):
            x = block({"params": jax.tree.map(lambda leaf, n=i - start: leaf[n], params[f"blocks_{start}"])}, x)
    return np.asarray(x)


def test_the_class_token_s_attention_is_averaged_over_heads():
    k = np.zeros((1, 3, 2, 4), np.float32)
    k[0, 1, 0, 0] = k[0, 2, 1, 0] = 100.0  # one head looks at patch 0 alone, the other at patch 1
    found = class_attention(np.ones((1, 3, 2, 4), np.float32), k)
    np.testing.assert_allclose(found, [[0.5, 0.5]], atol=1e-6)
