"""Segments: one copy of a conversation at one scale, opened into positions, and the rows of a pack that hold them.

Index arithmetic in numpy. Everything variable is decided here, so that the device program has static shapes.
"""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import IMAGE

NO_TARGET = -1


class DoesNotFit(ValueError):
    """A pack's segments, or their targets, exceed its rows."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """One copy of a conversation at one scale, ready to be placed in a row.

    Attributes:
      id: `[n]` token ids, 0 under visual tokens.
      slot: `[n]` bank slots, -1 for text.
      target: `[n]` id of the next token where it is supervised, `NO_TARGET` elsewhere.
      group: bitmask of the loss groups that the targets belong to.
    """

    id: np.ndarray
    slot: np.ndarray
    target: np.ndarray
    group: int

    def __len__(self):
        return len(self.id)


def lay_out(ids, supervised, blocks, group=1) -> Segment:
    """Opens the pictures of an encoded conversation into their slots and shifts the targets.

    Args:
      ids: `[m]` ids with `IMAGE` for each picture.
      supervised: `[m]` bool.
      blocks: slot array of each picture, in order of appearance.
      group: bitmask of loss groups.

    Raises:
      ValueError: the pictures named in the text are not as many as the blocks.
    """
    is_image = ids == IMAGE
    if is_image.sum() != len(blocks):
        raise ValueError(f"{is_image.sum()} <image> tags in the text, {len(blocks)} pictures")
    width = np.ones(len(ids), np.int64)
    width[is_image] = [len(block) for block in blocks]
    slot = np.full(width.sum(), -1, np.int32)
    if blocks:
        slot[np.repeat(is_image, width)] = np.concatenate(blocks)
    opened = np.repeat(np.where(is_image, 0, ids), width).astype(np.int32)
    is_target = np.repeat(supervised & ~is_image, width)
    target = np.full(len(opened), NO_TARGET, np.int32)
    target[:-1] = np.where(is_target[1:], opened[1:], NO_TARGET)
    return Segment(opened, slot, target, group)


def blank(length) -> Segment:
    """Padding that takes the place of a copy of `length` positions."""
    nothing = np.full(length, -1, np.int32)
    return Segment(np.zeros(length, np.int32), nothing, np.full(length, NO_TARGET, np.int32), 0)


def pack(segments, where, rows, length, targets) -> dict[str, np.ndarray]:
    """Lays segments into the rows of a pack, one behind the other.

    Args:
      segments: `Segment`s; all may use any slot of the pack.
      where: the row of each.
      rows: rows R of the pack.
      length: positions T of a row.
      targets: supervised positions K that a pack can hold.

    Returns:
      id, slot, position, segment: `[R, T]` int32; segment 0 is padding.
      target_at, target, group: `[K]` int32; index into the pack's R·T positions, id, bitmask (0 = unused).

    Raises:
      DoesNotFit: more targets than there is room for.
    """
    out = {name: np.zeros((rows, length), np.int32) for name in ("id", "position", "segment")}
    out["slot"] = np.full((rows, length), -1, np.int32)
    next_id = np.full((rows, length), NO_TARGET, np.int32)
    group = np.zeros((rows, length), np.int32)
    used = np.zeros(rows, np.int64)
    for number, (segment, row) in enumerate(zip(segments, where, strict=True), start=1):
        n = len(segment)
        at = (row, slice(used[row], used[row] + n))
        out["id"][at], out["slot"][at] = segment.id, segment.slot
        out["position"][at] = np.arange(n)
        out["segment"][at] = number
        next_id[at] = segment.target
        group[at] = np.where(segment.target == NO_TARGET, 0, segment.group)
        used[row] += n
    found = np.flatnonzero(group)
    if len(found) > targets:
        raise DoesNotFit(f"{len(found)} supervised tokens, room for {targets}; raise data.targets")
    for name, values in (("target_at", found), ("target", next_id.flat[found]), ("group", group.flat[found])):
        out[name] = np.zeros(targets, np.int32)
        out[name][: len(found)] = values
    return out
