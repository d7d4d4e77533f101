"""What stands between encoder and decoder: orders of a shuffle, positions, paths, and the finer merges beneath."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax.config import ConfigError
from lmm_jax.models.lmm import build
from lmm_jax.models.projector import Projector, shuffle, sine_positions
from lmm_jax.reduction import factor_of, find_reduction
from lmm_jax.training.state import init_params

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def features(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_channels_lie_as_torch_unfolds_them(k):
    torch = pytest.importorskip("torch")
    x = features(2, 8, 12, 3)
    # Mistral 3's merger: `unfold` gives [B, C · k · k, blocks], channel by channel.
    want = torch.nn.functional.unfold(torch.tensor(np.moveaxis(x, -1, 1)), k, stride=k)
    want = want.numpy().swapaxes(1, 2).reshape(2, 8 // k, 12 // k, -1)
    np.testing.assert_array_equal(shuffle(x, k, "channels"), want)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_cells_lie_as_idefics_3_and_granite_docling_shuffle_them(transformers, k):
    import torch

    x = features(2, 8, 8, 3)
    for module in ("idefics3", "granite_docling"):
        module = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=[""])
        owner = getattr(module, "Idefics3Connector", None) or module.GraniteDoclingConnectorPath
        want = owner.pixel_shuffle(None, torch.tensor(x.reshape(2, 64, 3)), k).numpy()
        np.testing.assert_array_equal(np.asarray(shuffle(x, k)).reshape(want.shape), want)


def test_cells_lie_as_qwen_lists_patches_of_a_block():
    x = features(1, 4, 6, 3)
    blocks = x.reshape(1, 2, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)  # rows, columns, then row and column inside
    np.testing.assert_array_equal(shuffle(x, 2), blocks.reshape(1, 2, 3, 12))


def test_what_fills_no_block_is_dropped():
    x = features(1, 5, 7, 2)
    np.testing.assert_array_equal(shuffle(x, 2), shuffle(x[:, :4, :6], 2))


def test_positions_are_those_of_granite_docling(transformers):
    module = __import__(
        "transformers.models.granite_docling.modeling_granite_docling", fromlist=["GraniteDoclingPositionEmbedding"]
    )
    for side, width in ((4, 32), (16, 64)):
        want = module.GraniteDoclingPositionEmbedding.build(width, side).numpy().reshape(side, side, width)
        found = sine_positions(side, side, width)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, want, atol=1e-6)


def shapes_of(projector, x, factors=(None,)):
    def all_paths(module, x):
        return [module(x, factor) for factor in factors]

    params = jax.eval_shape(lambda: projector.init(jax.random.key(0), x, method=all_paths))["params"]
    return {
        path: leaf.shape
        for path, leaf in flatten_dict(jax.tree.map(jnp.zeros_like, unboxed(params)), sep="/").items()
    }


def unboxed(tree):
    import flax.linen as nn

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(tree))


def test_paths_have_parameters_of_their_own_or_share_all_but_the_first_layer():
    x = jnp.zeros((1, 8, 8, 6))
    fields = {"width": 16, "shuffle": (4, 2), "norm": "cells", "mid_norm": True, "last_norm": True}
    apart = shapes_of(Projector(**fields), x, (4, 2))
    shared = shapes_of(Projector(**fields, shared=True), x, (4, 2))
    assert apart["linear_0_by_4/kernel"] == shared["linear_0_by_4/kernel"] == (96, 16)
    assert apart["linear_0_by_2/kernel"] == shared["linear_0_by_2/kernel"] == (24, 16)
    assert {path.split("/")[0] for path in shared} == {
        *("norm", "norm_1", "norm_last", "linear_1", "linear_0_by_2", "linear_0_by_4")
    }
    assert {"norm_by_2", "norm_1_by_2", "norm_last_by_2", "linear_1_by_2"} <= {p.split("/")[0] for p in apart}
    one = shapes_of(Projector(width=16, shuffle=(2,), hidden="input", norm="block"), x)
    assert one["norm/scale"] == (24,) and one["linear_0/kernel"] == (24, 24) and one["linear_1/kernel"] == (24, 16)


def test_llava_s_is_two_layers_with_exact_gelu_between():
    x, projector = features(1, 2, 2, 6), Projector(width=5)
    params = jax.tree.map(jnp.asarray, unboxed(projector.init(jax.random.key(0), x))["params"])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
    first = x @ params["linear_0"]["kernel"] + params["linear_0"]["bias"]
    want = jax.nn.gelu(first, approximate=False) @ params["linear_1"]["kernel"] + params["linear_1"]["bias"]
    np.testing.assert_allclose(projector.apply({"params": params}, x), want, atol=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [(1, 4), (4, 4), (16, 4), (64, 4), (65, 2), (256, 2)])
def test_a_scale_takes_the_coarsest_path_that_has_as_many_cells(scale, factor):
    assert factor_of(scale, 32, (4, 2)) == factor_of(scale, 32, (2, 4)) == factor


def test_more_tokens_than_the_finest_path_has_are_left_to_its_reduction_to_refuse():
    assert factor_of(257, 32, (4, 2)) == 2
    with pytest.raises(ValueError, match="257 tokens do not tile a 16×16 grid; valid scales are"):
        find_reduction("pool").check(16, 257)


E_SMALL = (
    *("model.dtype=float32", "model.vision.image_size=64", "model.vision.patch_size=8", "model.vision.width=16"),
    *("model.vision.heads=2", "model.vision.mlp_dim=24", "model.vision.depth=2", "model.decoder.width=32"),
    *("model.decoder.heads=4", "model.decoder.kv_heads=2", "model.decoder.mlp_dim=48", "model.decoder.depth=4"),
    *("model.decoder.vocab_size=64", "model.scales=(1,4)"),
)


@pytest.fixture(scope="module")
def deepstack_e():
    """A tiny DeepStack-E and drawn parameters."""
    config = lmm.load_config(f"{CONFIGS}/deepstack_e.py", *E_SMALL)
    model, rng = build(config.model), np.random.default_rng(0)
    shapes = unboxed(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    return model, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_finer_merges_beneath_each_token_are_its_stacks(deepstack_e, gathered):
    model, params = deepstack_e
    pixels = np.random.default_rng(1).integers(0, 256, (1, 2, 64, 64, 3), np.uint8)
    gather = np.arange(2 * 64).reshape(1, 1, 2, 8, 8) if gathered else None
    bank, stacks = model.apply({"params": params}, pixels, gather, method="visual_tokens")
    assert bank.shape == (1, 2 * (1 + 4), 32) and stacks.shape == (4, 1, 2 * (1 + 4), 32)
    grid = model.vision.apply({"params": params["vision"]}, pixels[0])[0]  # [views, 8, 8, C]
    coarse = model.projector.apply({"params": params["projector"]}, grid)  # [views, 2, 2, D]
    fine = model.finer_projector.apply({"params": params["finer_projector"]}, grid)  # [views, 4, 4, D]
    assert coarse.shape[1:3] == (2, 2) and fine.shape[1:3] == (4, 4)
    np.testing.assert_allclose(bank[0, 2:], coarse.reshape(8, 32), atol=1e-4)
    np.testing.assert_allclose(bank[0, :2], coarse.mean(axis=(1, 2)), atol=1e-4)
    for number, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        beneath = fine[:, row::2, column::2]  # token (i, j) stands for merges (2i, 2j) to (2i + 1, 2j + 1)
        np.testing.assert_allclose(stacks[number, 0, 2:], beneath.reshape(8, 32), atol=1e-4)
        np.testing.assert_allclose(stacks[number, 0, :2], beneath.mean(axis=(1, 2)), atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.finer=3",), r"model.finer=3 does not divide model.projector.shuffle=\(4,\)"),
        (("model.finer=0",), "inject_layers=.* names 4 layers"),
        (("model.finer=4",), r"model.finer=4 16; model.decoder.inject_layers=\(0, 1, 2, 3\) names 4 layers"),
    ],
)
def test_finer_merges_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        lmm.load_config(f"{CONFIGS}/deepstack_e.py", *E_SMALL, *overrides)
