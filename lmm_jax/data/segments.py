"""Segments: one copy of a conversation at one scale, opened into positions, and the rows of a pack that hold them.

Index arithmetic in numpy. Everything variable is decided here, so that the device program has static shapes. A
conversation whose picture has the bank's slots 30 to 32, and of which the last two tokens are supervised:

    ids              1   IMAGE         5   6   7   2
    supervised       -     -           -   -   +   +

    id               1   0   0   0     5   6   7   2
    slot            -1  30  31  32    -1  -1  -1  -1
    target          -1  -1  -1  -1    -1   7   2  -1        the token that each position is to predict

Such segments stand one behind the other in a row; `position` starts again at 0 in each, `segment` numbers them over
the whole pack from 1 on, and what is left of the row is segment 0:

    a row of 15      position   0 1 2 3 4 5 6 7 0 1 2 3 4 5 0
                     segment    1 1 1 1 1 1 1 1 2 2 2 2 2 2 0
"""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import IMAGE

NO_TARGET = -1
NO_QUESTION = -1


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
      question: `[n]` number in the pack of the question whose answer the target belongs to, -1 elsewhere; None where
        no target belongs to any. See `questions`.
    """

    id: np.ndarray
    slot: np.ndarray
    target: np.ndarray
    group: int
    question: np.ndarray | None = None

    def __len__(self):
        return len(self.id)


def lay_out(ids, supervised, blocks, group=1, question=None) -> Segment:
    """Opens the pictures of an encoded conversation into their slots and shifts the targets.

    Args:
      ids: `[m]` ids with `IMAGE` for each picture.
      supervised: `[m]` bool.
      blocks: bank slots of each picture, in order of appearance.
      group: bitmask of loss groups.
      question: `[m]` number of the question whose answer each id belongs to, -1 elsewhere; None if there are none.

    Raises:
      ValueError: the pictures named in the text are not as many as the blocks.
    """
    is_image = ids == IMAGE
    if is_image.sum() != len(blocks):
        raise ValueError(f"{is_image.sum()} <image> tags in the text, {len(blocks)} pictures")
    width = np.ones(len(ids), np.int64)  # positions that each id opens into
    width[is_image] = [len(block) for block in blocks]
    opened = np.repeat(np.where(is_image, 0, ids), width).astype(np.int32)
    slot = np.full(len(opened), -1, np.int32)
    if blocks:
        slot[np.repeat(is_image, width)] = np.concatenate(blocks)
    is_target = np.repeat(supervised & ~is_image, width)
    target = np.full(len(opened), NO_TARGET, np.int32)
    target[:-1] = np.where(is_target[1:], opened[1:], NO_TARGET)  # each position predicts the next one
    of_target = None
    if question is not None:
        of_target = np.full(len(opened), NO_QUESTION, np.int32)
        of_target[:-1] = np.where(is_target[1:], np.repeat(question, width)[1:], NO_QUESTION)
    return Segment(opened, slot, target, group, of_target)


def blank(length) -> Segment:
    """Padding that takes the place of a copy of `length` positions."""
    nothing = np.full(length, -1, np.int32)
    return Segment(np.zeros(length, np.int32), nothing, np.full(length, NO_TARGET, np.int32), 0)


def pack(segments, row_of, rows, length, targets) -> dict[str, np.ndarray]:
    """Lays segments into the rows of a pack, one behind the other.

    Args:
      segments: `Segment`s; all may use any slot of the pack.
      row_of: the row of each.
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
    target = np.full((rows, length), NO_TARGET, np.int32)
    group = np.zeros((rows, length), np.int32)
    used = [0] * rows
    for number, (segment, row) in enumerate(zip(segments, row_of, strict=True), start=1):
        begin, end = used[row], used[row] + len(segment)
        out["id"][row, begin:end] = segment.id
        out["slot"][row, begin:end] = segment.slot
        out["position"][row, begin:end] = np.arange(len(segment))
        out["segment"][row, begin:end] = number
        target[row, begin:end] = segment.target
        group[row, begin:end] = np.where(segment.target == NO_TARGET, 0, segment.group)
        used[row] = end
    return out | _gathered_targets(target, group, targets)


def _gathered_targets(target, group, targets):
    """Supervised positions of a pack put together, as `pack` returns them, so that only they need logits."""
    found = np.flatnonzero(group)
    if len(found) > targets:
        raise DoesNotFit(f"{len(found)} supervised tokens, room for {targets}; raise data.targets")
    out = {}
    for name, values in (("target_at", found), ("target", target.flat[found]), ("group", group.flat[found])):
        out[name] = np.zeros(targets, np.int32)
        out[name][: len(found)] = values
    return out
