"""How many: the rule by which a grid of visual vectors becomes the tokens of a scale.

The encoder gives every view a grid of vectors. A *scale* is how many tokens a square grid becomes, and a *reduction*
is how it becomes them. Two places have to agree on it: the model, which computes the tokens on the device, and the
data pipeline, which decides beforehand, on the CPU, which of them stands at which position. So one class has both
halves. A grid of 6 × 6 cells at scale 9, by average pooling:

    device   reduction(grids, 9, 6)         [.., 6, 6, D] -> [.., 9, D]: token t is row t // 3, column t % 3
    host     reduction.shape(6, 6, 6, 9)    (3, 3): the picture has 9 slots, three rows of three

A view that is not square, such as a canvas that holds a picture of its own aspect ratio, has another number of tokens
than the scale says. The scale then fixes what one token stands for (above, 2 × 2 cells), and `shape` says how many
tokens that makes.

To add a reduction, derive a class from `Reduction` and name it in `REDUCTIONS`; the config field `model.reduction`
chooses. A reduction has no parameters. The same object makes the bank and the stacks, so that what is added at a slot
comes from the cells that the slot stands for.
"""

import abc
import math


class Reduction(abc.ABC):
    """What every reduction gives.

    The data pipeline imports this module and must not import jax: `__call__` gets by with the methods that arrays of
    NumPy and of JAX have in common.
    """

    @abc.abstractmethod
    def valid(self, side) -> list[int]:
        """The scales that a square grid of `side` × `side` cells can have, ascending."""

    @abc.abstractmethod
    def shape(self, rows, columns, side, scale):
        """Rows and columns of the tokens that stand for the first `rows` × `columns` cells of a grid, on the host.

        Cells at the lower and right edge that would fill only a part of a token belong to none. The tokens of the
        first `rows` × `columns` cells are the first rows and columns of the whole grid's tokens. That is why the
        slots of a picture that fills only a part of its canvas can be counted here.

        Args:
          rows, columns: of the cells; int or arrays of them.
          side: of a square picture's grid, which `scale` refers to.
          scale: tokens of a square picture's grid; `rows` = `columns` = `side` gives so many.

        Returns:
          `(rows, columns)`, each int or an array like its argument.

        Raises:
          ValueError: a scale that is not among the valid ones, see `check`.
        """

    @abc.abstractmethod
    def __call__(self, grids, scale, side):
        """The tokens of grids `[..., h, w, D]`, on the device: `[..., tokens, D]`, row by row, in the grids' dtype.

        `tokens` is rows times columns of `shape(h, w, side, scale)`. Takes arrays of NumPy and of JAX.

        Raises:
          ValueError: a scale that is not among the valid ones, see `check`.
        """

    def check(self, side, scale):
        """Raises ValueError if a grid of `side` × `side` cannot become `scale` tokens; it lists the valid scales."""
        valid = self.valid(side)
        if scale not in valid:
            raise ValueError(f"{scale} tokens do not tile a {side}×{side} grid; valid scales are {valid}")


class AveragePool(Reduction):
    """Averages square windows of cells (M3, section 3.1).

    Windows tile a square grid exactly, so that pooling at once equals pooling in steps. Grids of other shapes get the
    same windows, and what is left over at their lower and right edge is dropped.
    """

    def valid(self, side) -> list[int]:
        """See `Reduction.valid`: the squares of what divides the side."""
        return [m * m for m in range(1, side + 1) if side % m == 0]

    def shape(self, rows, columns, side, scale):
        """See `Reduction.shape`."""
        k = self._window(side, scale)
        return rows // k, columns // k

    def __call__(self, grids, scale, side):
        """See `Reduction.__call__`; averages in float32."""
        k = self._window(side, scale)
        *lead, h, w, D = grids.shape
        rows, columns = h // k, w // k
        windows = grids[..., : rows * k, : columns * k, :].reshape(*lead, rows, k, columns, k, D)
        return windows.mean(axis=(-2, -4), dtype="float32").astype(grids.dtype).reshape(*lead, rows * columns, D)

    def _window(self, side, scale) -> int:
        """Side of the windows, cells."""
        self.check(side, scale)
        return side // math.isqrt(scale)


REDUCTIONS = {"pool": AveragePool()}


def find_reduction(name) -> Reduction:
    """The reduction that `model.reduction` names.

    Raises:
      ValueError: it does not exist; the message lists those that do.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"model.reduction='{name}' is none of {', '.join(map(repr, REDUCTIONS))}")
    return REDUCTIONS[name]
