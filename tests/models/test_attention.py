"""Attention against a loop in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.models.attention import attention, cached_attention


def by_loop(q, k, v, allowed):
    B, T, H, d = q.shape
    group = H // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = [s for s in range(k.shape[1]) if allowed(b, t, s)]
                w = np.exp(k[b, seen, h // group] @ q[b, t, h] / d**0.5)
                out[b, t, h] = w / w.sum() @ v[b, seen, h // group]
    return out


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


def test_cached_attention_sees_the_filled_part():
    q, k, v = random_qkv(4, 2, T=1, S=6)
    length = np.array([3, 6])
    want = by_loop(q, k, v, lambda b, t, s: s < length[b])
    np.testing.assert_allclose(cached_attention(q, k, v, jnp.asarray(length)), want, atol=2e-6)


def test_large_logits_do_not_overflow():
    q, k, v = random_qkv(2, 2)
    out = attention(q * 1e4, k * 1e4, v, causal=True)
    assert np.isfinite(out).all()
