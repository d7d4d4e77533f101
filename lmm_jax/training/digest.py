"""A number for each array that any damage to its bits changes; computed where the array lies, the same on every mesh.

Each element's bits are mixed with its place before they are added, so that damage that follows a pattern (a leaf
that is negated, a lane that is stuck, blocks that are swapped, pages of zeros) changes the sum like damage at random.
There are two sums of 32 bits each, mixed in different ways: that damaged bits have the same two is one chance in
2^64.
"""

import math
import os
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np

PIECE, BLOCK = 2**25, 2**18  # numbers of an array on the host that are digested by a thread, and in one go
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


def digest(tree) -> dict[str, int]:
    """A number of 64 bits for each leaf, by its path; leaves are of at most 4 bytes an element."""
    return {path: _joined(value) for path, value in jax.device_get(device_digests(named(tree))).items()}


def named(tree) -> dict[str, jax.Array]:
    """The leaves of a tree by their paths."""
    return {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in jax.tree.leaves_with_path(tree)}


def digest_of_host(x) -> int:
    """The digest of a numpy array, of which little is copied to a device at a time."""
    flat = x.reshape(-1)

    def add(start):
        piece = flat[start : start + PIECE]
        size = 1 << (piece.size - 1).bit_length()  # few sizes are compiled
        padded = np.concatenate([piece, np.zeros(size - piece.size, piece.dtype)]) if size > piece.size else piece
        place = np.array([start % 2**32, start >> 32], np.uint32)
        return np.asarray(_sum_of_blocks(padded, place, np.uint32(piece.size)))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(add, range(0, flat.size, PIECE)))
    return _joined(np.sum(parts, axis=0, dtype=np.uint32) if parts else np.zeros(2, np.uint32))


@jax.jit
def device_digests(flat):
    """`[2]` uint32 for each array of a dict, on its devices."""
    return {path: device_digest(x) for path, x in flat.items()}


def _joined(pair) -> int:
    return int(pair[0]) << 32 | int(pair[1])


@jax.jit
def _sum_of_blocks(x, place, count):
    """`_sum` of the first `count` elements of a flat array, a block that stays in the cache at a time."""
    blocks = x.reshape(-1, min(x.size, BLOCK))

    def add(i, carry):
        total, place = carry
        block = jax.lax.dynamic_index_in_dim(blocks, i, keepdims=False)
        inside = i.astype(jnp.uint32) * jnp.uint32(BLOCK) + jnp.arange(blocks.shape[1], dtype=jnp.uint32) < count
        return total + _sum(block, place, inside), _moved(place, blocks.shape[1])

    return jax.lax.fori_loop(0, len(blocks), add, (jnp.zeros(2, jnp.uint32), place))[0]


@jax.jit
def device_digest(x):
    """`[2]` uint32 of one array; traced once for all of a shape, when it is part of a larger program."""
    start = jnp.zeros(2, jnp.uint32)
    if x.ndim < 3:
        return _sum(x, start)
    each = math.prod(x.shape[1:])

    def add(i, carry):
        # A layer at a time, as the compiler for CPUs stores every term of a sum; behind the barrier, as it would
        # convert all layers at once before the loop.
        total, place = carry
        layers = jax.lax.optimization_barrier((x, i))[0]
        layer = jax.lax.dynamic_index_in_dim(layers, i, keepdims=False)
        return total + _sum(layer, place), _moved(place, each)

    return jax.lax.fori_loop(0, len(x), add, (start, start))[0]


def _moved(place, count):
    """A place in an array, the low and the high 32 bits of an element's number, `count` (below 2^32) further on."""
    low = place[0] + jnp.uint32(count)
    return jnp.stack([low, place[1] + (low < place[0]).astype(jnp.uint32)])


def _sum(x, place, inside=None):
    """Both sums `[2]` of the bits of `x`, whose first element has the number `place`; of those `inside` alone."""
    bits = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    low = place[0] + index
    high = place[1] + (low < index).astype(jnp.uint32)
    # A number is told by its bits and its place one to one, and mixed one to one: a single one that changed never
    # keeps its term.
    where = _mixed((low ^ high * jnp.uint32(0x9E3779B1)) + jnp.uint32(0x6A09E667), 0x7FEB352D, 0x846CA68B)
    terms = [
        _mixed(bits ^ where, 0x85EBCA6B, 0xC2B2AE35),
        _mixed(bits + (where ^ where >> 15) * jnp.uint32(0x2C1B3C6D), 0x21F0AAAD, 0xD35A2D97),
    ]
    if inside is not None:
        terms = [jnp.where(inside, term, jnp.uint32(0)) for term in terms]
    return jnp.stack([term.sum(dtype=jnp.uint32) for term in terms])


def _mixed(x, first, second):
    """Numbers of 32 bits, one to one, such that each bit of the result depends on all bits of its own."""
    x = (x ^ x >> 16) * jnp.uint32(first)
    x = (x ^ x >> 15) * jnp.uint32(second)
    return x ^ x >> 16
