"""What a kernel is given on each device: padding up to its blocks, its own rows and heads, all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.models.attention.on_mesh import PADDING, on_every_device
from tests.models.attention.kernels import RULES


def arrays(B, T, heads, kv_heads):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, n, 4)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


class Kernel:
    """Adds to each query head the mean over the row of its key-value head, padding left out; notes its shapes."""

    def __call__(self, q, k, v, segment=None):
        self.given = [x.shape for x in (q, k, v)] + ([segment.shape] if segment is not None else [])
        real = jnp.ones(q.shape[:2]) if segment is None else segment != PADDING
        weight = (real / real.sum(axis=1, keepdims=True))[..., None, None]
        mean = ((k + 2 * v) * weight).sum(axis=1, keepdims=True)
        return q + jnp.repeat(mean, q.shape[2] // k.shape[2], axis=2)


def expected(q, k, v):
    return q + np.repeat(np.mean(k + 2 * v, axis=1, keepdims=True), q.shape[2] // k.shape[2], axis=2)


def test_positions_are_padded_to_blocks_and_the_padding_is_a_segment_of_its_own():
    kernel, (q, k, v) = Kernel(), arrays(2, 7, 4, 2)
    found = on_every_device(kernel, q, k, v, None, 5, "batch")
    assert kernel.given == [(2, 10, 4, 4), (2, 10, 2, 4), (2, 10, 2, 4), (2, 10)]
    np.testing.assert_allclose(found, expected(q, k, v), atol=1e-6)
    segment = jnp.zeros((2, 7), jnp.int32)
    np.testing.assert_allclose(on_every_device(kernel, q, k, v, segment, 5, "batch"), found, atol=1e-6)


def test_whole_blocks_without_segments_stay_as_they_are():
    kernel, (q, k, v) = Kernel(), arrays(2, 10, 4, 4)
    found = on_every_device(kernel, q, k, v, None, 5, "batch")
    assert kernel.given == [q.shape, k.shape, v.shape]
    np.testing.assert_allclose(found, expected(q, k, v), atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "kv_heads", "given"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2, [(1, 8, 2, 4), (1, 8, 1, 4)]),
        ({"fsdp": 2, "tensor": 4}, 2, [(2, 8, 1, 4), (2, 8, 1, 4)]),  # fewer key-value heads than shards: repeated
        ({"fsdp": 8}, 2, [(4, 8, 4, 4), (4, 8, 2, 4)]),  # four rows do not divide over eight devices: all have them
        ({"context": 8}, 4, [(4, 8, 4, 4), (4, 8, 4, 4)]),  # positions stay whole
    ],
)
def test_each_device_has_its_rows_and_heads(mesh, kv_heads, given):
    kernel, (q, k, v) = Kernel(), arrays(4, 7, 4, kv_heads)
    segment = jnp.zeros((4, 7), jnp.int32)
    with sharding.use(sharding.make_mesh(mesh), RULES):
        found = jax.jit(lambda *x: on_every_device(kernel, *x, 8, "batch"))(q, k, v, segment)
    assert kernel.given == [given[0], given[1], given[1], (given[0][0], 8)]
    np.testing.assert_allclose(found, expected(q, k, v), atol=1e-6)
