"""Rows too long for one device: positions shared out over the mesh axes of "length", `context` by default.

A row of T positions is cut into 2·C chunks for C devices, and device i holds chunks i and 2·C − 1 − i: an early one,
whose positions see little, and a late one, whose positions see much. All devices so have the same work to the pair.
Everything but attention acts on each position alone. Attention gathers the keys and values of a layer while it lasts,
and each device computes what its own positions see of them, a block of scores at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax import sharding
from lmm_jax.models.attention.attention import softmax_attention
from lmm_jax.models.attention.on_mesh import PADDING
from lmm_jax.models.attention.splash import causal_kernel, segment_ids, whole_lanes

BLOCK = 512  # positions whose scores exist at a time where no kernel computes them


def ways(length) -> int:
    """Devices C that share out a row of `length` positions; 1 where it does not divide into 2·C chunks."""
    C = sharding.ways("length")
    return C if length % (2 * C) == 0 else 1


def order(length, C) -> np.ndarray:
    """`[length]` int32: place in its row of what stands where, device after device."""
    chunks = np.arange(length, dtype=np.int32).reshape(2, C, -1)
    return np.stack([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)


def share_out(x, *names):
    """Moves a row's chunks to their devices: what was in the order of the row is in that of `order`.

    Args:
      x: array of positions, `ways` of which is above 1.
      names: logical axes of its axes, "length" among them.
    """
    return _exchange(x, names, back=False)


def bring_back(x, *names):
    """Undoes `share_out`."""
    return _exchange(x, names, back=True)


def _exchange(x, names, back):
    spec, axis = sharding.partition(x.shape, *names), names.index("length")
    over, C = spec[axis], sharding.devices(spec[axis])
    # Of the two neighbouring chunks that a device starts with one goes to an even device, and one to an odd one.
    routes = [[(i, min(c, 2 * C - 1 - c)) for i, c in enumerate(range(first, 2 * C, 2))] for first in (0, 1)]

    def local(x):
        pair = jnp.split(x, 2, axis=axis)
        even = jax.lax.axis_index(over) % 2 == 0
        if back:
            pair = [jnp.where(even, a, b) for a, b in (pair, pair[::-1])]
            pair = [jax.lax.ppermute(y, over, [(j, i) for i, j in r]) for y, r in zip(pair, routes, strict=True)]
        else:
            pair = [jax.lax.ppermute(y, over, r) for y, r in zip(pair, routes, strict=True)]
            pair = [jnp.where(even, a, b) for a, b in (pair, pair[::-1])]
        return jnp.concatenate(pair, axis=axis)

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def context_attention(q, k, v, segment, interpret=False):
    """Causal attention inside segments over positions that are shared out, see `attention.attention`.

    Args:
      q: `[B, T, H, d]`, positions in the order of `order`; `ways(T)` is above 1.
      k: `[B, T, N, d]`.
      v: like `k`.
      segment: `[B, T]` int, at least 0.
      interpret: runs the TPU kernel's program without a TPU, for tests.

    Returns:
      `[B, T, H, d]` in the dtype of `q`, positions as in `q`.
    """
    T, H = q.shape[1:3]
    spec = sharding.partition(q.shape, "batch", "length", "heads", None)
    if spec != sharding.partition(k.shape, "batch", "length", "kv_heads", None):
        k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    specs = [spec, spec, spec, jax.P(*spec[:2])]
    over, C = spec[1], sharding.devices(spec[1])
    if interpret or sharding.platform() == "tpu":
        padded = 2 * C * whole_lanes(T // (2 * C))
        kernel = causal_kernel(H // sharding.devices(spec[2]), order(padded, C), C, interpret)
        placed = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(None, over))
        f = jax.shard_map(
            functools.partial(_by_kernel, over=over),
            in_specs=(kernel.manual_sharding_spec(placed), *specs),
            out_specs=spec,
            check_vma=False,
        )
        return f(kernel, q, k, v, segment)
    f = functools.partial(_by_blocks, over=over, order=order(T, C).reshape(C, -1))
    return jax.shard_map(f, in_specs=tuple(specs), out_specs=spec, check_vma=False)(q, k, v, segment)


def _by_kernel(kernel, q, k, v, segment, over):
    """A device's `[B, 2 · chunk, H, d]` by the TPU's kernel, whose mask holds the row's order."""
    B, n, H, d = q.shape
    room = whole_lanes(n // 2) - n // 2

    def pad(x, value=0):
        halves = x.reshape(B, 2, n // 2, *x.shape[2:])
        halves = jnp.pad(halves, ((0, 0), (0, 0), (0, room), *[(0, 0)] * (x.ndim - 2)), constant_values=value)
        return halves.reshape(B, n + 2 * room, *x.shape[2:])

    q, k, v = (pad(x) for x in (q * d**-0.5, k, v))
    segment = pad(segment, PADDING)
    k, v, segments = (_gather(x, over) for x in (k, v, segment))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.vmap(lambda q, k, v, *s: kernel(q, k, v, segment_ids(*s)))(q, k, v, segment, segments)
    out = out.swapaxes(1, 2).reshape(B, 2, n // 2 + room, H, d)
    return out[:, :, : n // 2].reshape(B, n, H, d)


def _by_blocks(q, k, v, segment, over, order):
    """A device's `[B, 2 · chunk, H, d]`, `BLOCK` positions' scores at a time, forwards and backwards."""
    B, n, H, d = q.shape
    own = jnp.asarray(order)[jax.lax.axis_index(over)]
    k, v, segments = (_gather(x, over) for x in (k, v, segment))
    block = max(b for b in range(1, min(n, BLOCK) + 1) if n % b == 0)

    def one(x):
        q, segment, own = x
        mask = (own[:, None] >= jnp.arange(k.shape[1])) & (segment[:, :, None] == segments[:, None, :])
        return softmax_attention(q, k, v, mask)

    blocks = (
        q.reshape(B, -1, block, H, d).swapaxes(0, 1),
        segment.reshape(B, -1, block).swapaxes(0, 1),
        own.reshape(-1, block),
    )
    return jax.lax.map(jax.checkpoint(one), blocks).swapaxes(0, 1).reshape(B, n, H, d)


def _gather(x, over):
    """All devices' `[B, 2 · chunk, …]`, in the order of the row."""
    x = jax.lax.all_gather(x, over, axis=1)
    early, late = jnp.split(x, 2, axis=2)
    return jnp.concatenate([early, late[:, ::-1]], axis=1).reshape(x.shape[0], -1, *x.shape[3:])
