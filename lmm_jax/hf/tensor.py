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
      shape: theirs.
      path: of our parameter.
      layer: index into our leading axis of layers, or None.
      order: axes of theirs, in our order; () keeps them.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    order: tuple[int, ...]

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
