"""JAX's own attention kernel for GPUs, written in Pallas for Triton, on any mesh and any length."""

import jax.numpy as jnp

from lmm_jax.models.attention.on_mesh import on_every_device

BLOCK = 128  # positions; the kernel works on multiples of so many


def fits(q) -> bool:
    """Whether the kernel can take queries `[B, T, H, d]`: 16 bits a number, heads of 16 to 128."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and 16 <= q.shape[-1] <= 128


def triton_attention(q, k, v, segment=None, causal=False, rows="batch", interpret=False):
    """`attention.attention`, by a kernel that never holds a row of scores: see there.

    cuDNN's takes segments as a mask of all scores, or as offsets on Hopper alone, and must find a GPU when it is
    lowered. This one has been lowered for CUDA and run as an interpreted program, but on no GPU yet: its block sizes
    are JAX's defaults.

    Args:
      q: `[B, T, H, d]`, see `fits`.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0, or None.
      causal: a position sees itself and what stands before it.
      rows: logical axis of B.
      interpret: runs the kernel's program without a GPU, for tests.

    Returns:
      `[B, T, H, d]` in the dtype of `q`.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    def kernel(q, k, v, segment=None):
        H, d = q.shape[2:]
        k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
        return mha(q, k, v, segment, sm_scale=d**-0.5, causal=causal, interpret=interpret)

    return on_every_device(kernel, q, k, v, segment, BLOCK, rows)
