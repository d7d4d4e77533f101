"""From feature grids to the bank and the stacks: project, reduce per scale, and splice into the text.

The bank `[G, P, D]` holds every visual vector of a pack at every requested scale; a *slot* is an index into it.
`stacks` `[S, G, P, D]` lie over the bank slot for slot: what is added to the residual stream at the same positions.
Which slot stands at which position is index arithmetic of `lmm_jax.data.pack_layout`, in numpy.
"""

import functools

import jax
import jax.numpy as jnp

from lmm_jax.sharding import platform


def tile_mosaic(tiles):
    """Joins tiles `[..., rows, columns, g, g, C]` to one map `[..., rows · g, columns · g, C]`."""
    *lead, rows, columns, g, _, C = tiles.shape
    return tiles.swapaxes(-4, -3).reshape(*lead, rows * g, columns * g, C)


def sample_strided(x, n):
    """Maps number i · n + j of every n-th cell from (i, j): `[..., n · h, n · w, C]` to `[n², ..., h, w, C]`.

    Each cell of the coarse map so gets the n² cells that lie under it, one a map (DeepStack, section 3.2).
    """
    return jnp.stack([x[..., i::n, j::n, :] for i in range(n) for j in range(n)])


def take(table, index):
    """Rows of a table, zeros where `index` is negative; exact gradients in any dtype.

    On TPU a one-hot matrix is contracted, because there the backward pass of a gather becomes a sort and a scatter
    while a matmul stays a matmul. Elsewhere it is a gather, in float32: in bfloat16 a row that receives 512 or
    4096 unit gradients ends at 256.

    Args:
      table: `[G, P, D]`.
      index: `[G, ...]` int, below P.

    Returns:
      `[G, ..., D]` in the dtype of `table`.
    """
    if platform() == "tpu":
        hot = jax.nn.one_hot(index, table.shape[-2], dtype=table.dtype)
        rows = jnp.einsum("g...p,gpd->g...d", hot, table, preferred_element_type=jnp.float32)
    else:
        read = jax.vmap(functools.partial(jnp.take, axis=0))
        rows = read(table.astype(jnp.float32), jnp.maximum(index, 0))
        rows = jnp.where((index >= 0)[..., None], rows, 0)
    return rows.astype(table.dtype)


def take_blended(table, index, shares):
    """As `take`, of several rows in one.

    Args:
      table: `[G, P, D]`.
      index: `[G, ..., K]` int, below P.
      shares: `[G, ..., K]` float32, of each of K rows.

    Returns:
      `[G, ..., D]` in the dtype of `table`.
    """
    if platform() == "tpu":  # one product all the same, with K entries in a row where `take` has one
        hot = (jax.nn.one_hot(index, table.shape[-2], dtype=jnp.float32) * shares[..., None]).sum(axis=-2)
        rows = jnp.einsum("g...p,gpd->g...d", hot.astype(table.dtype), table, preferred_element_type=jnp.float32)
    else:
        rows = (take(table.astype(jnp.float32), index) * shares[..., None]).sum(axis=-2)
    return rows.astype(table.dtype)


def bank(grids, scales, side, reduction, importance=None):
    """Reduces projected grids to every scale and lays the results end to end.

    Args:
      grids: `[..., G, U, h, w, D]`, U grids of a pack.
      scales: tokens per grid, one bank region each, in this order.
      side: of a square picture's grid, which the scales refer to.
      reduction: what makes tokens of a grid, see `lmm_jax.reduction`.
      importance: `[G, U, h, w]` float32 where the reduction needs it; grids are `[1 + S, G, U, h, w, D]` then.

    Returns:
      `[..., G, P, D]`, P = U · sum(scales) of square grids; the slot of token t of grid u at scale s is
      `U · (sum of the scales before s) + u · s + t`.

    Raises:
      ValueError: a scale that the grid cannot have, with those that it can.
    """
    shape, further = (*grids.shape[:-4], -1, grids.shape[-1]), () if importance is None else (importance,)
    return jnp.concatenate([reduction(grids, s, side, *further).reshape(shape) for s in scales], axis=-2)


def splice(tokens, visual, slot, blend=None):
    """Puts visual vectors where `slot` names one: `[G, ..., D]`, visual `[G, P, D]`, slot `[G, ...]`.

    With `blend`, index and shares of `take_blended`, what stands there is made of these.
    """
    seen = take(visual, slot) if blend is None else take_blended(visual, *blend)
    return jnp.where((slot >= 0)[..., None], seen, tokens)
