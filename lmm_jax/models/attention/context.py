"""Rows too long for one device: positions shared out over the mesh axes of "length", `context` by default.

A row of T positions is cut into 2·C chunks for C devices. As the row lies, device i would hold chunks 2·i and 2·i + 1
and the last device, whose positions see all before them, would have the most work in causal attention. So device i is
given chunks i and 2·C − 1 − i: an early one, whose positions see little, and a late one, whose positions see much.
All devices then have the same number of pairs to compute. With four devices:

    device                     0         1         2         3
    chunks as the row lies     0 1       2 3       4 5       6 7       what `bring_back` gives
    chunks for attention       0 7       1 6       2 5       3 4       what `share_out` gives
    pairs that these see       0.5+7.5   1.5+6.5   2.5+5.5   3.5+4.5   in squares of a chunk's length: 8 each

    even chunk → new device    0 → 0     2 → 2     4 → 3     6 → 1     each device sends and receives one even chunk
    odd chunk → new device     1 → 1     3 → 3     5 → 2     7 → 0     and one odd chunk

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
    spec, axis, over, of_even, of_odd = _routes(x, names)

    def local(x):
        even, odd = jnp.split(x, 2, axis=axis)
        even, odd = jax.lax.ppermute(even, over, of_even), jax.lax.ppermute(odd, over, of_odd)
        early, late = _swapped_on_odd_devices(even, odd, over)
        return jnp.concatenate([early, late], axis=axis)

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def bring_back(x, *names):
    """Undoes `share_out`."""
    spec, axis, over, of_even, of_odd = _routes(x, names)

    def local(x):
        early, late = jnp.split(x, 2, axis=axis)
        even, odd = _swapped_on_odd_devices(early, late, over)
        even, odd = jax.lax.ppermute(even, over, _reversed(of_even)), jax.lax.ppermute(odd, over, _reversed(of_odd))
        return jnp.concatenate([even, odd], axis=axis)

    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _routes(x, names):
    """How the chunks of `x` travel in `share_out`.

    Returns:
      spec: `PartitionSpec` of `x`.
      axis: of `x`, its positions.
      over: mesh axes that share out the positions.
      of_even, of_odd: `(from, to)` of each device's even chunk, its first, and of its odd chunk.
    """
    spec, axis = sharding.partition(x.shape, *names), names.index("length")
    over, C = spec[axis], sharding.devices(spec[axis])
    of_even, of_odd = ([(i, _holder(2 * i + odd, C)) for i in range(C)] for odd in (0, 1))
    return spec, axis, over, of_even, of_odd


def _holder(chunk, C):
    """The device that computes attention for a chunk: the first C in order, the others backwards."""
    return min(chunk, 2 * C - 1 - chunk)


def _reversed(route):
    return [(to, start) for start, to in route]


def _swapped_on_odd_devices(a, b, over):
    """`(a, b)` on devices with an even number along `over`, `(b, a)` on the others.

    Of device i's chunks i and 2·C − 1 − i the early one is even where i is, and the late one is where i is odd.
    """
    even = jax.lax.axis_index(over) % 2 == 0
    return jnp.where(even, a, b), jnp.where(even, b, a)


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
