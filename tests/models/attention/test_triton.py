"""The GPU's kernel: interpreted, and lowered for CUDA. It has run on no GPU."""

import functools

import jax
import jax.numpy as jnp

from lmm_jax.models.attention import attention as attention_module
from lmm_jax.models.attention.attention import attention
from lmm_jax.models.attention.triton import triton_attention
from tests.models.attention.kernels import equals_attention

by_triton = functools.partial(triton_attention, interpret=True)


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


def test_output_and_gradients_are_those_of_attention(monkeypatch):
    equals_attention(monkeypatch, by_triton, 2, 130, 4, 2, causal=True, segments=True)
