"""Index arithmetic: which bank slot stands at which position, and where stacks come from. All numpy.

Everything variable is decided here, so that the device program has static shapes.
"""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import IMAGE

NO_TARGET = -1


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


def bank_slots(cells, first, number, tokens, units) -> np.ndarray:
    """Slots `[n]` int32 of a picture's visual tokens in the bank that `visual_tokens.bank` builds.

    Args:
      cells: `[n]` int, unit · tokens + token, the picture's units counted from 0; negative for the newline, whose
        slot is the bank's last.
      first: number of the picture's first unit in its pack.
      number: of the scale among those of the bank.
      tokens: slots of a unit at each scale of the bank, in its order.
      units: units of a pack, U.
    """
    slots = units * sum(tokens[:number]) + first * tokens[number] + cells
    return np.where(cells < 0, units * sum(tokens), slots).astype(np.int32)


def scales_at(step, scales, per_step) -> tuple[int, ...]:
    """The scales that train at `step` when only `per_step` of them do: evenly spread, each equally often."""
    n = len(scales)
    return tuple(scales[i] for i in sorted({(step + j * n // per_step) % n for j in range(per_step)}))


def margins(rows, columns, width, height):
    """Rows above and below, and columns left and right, of a canvas that its picture leaves (LLaVA-NeXT).

    The reference's roundings are kept: a cell of padding may stay, and of a small picture at a coarse scale nothing.

    Args:
      rows, columns: of the canvas, in tokens.
      width, height: of the original picture, in pixels; `resize_fitted` has centred it. Or arrays of them.

    Returns:
      `(rows, columns)` on each side, int or arrays.
    """
    wide = width / height > columns / rows
    above = (rows - (height * (columns / width)).astype(np.int64)) // 2
    left = (columns - (width * (rows / height)).astype(np.int64)) // 2
    return np.where(wide, above, 0), np.where(wide, 0, left)


def unpad(rows, columns, width, height) -> tuple[slice, slice]:
    """The cells of a canvas that show its picture, see `margins`: `(row slice, column slice)`, possibly empty."""
    above, left = map(int, margins(rows, columns, np.float64(width), np.float64(height)))
    return slice(above, rows - above), slice(left, columns - left)
