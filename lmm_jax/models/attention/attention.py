"""Attention over segments, and of new positions over a key-value cache."""

import contextlib
import contextvars

import jax
import jax.numpy as jnp

from lmm_jax.models.attention import triton
from lmm_jax.models.attention.blocked import blocked_attention
from lmm_jax.models.attention.splash import splash_attention
from lmm_jax.sharding import platform

# Positions up to which all scores are taken at once: about where a CPU becomes faster block by block, see
# lmm_jax/bench/README.md.
SHORT = 256

_counting = contextvars.ContextVar("counting", default=False)


@contextlib.contextmanager
def counting():
    """Traces inside take all scores at once, whatever the length: loops that the data bounds cannot be counted."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)


def attention(q, k, v, segment=None, causal=False, rows="batch"):
    """Softmax attention inside segments; float32 softmax.

    `splash.splash_attention` computes it on TPU; elsewhere a short row's scores are taken at once, and a longer one's
    in blocks, on GPU by `triton.triton_attention` where that can.

    Args:
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`; each of the N key-value heads serves H / N query heads.
      v: like `k`.
      segment: `[B, T]` int, or None for one segment. Padding is a segment of its own, so no row is ever empty.
      causal: a position sees itself and what stands before it.
      rows: logical axis of B.

    Returns:
      `[B, T, H, d]` in the dtype of `q`.
    """
    if platform() == "tpu":
        return splash_attention(q, k, v, segment, causal, rows)
    T = q.shape[1]
    if T > SHORT and not _counting.get():
        long = triton.triton_attention if platform() == "gpu" and triton.fits(q) else blocked_attention
        return long(q, k, v, segment, causal, rows)
    mask = jnp.tril(jnp.ones((T, T), bool))[None] if causal else None
    if segment is not None:
        same = segment[:, :, None] == segment[:, None, :]
        mask = same if mask is None else mask & same
    return softmax_attention(q, k, v, mask)


def cached_attention(q, k, v, cached_k, cached_v, filled, segment):
    """Attention of new positions over the filled part of a cache, and over those before them in their own segment.

    The cache is only read, as it lies: a copy of it a token would take as long as reading all weights.

    Args:
      q: `[B, T, H, d]`, of the new positions; mostly one a row, which reads best.
      k: `[B, T, N, d]`, their keys, which the cache does not hold.
      v: like `k`.
      cached_k: `[B, N, size, d]`.
      cached_v: like `cached_k`.
      filled: `[B, size]` bool, the places of the cache that hold a position; all new positions see all of them.
      segment: `[B, T]` int, of the new positions.

    Returns:
      `[B, T, H, d]`.
    """
    B, T, H, d = q.shape
    N = cached_k.shape[1]
    g = H // N
    q = (q * d**-0.5).reshape(B, T, N, g, d).transpose(0, 2, 3, 1, 4).reshape(B, N, g * T, d)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    before = _float32_matmul(q, cached_k.swapaxes(2, 3)) + jnp.where(filled, 0.0, -1e30)[:, None, None]
    own = _float32_matmul(q, k.swapaxes(2, 3))
    if T > 1:  # a single one sees itself
        seen = jnp.tril(jnp.ones((T, T), bool)) & (segment[:, :, None] == segment[:, None, :])
        own = (own.reshape(B, N, g, T, T) + jnp.where(seen, 0.0, -1e30)[:, None, None]).reshape(own.shape)
    most = jnp.maximum(before.max(axis=-1, keepdims=True), own.max(axis=-1, keepdims=True))
    before, own = jnp.exp(before - most), jnp.exp(own - most)
    out = _float32_matmul(before.astype(v.dtype), cached_v) + _float32_matmul(own.astype(v.dtype), v)
    out /= before.sum(axis=-1, keepdims=True) + own.sum(axis=-1, keepdims=True)
    return out.reshape(B, N, g, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d).astype(v.dtype)


def _float32_matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def softmax_attention(q, k, v, mask):
    """Attention of `[B, Tq, H, d]` to `[B, Tk, N, d]`, all scores at a time; `mask`: `[B or 1, Tq, Tk]` bool or None.

    Heads stand before positions, the mask is added, and the weights are normalised after they met the values: on a
    CPU forward and backward take less than half the time of the textbook order, see lmm_jax/bench/README.md.
    """
    B, T, H, d = q.shape
    N, S = k.shape[2], k.shape[1]
    g = H // N
    q = (q * d**-0.5).reshape(B, T, N, g, d).transpose(0, 2, 3, 1, 4).reshape(B, N, g * T, d)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = _float32_matmul(q, k.swapaxes(2, 3))
    if mask is not None:
        bias = jnp.where(mask, 0.0, -1e30)[:, None, None]
        logits = (logits.reshape(B, N, g, T, S) + bias).reshape(B, N, g * T, S)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = _float32_matmul(weights.astype(v.dtype), v) / total
    return out.reshape(B, N, g, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d).astype(v.dtype)
