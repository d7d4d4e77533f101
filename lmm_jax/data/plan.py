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


def scale_slots(grid, scale, scales, grids) -> np.ndarray:
    """Slots `[scale]` of one grid at one scale, in the bank that `visual_tokens.bank` builds.

    Args:
      grid: number of the grid in its pack.
      scale: tokens wanted.
      scales: scales of the bank, in its order.
      grids: grids of a pack, U.
    """
    before = sum(scales[: scales.index(scale)])
    return grids * before + grid * scale + np.arange(scale, dtype=np.int32)


def scales_at(step, scales, per_step) -> tuple[int, ...]:
    """The scales that train at `step` when only `per_step` of them do: evenly spread, each equally often."""
    n = len(scales)
    return tuple(scales[i] for i in sorted({(step + j * n // per_step) % n for j in range(per_step)}))


def tile_source(side, tiling, pictures) -> np.ndarray:
    """Where bank and stacks come from when each picture is seen whole and in tiles (DeepStack-L, section 3.2).

    The tiles make one mosaic of features; stack k = i · columns + j is every (rows, columns)-th of them from (i, j),
    so that each cell of the whole picture receives the features that lie under it.

    Args:
      side: side g of a view's feature grid.
      tiling: `(columns, rows)` of the tiles.
      pictures: pictures of a pack; each has 1 + columns · rows views.

    Returns:
      `[1 + columns · rows, pictures, g, g]` int32 indices into the pack's features.
    """
    columns, rows = tiling
    y, x = np.mgrid[: rows * side, : columns * side]
    mosaic = (1 + (y // side) * columns + x // side) * side**2 + (y % side) * side + x % side
    whole = np.arange(side**2).reshape(side, side)
    one = np.stack([whole, *(mosaic[i::rows, j::columns] for i in range(rows) for j in range(columns))])
    first = np.arange(pictures)[:, None, None] * (1 + columns * rows) * side**2
    return (one[:, None] + first).astype(np.int32)


def unpad(rows, columns, width, height) -> tuple[slice, slice]:
    """The cells of a canvas that show its picture, `resize_fitted` having centred it there (LLaVA-NeXT).

    The reference's roundings are kept: a cell of padding may stay, and of a small picture at a coarse scale nothing.

    Args:
      rows, columns: of the canvas, in tokens.
      width, height: of the original picture, in pixels.

    Returns:
      `(row slice, column slice)`, possibly empty.
    """
    if width / height > columns / rows:
        padding = (rows - int(height * (columns / width))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(width * (rows / height))) // 2
    return slice(0, rows), slice(padding, columns - padding)
