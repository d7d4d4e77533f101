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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cached_attention_sees_the_filled_places_and_what_came_before_in_its_own_segment(kv_heads):
    T, size = 5, 6
    q, k, v = random_qkv(4, kv_heads, T=T, S=size + T)
    filled = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]], bool)
    segment = np.array([[1, 1, 2, 2, 0], [3, 3, 3, 3, 3]])

    def sees(b, t, s):
        if s < size:
            return filled[b, s]
        return s - size <= t and segment[b, s - size] == segment[b, t]

    new, cached = [x[:, size:] for x in (k, v)], [x[:, :size].swapaxes(1, 2) for x in (k, v)]
    want = by_loop(q, k, v, sees)
    np.testing.assert_allclose(cached_attention(q, *new, *cached, jnp.asarray(filled), segment), want, atol=2e-6)
    one = [x[:, :1] for x in (q, *new)]
    found = cached_attention(*one, *cached, jnp.asarray(filled), segment[:, :1])
    np.testing.assert_allclose(found, want[:, :1], atol=2e-6)


_filled = jax.jit(KVCache.filled)


class Ring:
    """What a cache should hold: the positions of each row, in a list."""

    def __init__(self, cache):
        self.rows = [[] for _ in cache.length]

    def equals(self, cache):
        """Whether the rows' positions lie before `end`, the newest last, and nothing else counts as filled."""
        filled, k, v = jax.device_get((_filled(cache), cache.k, cache.v))
        for row, want in enumerate(self.rows):
            places = [(int(cache.end) - len(want) + n) % cache.size for n in range(len(want))]
            assert int(cache.length[row]) == len(want)
            assert set(np.flatnonzero(filled[row])) == set(places)
            np.testing.assert_array_equal(k[0, row, 0, np.array(places, int), 0], want)
            np.testing.assert_array_equal(v[1, row, 1, np.array(places, int), 1], np.negative(want))


def test_a_cache_is_a_ring_that_rows_enter_and_leave_at_any_time():
    """Random prompts and steps, around the ring several times, against a list of positions for each row."""
    rng, counter = np.random.default_rng(0), iter(range(1, 10**6))

    def keys(*shape):
        x = np.array([next(counter) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)
        x = np.broadcast_to(x[None, :, :, None, None], (2, *shape, 2, 2))  # [L, B, T, N, d]
        return x, -x

    k, v = keys(3, 4)
    length = np.array([2, 4, 1])
    cache = KVCache.fill(k, v, 7, jnp.asarray(length))
    ring = Ring(cache)
    for row, n in enumerate(length):
        ring.rows[row] += k[0, row, :n, 0, 0].tolist()
    append, put = jax.jit(KVCache.append), jax.jit(KVCache.put)
    for step in range(60):
        ring.equals(cache)
        full = [row for row, held in enumerate(ring.rows) if len(held) == cache.size]
        if full or rng.random() < 0.3:  # a row that is full, or any, is given to another prompt
            row, n, first = full[0] if full else int(rng.integers(len(ring.rows))), int(rng.integers(1, 5)), 2
            k, v = keys(1, 7)
            cache = put(cache, row, *(x[:, 0].swapaxes(1, 2) for x in (k, v)), first, n, n)
            ring.rows[row] = k[0, 0, first : first + n, 0, 0].tolist()
        else:
            k, v = keys(len(ring.rows), 1)
            cache = append(cache, k, v)
            for row, held in enumerate(ring.rows):
                held.append(k[0, row, 0, 0, 0])
        if step in (20, 40):
            cache = cache.resized(len(ring.rows) + 1, cache.size + 3)
            ring.rows.append([])
    ring.equals(cache)


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
