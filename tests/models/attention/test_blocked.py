"""Attention block by block: which blocks are visited, and that no square of scores is held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.models.attention.attention import attention
from lmm_jax.models.attention.blocked import _reach, blocked_attention
from tests.models.attention.kernels import MESH, by_loop, equals_attention


def test_blocks_outside_the_segments_are_not_visited():
    """M3's five copies in two rows of 13 blocks of 96, the second without padding."""
    copies = np.repeat([1, 2, 3, 4, 5, 5], (97, 105, 132, 240, 650, 24))
    segment = np.stack([np.where(np.arange(1248) < 1224, copies, 0), copies]).reshape(2, 13, 96).swapaxes(0, 1)
    first, end = _reach(jnp.asarray(segment), 13, causal=True)
    np.testing.assert_array_equal(first, [0, 0, 1, 2, 3, 3, *[5] * 7])  # copies start at 0, 97, 202, 334 and 574
    np.testing.assert_array_equal(end, np.arange(1, 14))


def test_blocks_need_segments_in_no_order():
    """The second block shares no segment with the others, and lies between them."""
    q, k, v = (np.random.default_rng(i).normal(size=(1, 288, 2, 4)).astype(np.float32) for i in range(3))
    segment = jnp.repeat(jnp.array([[7, 2, 7]]), 96, axis=1)
    found = jax.jit(blocked_attention)(q, k, v, segment)
    np.testing.assert_allclose(found, by_loop(q, k, v, lambda b, t, s: (t // 96 == 1) == (s // 96 == 1)), atol=2e-6)


def test_long_rows_hold_no_square_of_scores():
    q = jax.random.normal(jax.random.key(0), (1, 1000, 1, 8)) * 1e4
    grads = jax.jit(jax.grad(lambda q, k, v: attention(q, k, v, causal=True).sum(), argnums=(0, 1, 2)))
    assert "1000,1000" not in str(jax.make_jaxpr(grads)(q, q, q))
    assert all(np.isfinite(x).all() for x in grads(q, q, q))


@pytest.mark.parametrize(
    ("B", "T", "heads", "kv_heads", "causal", "segments", "mesh"),
    [
        (2, 301, 4, 2, True, True, None),  # three blocks, two positions of padding
        (4, 200, 4, 2, False, False, MESH),
    ],
)
def test_output_and_gradients_are_those_of_attention(monkeypatch, B, T, heads, kv_heads, causal, segments, mesh):
    equals_attention(monkeypatch, blocked_attention, B, T, heads, kv_heads, causal, segments, mesh)
