"""JAX's splash attention kernel for TPU, on any mesh and any length."""

import jax

from lmm_jax.models.kernels import on_every_device

LANES = 128  # the kernel works on multiples of so many positions
LONGEST_BLOCK = 640  # positions; 640 × 640 float32 scores of a block and its gradients stay within scoped VMEM


def splash_attention(q, k, v, segment=None, causal=False, interpret=False):
    """`attention.attention`, by a kernel that never holds a row of scores: see there.

    Args:
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0, or None.
      causal: a position sees itself and what stands before it.
      interpret: runs the kernel's program without a TPU, for tests.

    Returns:
      `[B, T, H, d]` in the dtype of `q`.
    """

    def kernel(q, k, v, *segment):
        T, H, d = q.shape[1:]
        of_row = _kernel(H, T, causal, interpret)
        q, k, v = (q * d**-0.5).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
        return jax.vmap(lambda q, k, v, *s: of_row(q, k, v, *map(_both, s)))(q, k, v, *segment).swapaxes(1, 2)

    return on_every_device(kernel, q, k, v, segment, LANES)


def _both(segment):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=segment, kv=segment)


def _kernel(heads, length, causal, interpret):
    # Pallas takes a fifth of a second to import, which only programs for a TPU pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = (splash.CausalMask if causal else splash.FullMask)((length, length))
    block = max(b for b in range(LANES, min(length, LONGEST_BLOCK) + 1, LANES) if length % b == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    masks = splash.MultiHeadMask([mask] * heads)
    return splash.make_splash_mha_single_device(masks, block_sizes=sizes, interpret=interpret)
