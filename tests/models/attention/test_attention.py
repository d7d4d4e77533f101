"""Attention against a loop in numpy, and every kernel against attention that holds all scores at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.models.attention import attention as attention_module
from lmm_jax.models.attention.attention import attention, cached_attention
from lmm_jax.models.attention.blocked import _reach, blocked_attention
from lmm_jax.models.attention.splash import splash_attention
from lmm_jax.models.attention.triton import triton_attention
from lmm_jax.models.decoder import KVCache


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


RULES = {"batch": ("data", "fsdp"), "heads": "tensor", "kv_heads": "tensor"}


def outputs_and_gradients(f, q, k, v):
    """Output and the gradients of a sum that weights each of its numbers differently."""
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    grads = jax.grad(lambda q, k, v: (f(q, k, v) * weights).sum(), argnums=(0, 1, 2))
    return jax.jit(lambda q, k, v: (f(q, k, v), *grads(q, k, v)))(q, k, v)


splash = functools.partial(splash_attention, interpret=True)
by_triton = functools.partial(triton_attention, interpret=True)
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("kernel", "B", "T", "heads", "kv_heads", "causal", "segments", "mesh"),
    [
        (splash, 2, 256, 4, 2, True, True, None),  # grouped queries, no padding
        (splash, 2, 100, 4, 4, True, False, None),  # padding alone
        (splash, 2, 577, 2, 2, False, False, None),  # the ViT's: 640 positions
        (splash, 4, 130, 4, 2, True, True, MESH),
        (splash, 2, 130, 4, 2, True, True, {"fsdp": 2, "tensor": 4}),  # fewer key-value heads than tensor shards
        (splash, 3, 130, 4, 4, False, True, {"fsdp": 8}),  # a batch that does not divide
        (splash, 2, 256, 2, 2, True, True, {"fsdp": 2, "tensor": 2, "context": 2}),
        (by_triton, 2, 130, 4, 2, True, True, None),
        (blocked_attention, 2, 301, 4, 2, True, True, None),  # three blocks, two positions of padding
        (blocked_attention, 4, 200, 4, 2, False, False, MESH),
    ],
)
def test_kernels_equal_attention(monkeypatch, kernel, B, T, heads, kv_heads, causal, segments, mesh):
    monkeypatch.setattr(attention_module, "SHORT", T)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, n, 16)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segment = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32) if segments else None
    want = outputs_and_gradients(lambda *x: attention(*x, segment, causal), q, k, v)

    def by_kernel(*x):
        return kernel(*x, segment, causal)

    if mesh is None:
        found = outputs_and_gradients(by_kernel, q, k, v)
    else:
        with sharding.use(sharding.make_mesh(mesh), RULES):
            found = outputs_and_gradients(by_kernel, q, k, v)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


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


def test_splash_runs_on_every_device_on_its_rows_and_heads_alone():
    q, k, v = (jnp.zeros((4, 128, 4, 16)) for _ in range(3))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(mesh, RULES):
        traced = jax.make_jaxpr(lambda *x: splash_attention(*x, causal=True, interpret=True))(q, k, v)
    (kernel,) = [e for e in traced.eqns if e.primitive.name == "shard_map"]
    given = [x.aval.shape for x in kernel.params["jaxpr"].invars]
    assert [shape for shape in given if len(shape) == 4] == [(1, 128, 2, 16)] * 3


def test_a_tpu_mesh_takes_the_kernel(monkeypatch):
    """Also where the default backend is a CPU, so that a program for a TPU is compiled with its own kernels."""
    q, k, v = random_qkv(2, 2)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda *x: attention(*x))(q, k, v))
    monkeypatch.setattr(attention_module, "platform", lambda: "tpu")
    assert "pallas_call" in str(jax.make_jaxpr(lambda *x: attention(*x))(q, k, v))  # not the trace from above


def test_a_gpu_mesh_takes_the_kernel_where_that_can(monkeypatch):
    """Lowered for CUDA here; it has run on no GPU."""
    monkeypatch.setattr(attention_module, "platform", lambda: "gpu")

    def lowered(T, d, dtype):
        x = jax.ShapeDtypeStruct((2, T, 4, d), dtype)
        grads = jax.grad(lambda *x: attention(*x, causal=True).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
            return jax.jit(grads).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()

    assert lowered(300, 64, jnp.bfloat16).count("xla.gpu.triton") == 3  # forward, its sums, backward
    for T, d, dtype in ((300, 64, jnp.float32), (300, 8, jnp.bfloat16), (100, 64, jnp.bfloat16)):
        assert "triton" not in lowered(T, d, dtype)
