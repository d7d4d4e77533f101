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
chooses, and `lmm.load(…, reduction=NAME)` lets a trained model see by another one. A reduction has no parameters. The
same object makes the bank and the stacks, so that what is added at a slot comes from the cells that the slot stands
for.

"pool" is what M3 trains: *how many* tokens. The others are baselines that need no training, and answer *which* cells
become tokens: "random" and "strided" take the same cells of every picture, "zip" those that the encoder attends to.
"""

import abc
import math

import numpy as np


def factor_of(scale, side, factors) -> int:
    """Which of the projector's shuffles makes a scale: the coarsest whose grid has as many cells as tokens.

    Of more tokens than any grid has cells it is the finest, whose reduction then refuses them.

    Args:
      scale: tokens of a square view.
      side: of its grid of features.
      factors: cells a side that become one, of each path of the projector.
    """
    fitting = [factor for factor in factors if (side // factor) ** 2 >= scale]
    return max(fitting, default=min(factors))


class Reduction(abc.ABC):
    """What every reduction gives.

    The data pipeline imports this module and must not import jax: `__call__` gets by with the methods that arrays of
    NumPy and of JAX have in common.

    Attributes:
      needs_importance: `__call__` wants to know how important each cell is, as the encoder says. It is called as
        `reduction(grids, scale, side, importance)` then, with the grids of bank and stacks together: grids
        `[1 + S, ..., h, w, D]`, the bank's first, and importance `[..., h, w]` float32.
      chooses: a token is no window of neighbouring cells; which cells it stands for may differ from picture to
        picture, so that the host knows only how many tokens there are. Grids are whole square views then.
    """

    needs_importance = False
    chooses = False

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


class Choice(Reduction):
    """Tokens that are chosen among the cells of a square view, any number of them, in reading order.

    On the host they stand in one row: `scale` tokens of a whole view, none of a part of one.
    """

    chooses = True

    def valid(self, side) -> list[int]:
        """See `Reduction.valid`: every number up to that of the cells."""
        return list(range(1, side * side + 1))

    def check(self, side, scale):
        """Raises ValueError if a grid of `side` × `side` has no `scale` cells to choose."""
        if not 1 <= scale <= side * side:
            raise ValueError(
                f"{scale} tokens cannot be chosen among the cells of a {side}×{side} grid; valid scales are 1 to "
                f"{side * side}"
            )

    def shape(self, rows, columns, side, scale):
        """See `Reduction.shape`."""
        self.check(side, scale)
        whole = (rows == side) & (columns == side)
        return whole * 1, whole * scale


class FixedChoice(Choice):
    """The same cells of every picture, as `cells` says."""

    @abc.abstractmethod
    def cells(self, side, scale) -> np.ndarray:
        """Numbers of the cells in reading order, `[scale]` int, ascending."""

    def __call__(self, grids, scale, side):
        """See `Reduction.__call__`."""
        self.check(side, scale)
        *lead, h, w, D = grids.shape
        return grids.reshape(*lead, h * w, D)[..., self.cells(side, scale), :]


class Strided(FixedChoice):
    """Cells that are evenly spaced in reading order: the middle one of each of `scale` equal parts."""

    def cells(self, side, scale):
        """See `FixedChoice.cells`."""
        return (2 * np.arange(scale) + 1) * side * side // (2 * scale)


class Random(FixedChoice):
    """Cells drawn without replacement, the same for every picture; those of a scale are among those of larger ones.

    Args:
      seed: of the draw. "random" is seed 0.
    """

    def __init__(self, seed=0):
        self._seed = seed

    def cells(self, side, scale):
        """See `FixedChoice.cells`."""
        return np.sort(np.random.default_rng(self._seed).permutation(side * side)[:scale])


class Zip(Choice):
    """The most important cells, and the others merged into a few tokens (VisionZip, 2412.04467, section 3).

    Of `scale` tokens `contextual(scale)` are merged ones. The others are *dominant*: the cells to which the encoder's
    class token attends most. Of the cells that are left, evenly spaced ones become *targets*; each of the rest joins
    the target that it is most similar to, and a target's token is the mean of what it consists of. Stacks are merged
    as the bank is.

    Here vectors behind the projector are compared and merged, as those are what is kept of a picture. The paper
    compares the keys of the encoder's attention and merges before the projector. It also keeps the class token, which
    has no place in a grid.
    """

    needs_importance = True

    def contextual(self, scale) -> int:
        """How many of the tokens are merged ones: 5 of 32, close to the paper's shares, which were not checked."""
        return round(scale * 5 / 32)

    def __call__(self, grids, scale, side, importance):
        """See `Reduction.needs_importance`; averages in float32."""
        self.check(side, scale)
        *lead, h, w, D = grids.shape
        cells = grids.reshape(*lead, h * w, D).astype("float32")
        members = self.members(cells[0], importance.reshape(*lead[1:], h * w), scale)
        return (members @ cells / members.sum(axis=-1, keepdims=True)).astype(grids.dtype)

    def members(self, bank, importance, scale):
        """Which cells each token is the mean of, `[..., scale, cells]` float32, 1 or 0; the tokens in reading order.

        Args:
          bank: `[..., cells, D]` float32.
          importance: `[..., cells]`. Of equal ones the first counts as more important.
          scale: tokens.
        """
        n = importance.shape[-1]
        contextual = self.contextual(scale) if scale < n else 0
        dominants = scale - contextual
        # The rank of a cell is its place in the order, so that it is the order's inverse.
        rank = (-importance).argsort(axis=-1, stable=True).argsort(axis=-1, stable=True)
        dominant = rank < dominants
        other = (~dominant).cumsum(axis=-1) - 1  # their numbers, from 0
        target = ~dominant & (other * contextual % max(1, n - dominants) < contextual)
        kept = dominant | target
        token = kept.cumsum(axis=-1) - 1
        own = kept[..., None, :] & (token[..., None, :] == np.arange(scale)[:, None])
        own = own.astype("float32")  # [..., scale, cells], a single 1 for each token
        if not contextual:
            return own
        unit = bank / ((bank * bank).sum(axis=-1, keepdims=True) ** 0.5 + 1e-12)
        cosine = unit @ unit.swapaxes(-1, -2) - 4.0 * ~target[..., None, :]  # only targets can be the nearest
        joins = ~kept[..., None] & (np.arange(n) == cosine.argmax(axis=-1)[..., None])  # [..., cell, target]
        return own + own @ joins.astype("float32").swapaxes(-1, -2)


REDUCTIONS = {"pool": AveragePool(), "random": Random(), "strided": Strided(), "zip": Zip()}


def find_reduction(name) -> Reduction:
    """The reduction that `model.reduction` names.

    Raises:
      ValueError: it does not exist; the message lists those that do.
    """
    if name not in REDUCTIONS:
        raise ValueError(f"model.reduction='{name}' is none of {', '.join(map(repr, REDUCTIONS))}")
    return REDUCTIONS[name]
