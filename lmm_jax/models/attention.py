"""Attention over segments, and one step of it over a key-value cache."""

import jax
import jax.numpy as jnp


def attention(q, k, v, segment=None, causal=False):
    """Softmax attention inside segments; float32 softmax.

    Args:
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`; each of the N key-value heads serves H / N query heads.
      v: like `k`.
      segment: `[B, T]` int, or None for one segment. Padding is a segment of its own, so no row is ever empty.
      causal: a position sees itself and what stands before it.

    Returns:
      `[B, T, H, d]` in the dtype of `q`.
    """
    T = q.shape[1]
    mask = jnp.tril(jnp.ones((T, T), bool))[None] if causal else None
    if segment is not None:
        same = segment[:, :, None] == segment[:, None, :]
        mask = same if mask is None else mask & same
    return _softmax_attention(q, k, v, mask)


def cached_attention(q, k, v, length):
    """Attention of one new position a row over the filled part of a cache.

    Args:
      q: `[B, 1, H, d]`.
      k: `[B, size, N, d]`, the new position's key included.
      v: like `k`.
      length: `[B]` int, filled positions of each row.

    Returns:
      `[B, 1, H, d]`.
    """
    mask = jnp.arange(k.shape[1]) < length[:, None]
    return _softmax_attention(q, k, v, mask[:, None, :])


def _softmax_attention(q, k, v, mask):
    """`mask`: `[B or 1, Tq, Tk]` bool or None."""
    B, T, H, d = q.shape
    N = k.shape[2]
    q = (q * d**-0.5).reshape(B, T, N, H // N, d)
    logits = jnp.einsum("btngd,bsnd->bngts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bngts,bsnd->btngd", weights, v).reshape(B, T, H, d)
