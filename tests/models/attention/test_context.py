"""Rows shared out over devices: who holds what, and attention against that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.config import base
from lmm_jax.models.attention.attention import attention
from lmm_jax.models.attention.context import bring_back, context_attention, order, share_out, ways
from lmm_jax.models.attention.splash import causal_kernel
from tests.models.attention.kernels import outputs_and_gradients

RULES = dict(base().rules)


def use(**shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])
    return sharding.use(mesh, RULES)


def test_a_device_holds_an_early_and_a_late_chunk():
    np.testing.assert_array_equal(order(12, 3).reshape(3, 4), [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]])


@pytest.mark.parametrize("C", [2, 3, 4])
def test_chunks_travel_to_their_devices_and_back(C):
    x = jnp.arange(2 * 24 * 3.0).reshape(2, 24, 3)
    names = ("batch", "length", None)
    with use(context=C):
        there = jax.jit(lambda x: share_out(x, *names))(x)
        back = jax.jit(lambda x: bring_back(x, *names))(there)
    np.testing.assert_array_equal(there, x[:, order(24, C)])
    np.testing.assert_array_equal(back, x)
    assert there.sharding.shard_shape(x.shape) == (2, 24 // C, 3)


def test_rows_are_shared_out_where_the_mesh_has_devices_for_them():
    assert ways(48) == 1
    with use(fsdp=2, context=4):
        assert (ways(48), ways(44)) == (4, 1)  # 44 positions do not divide into 8 chunks


@pytest.mark.parametrize("C", [2, 4, 8])
def test_all_devices_have_the_same_work(C):
    """Pairs that the mask lets through, and blocks of scores that the kernel computes, forwards and backwards."""
    T = 4096
    pairs = (order(T, C) + 1).reshape(C, -1).sum(axis=1, dtype=np.int64)
    assert pairs.sum() == T * (T + 1) // 2 and len(set(pairs)) == 1
    kernel = causal_kernel(1, order(T, C), C, interpret=True)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        blocks = (np.asarray(info.block_mask).reshape(C, -1) > 0).sum(axis=1)
        assert len(set(blocks)) == 1 and blocks[0] > 0


@pytest.mark.parametrize(
    ("kernel", "T", "kv_heads", "mesh"),
    [
        (False, 1056, 2, {"fsdp": 2, "tensor": 2, "context": 2}),  # blocks of 264
        (True, 200, 2, {"fsdp": 2, "context": 4}),  # chunks of 25, which the kernel takes as 128
        (False, 200, 2, {"tensor": 4, "context": 2}),  # key-value heads repeated
        (True, 200, 2, {"tensor": 4, "context": 2}),
        (True, 2048, 4, {"context": 8}),  # no padding
    ],
)
def test_attention_equals_that_of_one_device(kernel, T, kv_heads, mesh):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, n, 16)).astype(np.float32) for n in (4, kv_heads, kv_heads))
    segment = np.sort(rng.integers(0, 4, (2, T)), axis=1).astype(np.int32)
    want = outputs_and_gradients(lambda *x: attention(*x, segment, causal=True), q, k, v)

    def shared(*qkv):
        names = ("batch", "length", None, None)
        there = [share_out(x, *names) for x in qkv]
        out = context_attention(*there, share_out(jnp.asarray(segment), *names[:2]), interpret=kernel)
        return bring_back(out, *names)

    with use(**mesh):
        found = outputs_and_gradients(shared, q, k, v)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
