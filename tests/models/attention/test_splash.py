"""The TPU's kernel, interpreted."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lmm_jax import sharding
from lmm_jax.models.attention.splash import splash_attention
from tests.models.attention.kernels import MESH, RULES, equals_attention

splash = functools.partial(splash_attention, interpret=True)


def test_splash_runs_on_every_device_on_its_rows_and_heads_alone():
    q, k, v = (jnp.zeros((4, 128, 4, 16)) for _ in range(3))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use(mesh, RULES):
        traced = jax.make_jaxpr(lambda *x: splash_attention(*x, causal=True, interpret=True))(q, k, v)
    (kernel,) = [e for e in traced.eqns if e.primitive.name == "shard_map"]
    given = [x.aval.shape for x in kernel.params["jaxpr"].invars]
    assert [shape for shape in given if len(shape) == 4] == [(1, 128, 2, 16)] * 3


@pytest.mark.parametrize(
    ("B", "T", "heads", "kv_heads", "causal", "segments", "mesh"),
    [
        (2, 256, 4, 2, True, True, None),  # grouped queries, no padding
        (2, 100, 4, 4, True, False, None),  # padding alone
        (2, 577, 2, 2, False, False, None),  # the ViT's: 640 positions
        (4, 130, 4, 2, True, True, MESH),
        (2, 130, 4, 2, True, True, {"fsdp": 2, "tensor": 4}),  # fewer key-value heads than tensor shards
        (3, 130, 4, 4, False, True, {"fsdp": 8}),  # a batch that does not divide
        (2, 256, 2, 2, True, True, {"fsdp": 2, "tensor": 2, "context": 2}),
    ],
)
def test_output_and_gradients_are_those_of_attention(monkeypatch, B, T, heads, kv_heads, causal, segments, mesh):
    equals_attention(monkeypatch, splash, B, T, heads, kv_heads, causal, segments, mesh)
