"""Attention against a loop in numpy, the cache, and which kernel a mesh takes; kernels have files of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.models.attention import attention as attention_module
from lmm_jax.models.attention.attention import attention, cached_attention
from lmm_jax.models.decoder import KVCache
from tests.models.attention.kernels import by_loop


def random_qkv(heads, kv_heads, T=7, S=None):
    rng = np.random.default_rng(0)
    shape = lambda n, h: (2, n, h, 4)  # noqa: E731
    q, k, v = (rng.normal(size=s) for s in (shape(T, heads), *[shape(S or T, kv_heads)] * 2))
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_stays_inside_its_segment(kv_heads):
    q, k, v = random_qkv(4, kv_heads)
    segment = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3, 3]])
    want = by_loop(q, k, v, lambda b, t, s: s <= t and segment[b, s] == segment[b, t])
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray(segment), causal=True), want, atol=2e-6)


def test_full_attention():
    q, k, v = random_qkv(2, 2)
    np.testing.assert_allclose(attention(q, k, v), by_loop(q, k, v, lambda b, t, s: True), atol=2e-6)


def test_cached_attention_sees_the_filled_part_and_itself():
    q, k, v = random_qkv(4, 2, T=1, S=7)
    length = np.array([3, 6])
    want = by_loop(q, k, v, lambda b, t, s: s < length[b] or s == 6)
    new, cached = [x[:, 6:] for x in (k, v)], [x[:, :6].swapaxes(1, 2) for x in (k, v)]
    np.testing.assert_allclose(cached_attention(q, *new, *cached, jnp.asarray(length)), want, atol=2e-6)


def test_a_cache_grows_by_a_position_of_each_row():
    _, k, v = random_qkv(4, 2, T=1, S=5)
    start, end = np.array([2, 4]), np.array([3, 5])
    cache = KVCache.fill(k[None, :, :4], v[None, :, :4], 6, jnp.asarray(start))
    own = [jnp.stack([x[b, at][None] for b, at in enumerate(start)])[None] for x in (k, v)]
    cache = jax.jit(KVCache.append)(cache, *own)
    np.testing.assert_array_equal(cache.length, end)
    for found, x in ((cache.k, k), (cache.v, v)):
        for b in range(2):
            np.testing.assert_array_equal(found[0, b, :, : end[b]], x[b, : end[b]].swapaxes(0, 1))


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv(2, 2)
    out = attention(q * 1e4, k * 1e4, v, causal=True)
    assert np.isfinite(out).all()


def test_a_tpu_mesh_takes_the_kernel(monkeypatch):
    """Also where the default backend is a CPU, so that a program for a TPU is compiled with its own kernels."""
    q, k, v = random_qkv(2, 2)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda *x: attention(*x))(q, k, v))
    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")
    assert "pallas_call" in str(jax.make_jaxpr(lambda *x: attention(*x))(q, k, v))  # not the trace from above
