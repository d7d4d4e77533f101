"""Attention block by block in plain JAX, for any backend: scores of one pair of blocks exist at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmm_jax.models.attention.on_mesh import SAVED, on_every_device

BLOCK = 96  # positions, about: the scores of 32 heads of a pair of blocks are 1.2 MB and stay in a CPU's cache
MASKED = -1e30  # added to a score; its weight is 0 in float32, and a row of such scores gives no NaN


def blocked_attention(q, k, v, segment=None, causal=False, rows="batch"):
    """`attention.attention` that keeps no scores: the softmax is taken as its blocks come, and again for gradients.

    For each block of queries a loop runs from the first to the last block of keys that shares a segment with it, as
    the data has it, so that most pairs of blocks of two conversations are skipped. The figures beside all scores at
    once and PyTorch's own attention stand in lmm_jax/bench/README.md.

    Args:
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0, or None.
      causal: a position sees itself and what stands before it.
      rows: logical axis of B.

    Returns:
      `[B, T, H, d]` in the dtype of `v`.
    """
    T = q.shape[1]
    # Larger where every pair is needed, which is faster on a CPU, see lmm_jax/bench/README.md.
    block = -(-T // max(1, round(T / (BLOCK if causal else 2 * BLOCK))))

    def kernel(q, k, v, segment=None):
        B, T, H, d = q.shape
        n, N = T // block, k.shape[2]

        def cut(x):
            return x.reshape(B, n, block, N, -1, d).transpose(1, 0, 3, 4, 2, 5).reshape(n, B, N, -1, d)

        if segment is not None:
            segment = segment.reshape(B, n, block).swapaxes(0, 1)
        out = _blocked(cut(q * d**-0.5), cut(k), cut(v), segment, causal)
        return out.reshape(n, B, N, H // N, block, d).transpose(1, 0, 4, 2, 3, 5).reshape(B, T, H, d)

    return on_every_device(kernel, q, k, v, segment, block, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(q, k, v, segment, causal):
    """Blocks q `[n, B, N, g·b, d]` (scaled), k and v `[n, B, N, b, d]`, segment `[n, B, b]`; returns what q is."""
    return _forward(q, k, v, segment, causal)[0]


def _forward(q, k, v, segment, causal):
    first, end = _reach(segment, len(q), causal)

    def row(i, outputs):
        def block(j, state):
            out, most, total = state
            scores = _scores(q, k, segment, i, j, causal)
            new = jnp.maximum(most, scores.max(axis=-1, keepdims=True))
            weights, old = jnp.exp(scores - new), jnp.exp(most - new)
            return out * old + _matmul(weights.astype(v.dtype), v[j]), new, total * old + _sum(weights)

        zero = jnp.zeros((*q.shape[1:-1], 1))
        out, most, total = lax.fori_loop(
            first[i], end[i], block, (jnp.zeros(q.shape[1:]), jnp.full_like(zero, MASKED), zero)
        )
        found = (out / total).astype(v.dtype), most + jnp.log(total)
        return jax.tree.map(lambda x, y: x.at[i].set(y), outputs, found)

    empty = jnp.zeros(q.shape, v.dtype), jnp.zeros((*q.shape[:-1], 1))
    out, log_total = (checkpoint_name(x, SAVED) for x in lax.fori_loop(0, len(q), row, empty))
    return out, (q, k, v, segment, out, log_total)


def _backward(causal, saved, d_out):
    q, k, v, segment, out, log_total = saved
    first, end = _reach(segment, len(q), causal)
    mean = _sum(out.astype(jnp.float32) * d_out.astype(jnp.float32))  # of d_weights under the weights of a row

    def row(i, grads):
        def block(j, grads):
            dq, dk, dv = grads
            weights = jnp.exp(_scores(q, k, segment, i, j, causal) - log_total[i])
            d_weights = _matmul(d_out[i], v[j].swapaxes(-1, -2))
            d_scores = (weights * (d_weights - mean[i])).astype(q.dtype)
            dk = dk.at[j].add(_matmul(d_scores.swapaxes(-1, -2), q[i]))
            dv = dv.at[j].add(_matmul(weights.astype(q.dtype).swapaxes(-1, -2), d_out[i]))
            return dq + _matmul(d_scores, k[j]), dk, dv

        dq, dk, dv = grads
        of_row, dk, dv = lax.fori_loop(first[i], end[i], block, (jnp.zeros(q.shape[1:]), dk, dv))
        return dq.at[i].set(of_row.astype(q.dtype)), dk, dv

    empty = jnp.zeros_like(q), jnp.zeros(k.shape), jnp.zeros(v.shape)
    dq, dk, dv = lax.fori_loop(0, len(q), row, empty)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_forward, _backward)


def _scores(q, k, segment, i, j, causal):
    """Masked scores `[B, N, g·b, b]` float32 of the queries of block i and the keys of block j."""
    scores, b = _matmul(q[i], k[j].swapaxes(-1, -2)), k.shape[-2]
    seen = True
    if causal:
        seen = (i * b + jnp.arange(b))[:, None] >= j * b + jnp.arange(b)
    if segment is not None:
        segment = jnp.asarray(segment)  # in the rule of a gradient a constant is numpy's, which knows no traced index
        seen &= (segment[i][:, :, None] == segment[j][:, None, :])[:, None, None]
    if seen is True:
        return scores
    B, N = scores.shape[:2]
    return (scores.reshape(B, N, -1, b, b) + jnp.where(seen, 0.0, MASKED)).reshape(scores.shape)


def _reach(segment, n, causal):
    """First block of keys that each of n blocks of queries needs, and the one after the last: `[n]` int each.

    A block's segments are the bits of a number; those that are equal modulo 32 only cost a needless visit.
    """
    reached = jnp.tril(jnp.ones((n, n), bool)) if causal else jnp.ones((n, n), bool)
    if segment is not None:
        bits = jnp.bitwise_or.reduce(jnp.uint32(1) << (segment % 32).astype(jnp.uint32), axis=-1)  # [n, B]
        reached &= ((bits[:, None] & bits) != 0).any(axis=-1)
    return jnp.argmax(reached, axis=1), n - jnp.argmax(reached[:, ::-1], axis=1)


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _sum(x):
    return x.sum(axis=-1, keepdims=True)
