"""Ways in which the files of a step are damaged: what disks, memory and people do to them."""

import dataclasses
import pathlib

import numpy as np

from tests.faults.states import state_of

PAGE, LINE = 4096, 64  # bytes of a page of memory, and of a line of a cache


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where the numbers of an array lie: file of a step, first byte, number of bytes, and bytes of each number."""

    file: str
    first: int
    size: int
    each: int


def files_of(folder) -> list[str]:
    """Every file of a step that is not empty, relative to its folder."""
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(str(path.relative_to(folder)) for path in files)


def find_leaves(folder) -> list[Leaf]:
    """The arrays of a step that are at least a cache line long, where their bytes lie in one place."""
    contents = {name: (pathlib.Path(folder) / name).read_bytes() for name in files_of(folder)}
    leaves = []
    for x in state_of(folder).values():
        data = x.tobytes()
        if len(data) < 2 * LINE or not any(data):
            continue
        places = [(name, content.find(data)) for name, content in contents.items() if data in content]
        leaves += [Leaf(name, first, len(data), x.dtype.itemsize) for name, first in places]
    assert len(leaves) > 20, "the arrays of a step are not found in its files"
    return leaves


def flip_bits(data, random, count=1, within=None):
    """Flips `count` bits that lie within so many bytes of each other, anywhere if None."""
    width = min(within or len(data), len(data))
    first = random.integers(0, len(data) - width + 1)
    for bit in random.choice(8 * width, min(count, 8 * width), replace=False):
        data[first + bit // 8] ^= np.uint8(1 << bit % 8)


def change_byte(data, random):
    """Any byte becomes any other."""
    data[random.integers(len(data))] = random.integers(256)


def _page(data, random):
    """A page of a file, or what there is of its last one."""
    start = PAGE * int(random.integers((len(data) - 1) // PAGE + 1))
    return data[start : start + PAGE]


def zero_page(data, random):
    """As an interrupted write leaves it."""
    _page(data, random).fill(0)


def scramble_page(data, random):
    """A page of noise."""
    page = _page(data, random)
    page[:] = random.integers(0, 256, len(page))


# Of the bytes of any file, `[n]` uint8, in place.
OF_FILES = {
    "one bit": flip_bits,
    "one byte": change_byte,
    "two bits": lambda data, random: flip_bits(data, random, 2),
    "a burst": lambda data, random: flip_bits(data, random, int(random.integers(3, 33)), LINE),
    "a zeroed page": zero_page,
    "a page of noise": scramble_page,
}


def two_sign_bits(data, each, random):
    """The highest bit of two numbers."""
    for number in random.choice(len(data) // each, 2, replace=False):
        data[number * each + each - 1] ^= np.uint8(0x80)


def negate(data, each, random):
    """Every number with the other sign."""
    data[each - 1 :: each] ^= np.uint8(0x80)


def bit_30_of_lines(data, each, random):
    """The highest bit but one of the first number of sixteen lines, or of as many as there are."""
    data[each - 1 :: LINE][:16] ^= np.uint8(0x40)


def swap_blocks(data, each, random):
    """Two blocks of equal size change places."""
    size = int(random.choice([each, LINE, 512, PAGE]))
    if len(data) < 2 * size:
        size = each
    one, two = size * random.choice(len(data) // size, 2, replace=False)
    first = data[one : one + size].copy()
    data[one : one + size] = data[two : two + size]
    data[two : two + size] = first


def stick_lane(data, each, random):
    """One wire of a bus always carries 1, or always 0."""
    width = int(random.choice([4, 8, 16, 32]))
    lane, bit = random.integers(width), np.uint8(1 << random.integers(8))
    if random.integers(2):
        data[lane::width] |= bit
    else:
        data[lane::width] &= ~bit


def rotate(data, each, random):
    """Every number one place further, as if a write had been off by one."""
    data[:] = np.roll(data, each)


def even_flips(data, each, random):
    """One high bit of an even number of numbers: cancels in sums of bits."""
    bit = np.uint8(1 << random.integers(4, 8))
    count = 2 * int(random.integers(1, min(16, len(data) // each // 2) + 1))
    data[random.choice(len(data) // each, count, replace=False) * each + each - 1] ^= bit


# Of the bytes of one array, with the bytes of each number.
OF_LEAVES = {
    "two sign bits": two_sign_bits,
    "a negated array": negate,
    "bit 30 of 16 lines": bit_30_of_lines,
    "swapped blocks": swap_blocks,
    "a stuck lane": stick_lane,
    "numbers one place further": rotate,
    "one high bit of evenly many": even_flips,
}


def damage_file(folder, name, kind, random):
    """Damages a file of a step; what had changed nothing is drawn again."""
    _change(pathlib.Path(folder) / name, lambda data: OF_FILES[kind](data, random))


def damage_leaf(folder, leaf, kind, random):
    """Damages an array of a step."""
    part = slice(leaf.first, leaf.first + leaf.size)
    _change(pathlib.Path(folder) / leaf.file, lambda data: OF_LEAVES[kind](data[part], leaf.each, random))


def _change(path, damage):
    before = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(50):
        data = before.copy()
        damage(data)
        if not np.array_equal(data, before):
            path.write_bytes(data.tobytes())
            return
    raise AssertionError(f"{path} cannot be damaged in this way")
