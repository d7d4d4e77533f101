"""JAX's splash attention kernel for TPU, on any mesh and any length."""

import jax

from lmm_jax.models.attention.on_mesh import SAVED, on_every_device

LANES = 128  # the kernel works on multiples of so many positions
LONGEST_BLOCK = 640  # positions; 640 × 640 float32 scores of a block and its gradients stay within scoped VMEM


def splash_attention(q, k, v, segment=None, causal=False, rows="batch", interpret=False):
    """`attention.attention`, by a kernel that never holds a row of scores: see there.

    Args:
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0, or None.
      causal: a position sees itself and what stands before it.
      rows: logical axis of B.
      interpret: runs the kernel's program without a TPU, for tests.

    Returns:
      `[B, T, H, d]` in the dtype of `q`.
    """

    def kernel(q, k, v, *segment):
        T, H, d = q.shape[1:]
        of_row = _kernel(H, T, causal, interpret)
        q, k, v = (q * d**-0.5).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
        run = jax.vmap(lambda q, k, v, *s: of_row(q, k, v, *(segment_ids(x, x) for x in s)))
        return run(q, k, v, *segment).swapaxes(1, 2)

    return on_every_device(kernel, q, k, v, segment, LANES, rows)


def whole_lanes(length) -> int:
    """The next multiple of `LANES`."""
    return -(-length // LANES) * LANES


def segment_ids(q, kv):
    """The kernel's argument for segments `[T]` of queries and of keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=q, kv=kv)


def causal_kernel(heads, order, shards, interpret):
    """The kernel of one of `shards` devices that share out the queries of a row, and hold all its keys.

    Args:
      heads: query heads of a device.
      order: `[T]` int, place in the row of each query; keys are in the order of the row.
      shards: devices. The kernel's arrays hold what all of them do: `manual_sharding_spec` shares them out.
      interpret: see `splash_attention`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.CausalMask((len(order), len(order)))
    mask.q_sequence = order
    return _make(mask, heads, len(order) // (2 * shards), interpret, shards)


def _kernel(heads, length, causal, interpret):
    # Pallas takes a fifth of a second to import, which only programs for a TPU pay.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return _make((splash.CausalMask if causal else splash.FullMask)((length, length)), heads, length, interpret, 1)


def _make(mask, heads, length, interpret, shards):
    """`length`: positions that blocks must divide."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

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
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
