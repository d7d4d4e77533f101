"""What the attention kernels share: lengths they can take, and each device on its own rows and heads."""

import jax
import jax.numpy as jnp

from lmm_jax import sharding

PADDING = -1  # segment of the positions that are added
SAVED = "attention"  # names what a kernel's gradient needs of its result, for policies of rematerialisation


def on_every_device(kernel, q, k, v, segment, multiple, rows):
    """Runs an attention kernel on every device, on the rows and heads that the mesh gives it.

    Positions stay whole: a mesh that shards them gathers them here. Where the mesh splits the query heads but not
    the key-value heads, these are repeated to as many.

    Args:
      kernel: function of q, k, v and, if there is one, segment; returns an array like q.
      q: `[B, T, H, d]`.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0, or None.
      multiple: of positions, to which the kernel's arguments are padded.
      rows: logical axis of B.

    Returns:
      `[B, T, H, d]`.
    """
    B, T, H, _ = q.shape
    room = -T % multiple
    if room:
        segment = jnp.zeros((B, T), jnp.int32) if segment is None else segment
        q, k, v = (jnp.pad(x, ((0, 0), (0, room), (0, 0), (0, 0))) for x in (q, k, v))
        segment = jnp.pad(segment, ((0, 0), (0, room)), constant_values=PADDING)
    of_q = sharding.partition(q.shape, rows, None, "heads", None)
    if of_q != sharding.partition(k.shape, rows, None, "kv_heads", None):
        k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    arguments, specs = [q, k, v], [of_q] * 3
    if segment is not None:
        arguments, specs = [*arguments, segment], [*specs, of_q and jax.P(of_q[0])]
    if of_q is not None:
        kernel = jax.shard_map(kernel, in_specs=tuple(specs), out_specs=of_q, check_vma=False)
    return kernel(*arguments)[:, :T]
