"""Linear layers, norms and rotary positions against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lmm_jax.models.layers import Dense, LayerNorm, RMSNorm, normalise, rope


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_dense_layer_contracts_the_axes_it_names():
    x = drawn(3, 5, 2, 4)
    heads = Dense((6, 7), ("heads", "head_dim"), ("embed", "mlp"), use_bias=True, start="uniform")
    params = nn.unbox(heads.init(jax.random.key(0), x))["params"]
    assert params["kernel"].shape == (2, 4, 6, 7) and params["bias"].shape == (6, 7)
    want = np.einsum("abhd,hdij->abij", x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(heads.apply({"params": params}, x), want, atol=1e-5)


@pytest.mark.parametrize("start", ["normal", "uniform"])
def test_first_values_spread_by_all_contracted_axes(start):
    """Fan-in is the product of the contracted axes, 512: not the first axis alone, and not that of the output."""
    layer = Dense((8, 40), ("heads", "head_dim"), ("embed", "mlp"), use_bias=True, start=start)
    params = nn.unbox(layer.init(jax.random.key(0), jnp.zeros((1, 16, 32))))["params"]
    kernel, bias = np.asarray(params["kernel"]), np.asarray(params["bias"])
    variance = 1 / 512 if start == "normal" else 1 / 512 / 3
    np.testing.assert_allclose(kernel.var(), variance, rtol=0.03)
    assert (bias == 0).all() if start == "normal" else 0.8 * 512**-0.5 < np.abs(bias).max() <= 512**-0.5


def test_a_dense_layer_of_halves_keeps_its_parameters_whole():
    layer = Dense((4,), ("embed",), ("mlp",), dtype="bfloat16")
    params = nn.unbox(layer.init(jax.random.key(0), drawn(2, 3)))["params"]
    assert (
        params["kernel"].dtype == jnp.float32 and layer.apply({"params": params}, drawn(2, 3)).dtype == jnp.bfloat16
    )


def test_norms_are_those_of_their_formulas():
    x, scale, bias = 3 + 2 * drawn(4, 6), drawn(6) + 1, drawn(6)
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(RMSNorm(0.1).apply({"params": {"scale": scale}}, x), rms, atol=1e-5)
    layer = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias
    found = LayerNorm(0.1).apply({"params": {"scale": scale, "bias": bias}}, x)
    np.testing.assert_allclose(found, layer, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm(), LayerNorm()])
def test_norms_of_halves_are_computed_in_whole(norm):
    """A mean over 4,096 bfloat16 numbers, each 256 times as large as what differs, would come out wrong."""
    x = jnp.asarray(256 + drawn(2, 4096), jnp.bfloat16)
    variables = norm.init(jax.random.key(0), x)
    found, whole = (norm.apply(nn.unbox(variables), y) for y in (x, x.astype(jnp.float32)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, whole.astype(jnp.bfloat16))


def test_rope_turns_pairs_of_numbers_by_their_position():
    """Number i of the first half is a real part, of the second its imaginary part; turned by t · theta^(-i / n)."""
    x, theta = drawn(2, 5, 3, 8), 100.0
    position = np.array([[0, 1, 2, 3, 4], [7, 7, 0, 2, 1000]])
    angle = position[:, :, None, None] * theta ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rope(x, jnp.asarray(position), theta), want, atol=2e-4)


def test_rope_depends_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(a, b):
        return float((rope(q, jnp.array([[a]]), 1e4) * rope(k, jnp.array([[b]]), 1e4)).sum())

    assert abs(product(3, 1) - product(103, 101)) < 1e-4
    assert abs(product(3, 1) - product(4, 1)) > 1e-4


def test_pixels_are_normalised_colour_by_colour():
    pixels = np.array([[[0, 128, 255]]], np.uint8)
    found = normalise(pixels, (0.5, 0.25, 0.125), (0.5, 0.25, 0.5))
    np.testing.assert_allclose(found, [[[-1, (128 / 255 - 0.25) / 0.25, 1.75]]], rtol=1e-6)
