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
TEXT = -2  # less an id, among the slots of a picture: text inside its block


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
      position: `[n]` or `[n, 3]` int, see `positions`; None if each is numbered by its place.
      blend: `[n, 4]` bank slots and `[n, 4]` float32, their shares in what stands at each position, -1 and 0 at
        text; None where it is all of `slot`.
    """

    id: np.ndarray
    slot: np.ndarray
    target: np.ndarray
    group: int
    question: np.ndarray | None = None
    position: np.ndarray | None = None
    blend: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self):
        return len(self.id)


def lay_out(ids, supervised, blocks, group=1, question=None, shapes=None, blends=None) -> Segment:
    """Opens the pictures of an encoded conversation into their slots and shifts the targets.

    Args:
      ids: `[m]` ids with `IMAGE` for each picture.
      supervised: `[m]` bool.
      blocks: bank slots of each picture, in order of appearance; `TEXT` less an id is text inside its block.
      group: bitmask of loss groups.
      question: `[m]` number of the question whose answer each id belongs to, -1 elsewhere; None if there are none.
      shapes: as of `positions`.
      blends: of each picture what `Segment.blend` holds of its block; None if nothing is blended.

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
        of_block, inside = np.concatenate(blocks), np.repeat(is_image, width)
        slot[inside] = np.where(of_block <= TEXT, -1, of_block)
        opened[inside] = np.where(of_block <= TEXT, TEXT - of_block, 0)
    is_target = np.repeat(supervised & ~is_image, width)
    target = np.full(len(opened), NO_TARGET, np.int32)
    target[:-1] = np.where(is_target[1:], opened[1:], NO_TARGET)  # each position predicts the next one
    of_target = None
    if question is not None:
        of_target = np.full(len(opened), NO_QUESTION, np.int32)
        of_target[:-1] = np.where(is_target[1:], np.repeat(question, width)[1:], NO_QUESTION)
    blend = None
    if blends:
        blend = np.full((len(opened), 4), -1, np.int32), np.zeros((len(opened), 4), np.float32)
        for whole, parts in zip(blend, zip(*blends, strict=True), strict=True):
            whole[inside] = np.where(slot[inside, None] >= 0, np.concatenate(parts), whole[inside])
    return Segment(opened, slot, target, group, of_target, positions(slot, shapes), blend)


def positions(slot, shapes=None) -> np.ndarray:
    """Numbers of the positions of a segment, for rotary embeddings.

    A model may number them on three axes (Qwen3-VL): time, row and column. Text has the same number on each, one more
    than what is before it. A picture stands at one point of time, its first token where text would go on, and the
    text behind it goes on as if the picture had been as long as its longer side. Of a picture of 2 × 3 tokens:

        time     0 1   2 2 2 2 2 2   5 6
        row      0 1   2 2 2 3 3 3   5 6
        column   0 1   2 3 4 2 3 4   5 6

    Args:
      slot: `[n]` bank slots, negative for text.
      shapes: rows and columns of the visual tokens of each picture, in order of appearance; None for one axis, on
        which every position counts.

    Returns:
      `[n, 3]` int32, or `[n]` without `shapes`.
    """
    if shapes is None:
        return np.arange(len(slot), dtype=np.int32)
    visual = np.flatnonzero(slot >= 0)
    out = np.repeat(np.arange(len(slot), dtype=np.int32)[:, None], 3, axis=1)
    first, late = 0, 0  # of a picture among the visual tokens; how much later what is behind it would be by its place
    for rows, columns in shapes:
        at = visual[first : first + rows * columns]
        y, x = np.divmod(np.arange(rows * columns), columns)
        begin, first = at[0] - late, first + rows * columns
        late += rows * columns - max(rows, columns)
        out[at[-1] + 1 :] = np.arange(at[-1] + 1, len(slot))[:, None] - late
        out[at] = begin + np.stack([np.zeros_like(y), y, x], axis=1)
    return out


def blank(length) -> Segment:
    """Padding that takes the place of a copy of `length` positions."""
    nothing = np.full(length, -1, np.int32)
    return Segment(np.zeros(length, np.int32), nothing, np.full(length, NO_TARGET, np.int32), 0)


def pack(segments, row_of, rows, length, targets, axes=(), blended=False) -> dict[str, np.ndarray]:
    """Lays segments into the rows of a pack, one behind the other.

    Args:
      segments: `Segment`s; all may use any slot of the pack.
      row_of: the row of each.
      rows: rows R of the pack.
      length: positions T of a row.
      targets: supervised positions K that a pack can hold.
      axes: shape of the number of a position, () or (3,), see `positions`.
      blended: whether segments may have a `blend`.

    Returns:
      id, slot, position, segment: `[R, T]` int32, positions `[R, T, 3]` where they have axes; segment 0 is padding.
      blend_slot, blend_share: `[R, T, 4]` int32 and float32, of `Segment.blend`; only if `blended`.
      target_at, target, group: `[K]` int32; index into the pack's R·T positions, id, bitmask (0 = unused).

    Raises:
      DoesNotFit: more targets than there is room for.
    """
    out = {name: np.zeros((rows, length), np.int32) for name in ("id", "segment")}
    out["position"] = np.zeros((rows, length, *axes), np.int32)
    out["slot"] = np.full((rows, length), -1, np.int32)
    if blended:
        out["blend_slot"] = np.full((rows, length, 4), -1, np.int32)
        out["blend_share"] = np.zeros((rows, length, 4), np.float32)
    target = np.full((rows, length), NO_TARGET, np.int32)
    group = np.zeros((rows, length), np.int32)
    used = [0] * rows
    for number, (segment, row) in enumerate(zip(segments, row_of, strict=True), start=1):
        begin, end = used[row], used[row] + len(segment)
        out["id"][row, begin:end] = segment.id
        out["slot"][row, begin:end] = segment.slot
        by_place = np.arange(len(segment)).reshape(-1, *[1] * len(axes))
        out["position"][row, begin:end] = by_place if segment.position is None else segment.position
        out["segment"][row, begin:end] = number
        if segment.blend is not None:
            out["blend_slot"][row, begin:end], out["blend_share"][row, begin:end] = segment.blend
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
