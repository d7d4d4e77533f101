"""One tensor of a published model beside the parameter of ours that it becomes a part of."""

import dataclasses
import math

import numpy as np

from lmm_jax.families.kinds import LINEAR, Layout

STRIP = 256  # rows of a matrix that are transposed at a time


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and where it goes.

    Attributes:
      name: theirs.
      shape: theirs, or that of the rows of it that are ours.
      path: of our parameter.
      layer: index into our leading axis of layers, or None.
      order: axes of theirs, in our order; () keeps them.
      rows: `(first, all)` where theirs is fused of several of ours: from which of its rows on this one lies in it.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    order: tuple[int, ...]
    rows: tuple[int, int] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Their shape, of a fused one with the rows of all."""
        return (self.rows[1], *self.shape[1:]) if self.rows else self.shape

    def of_ours(self, stored):
        """The rows of a stored tensor that are ours."""
        return stored[self.rows[0] : self.rows[0] + self.shape[0]] if self.rows else stored

    def to_ours(self, array, out):
        """Copies theirs to `out`, contiguous, in the layout of ours: one layer."""
        shape = [array.shape[axis] for axis in self.order] or array.shape
        _transpose(array, self.order, out.reshape(shape))

    def to_theirs(self, array):
        """One layer of ours in the layout of theirs; contiguous, as safetensors writes a view's memory as it lies."""
        order = self.order or tuple(range(len(self.shape)))
        array = np.asarray(array).reshape([self.shape[axis] for axis in order])
        out = np.empty(self.shape, array.dtype)
        _transpose(array, tuple(np.argsort(order)), out)
        return out


def their_shape(layout: Layout, ours, fields) -> tuple[int, ...]:
    """The shape of a published tensor.

    Args:
      layout: how it lies beside ours.
      ours: shape of our parameter, without an axis of layers.
      fields: mapping of the module's fields, for layouts that name one.
    """
    if layout.order == LINEAR.order:
        return math.prod(ours[layout.inputs :]), math.prod(ours[: layout.inputs])
    if layout.side is not None:
        side = fields[layout.side] if isinstance(layout.side, str) else layout.side
        if layout.frames:
            frames = fields[layout.frames]
            return ours[-1], ours[0] // (frames * side**2), frames, side, side
        return ours[-1], ours[0] // side**2, side, side
    if layout.order:  # a depthwise convolution: each channel has a window of its own
        return ours[-1], 1, *ours[:2]
    return (math.prod(ours),) if layout.flat else tuple(ours)


def _transpose(array, order, out):
    """Copies `array` to `out` with its axes in `order`; matrices in strips, three times as fast as numpy's own."""
    if tuple(order) != LINEAR.order:
        out[...] = array.transpose(order) if order else array
        return
    for row in range(0, len(array), STRIP):
        out[:, row : row + STRIP] = array[row : row + STRIP].T
