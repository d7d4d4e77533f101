"""Damage of any pattern changes the digest, which is the same on every mesh and on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.training import digest as digest_lib
from lmm_jax.training.digest import digest, digest_of_host

SIZE = 3 * 64 * 96


@pytest.fixture(scope="module")
def original():
    return np.random.default_rng(0).normal(size=(3, 64, 96)).astype(np.float32)


def bits(x):
    return x.view(np.uint32).reshape(-1)


def flip(x, places, mask):
    bits(x)[places] ^= np.uint32(mask)


def swap(x, one, other, size):
    flat = bits(x)
    flat[one : one + size], flat[other : other + size] = (
        flat[other : other + size].copy(),
        flat[one : one + size].copy(),
    )


# What damage does to an array, by its pattern; each gets the array and a random generator.
PATTERNS = {
    "two sign bits": lambda x, r: flip(x, r.choice(SIZE, 2, replace=False), 1 << 31),
    "two high bits": lambda x, r: flip(x, r.choice(SIZE, 2, replace=False), 1 << 30),
    "bit 30 of 16 in a row": lambda x, r: flip(x, slice(i := r.integers(SIZE - 16), i + 16), 1 << 30),
    "bit 30 of 16 lines": lambda x, r: flip(x, np.arange(16) * 96 + r.integers(96), 1 << 30),
    "all signs": lambda x, r: flip(x, slice(None), 1 << 31),
    "all bits": lambda x, r: flip(x, slice(None), 0xFFFFFFFF),
    "a lane that is stuck at 0": lambda x, r: bits(x).__setitem__(slice(r.integers(8), None, 8), 0),
    "a lane that is stuck at 1": lambda x, r: bits(x).__setitem__(slice(r.integers(8), None, 8), 0xFFFFFFFF),
    "a page of zeros": lambda x, r: bits(x).__setitem__(slice(i := 1024 * r.integers(18), i + 1024), 0),
    "a page twice": lambda x, r: bits(x).__setitem__(slice(1024, 2048), bits(x)[4096:5120].copy()),
    "swapped blocks": lambda x, r: swap(x, 256 * r.integers(8), 256 * (8 + r.integers(8)), 256),
    "swapped layers": lambda x, r: swap(x, 0, 6144, 6144),
    "swapped numbers": lambda x, r: swap(x, r.integers(100), 100 + r.integers(100), 1),
    "shifted by one": lambda x, r: bits(x).__setitem__(slice(None), np.roll(bits(x), 1)),
    "the same bit of an even number": lambda x, r: flip(x, r.choice(SIZE, 64, replace=False), 1 << r.integers(32)),
    "bytes swapped": lambda x, r: bits(x).__setitem__(slice(None), bits(x).byteswap()),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_damage_of_a_pattern_changes_the_digest(original, pattern):
    before, random = digest_of_host(original), np.random.default_rng(1)
    for _ in range(8):
        x = original.copy()
        PATTERNS[pattern](x, random)
        assert digest_of_host(x) != before


@pytest.mark.parametrize("half", [0, 32])
def test_each_half_of_the_digest_sees_damage_by_itself(original, half):
    """Two halves of which one were blind would leave a chance of 2^-32."""
    part = lambda x: digest_of_host(x) >> half & 0xFFFFFFFF  # noqa: E731
    before, random = part(original), np.random.default_rng(2)
    for change in PATTERNS.values():
        x = original.copy()
        change(x, random)
        assert part(x) != before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8"])
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (3, 5, 7), (2, 3, 4, 5)])
def test_the_host_and_the_devices_give_the_same(dtype, shape, monkeypatch):
    x = (np.random.default_rng(0).normal(size=shape) * 100).astype(jnp.dtype(dtype))
    assert digest({"x": jnp.asarray(x)}) == {"x": digest_of_host(x)}
    monkeypatch.setattr(digest_lib, "PIECE", 16)  # several pieces, whose places go on
    assert digest({"x": jnp.asarray(x)}) == {"x": digest_of_host(x)}


def test_a_mesh_does_not_change_it(original):
    x = original[:, :64, :64]
    for shape, spec in (((8,), (None, "a")), ((4, 2), (None, "a", "b")), ((2, 4), (None, ("a", "b")))):
        mesh = jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
        placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))
        assert digest({"x": placed}) == {"x": digest_of_host(x)}


def test_places_beyond_the_first_32_bits_count():
    x = jnp.arange(8, dtype=jnp.uint32)
    starts = [np.array(start, np.uint32) for start in ((0, 0), (0, 1), (2**32 - 4, 0), (2**32 - 4, 1))]
    assert len({tuple(np.asarray(digest_lib._sum(x, start)).tolist()) for start in starts}) == len(starts)
    assert digest_lib._moved(starts[2], 8).tolist() == [4, 1]
