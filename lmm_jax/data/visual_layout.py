"""How a recipe arranges the visual tokens of one picture: its views, what of them stands in the sequence, its stacks.

Everything is index arithmetic on sizes; nothing of a picture's pixels is needed. `layout` places pictures in a pack.

| recipe | tilings | aspect | zoom | sequence | stacks | sampling | newline |
|---|---|---|---|---|---|---|---|
| LLaVA-1.5, M3, ConvLLaVA | () | pad | 1 | whole | | | no |
| ConvLLaVA, any aspect ratio | () | own | 1 | whole | | | no |
| LLaVA-NeXT `flat` | its pinpoints | anyres | 1 | flat | | | no |
| LLaVA-NeXT `spatial` | its pinpoints | anyres | 1 | grid | | | no |
| LLaVA-NeXT `spatial_unpad` | its pinpoints | anyres | 1 | unpad | | | yes |
| DeepStack-L | `deepstack_tilings(4)` | stretch | 1 | whole | samples | 2d | no |
| its `2xsample` | ((2, 2),) | stretch | 1 | whole | samples | 2d | no |
| its `deepstack_sampling` | as L | stretch | 1 | whole | samples | 1d, grid | no |
| its `inconsistent` | as L | anyres | 1 | whole | samples | 2d | no |
| its `dummy_local` | as L | stretch | 1 | whole | copies | | no |
| its `only_global_features` | () | stretch | 1 | blank | whole | | no |
| its `global_and_local` | as L | stretch | 1 | blank | whole+samples | 2d | no |
| its `string_woglobal` | as L | stretch | 1 | samples | | 2d | no |
| its `string_withglobal` | as L | stretch | 1 | whole+samples | | 2d | no |
| DeepStack-L-HD | as L | stretch | 2 | grid | zoom | | yes |
| DeepStack-V | ((2, 2),) | stretch | 1 | whole | encoder | | no |

LLaVA-NeXT's pinpoints are ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)). M3 goes with any of them. Where a picture has
fewer tiles than others, the reference's `string_…` have blank positions for what is missing; here there are none.
"""

import dataclasses
import math

import numpy as np

from lmm_jax.data.views import ASPECTS, choose_canvas, margins, select_tiling, size_on_canvas, unpad
from lmm_jax.reduction import REDUCTIONS, find_reduction

NEWLINE = -1  # among the slots of a picture
SEQUENCES = ("whole", "blank", "samples", "whole+samples", "flat", "grid", "unpad")
STACKS = ("", "samples", "copies", "whole", "whole+samples", "zoom", "encoder")
SAMPLINGS = ("2d", "1d", "grid")
# What can be added over each sequence: where the samples stand in it themselves, nothing is; inside the encoder, to
# whole pictures alone.
STACKS_OVER = {
    "whole": STACKS,
    "blank": ("samples", "copies", "whole", "whole+samples", "zoom"),
    "samples": ("",),
    "whole+samples": ("",),
    "flat": ("", "zoom"),
    "grid": ("", "zoom"),
    "unpad": ("", "zoom"),
}


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """Where the visual tokens of a picture come from and where they stand; see the module's table.

    A picture has one or several *grids*, each a square of cells of the bank. Its views and grids are counted from 0.

    Attributes:
      size: side of a square view, or what the short side of a picture with its own aspect ratio becomes; pixels.
      cell: pixels a side that one feature stands for.
      canvas: `(height, width)` of a view, pixels.
      aspect, tilings, zoom: see `views.make_views` and `views.select_tiling`.
      sequence: what of a picture stands in the sequence.
        "whole": the whole picture. "blank": as many positions without content. "samples", "whole+samples": what would
        be the stacks, one after the other. "flat": all views, one after the other. "grid": the whole picture, then
        the mosaic of its tiles row by row. "unpad": as "grid", without the rows or columns that are padding.
      stacks: what is added over it.
        "": nothing. "samples": the mosaic of the tiles, sampled. "copies": the whole picture, as often as a picture
        has tiles at most. "whole": the whole picture, once. "whole+samples": both. "zoom": of each grid its own
        zoomed tiles, sampled. "encoder": the tiles are stacked inside the encoder, which returns whole pictures.
      sampling: stack k = i · columns + j of a mosaic of (columns, rows) tiles is "2d": every (rows, columns)-th cell
        from (i, j); "1d": every (columns · rows)-th cell from k on, row by row; "grid": tile k.
      newline: whether a newline ends each row of "grid" and "unpad".
      reduction: how a grid becomes tokens, a name in `lmm_jax.reduction.REDUCTIONS`.
      padding: RGB 0 … 255 of what stands beside a picture in its square, of aspect "pad".
    """

    size: int
    cell: int
    canvas: tuple[int, int]
    aspect: str = "pad"
    tilings: tuple[tuple[int, int], ...] = ()
    zoom: int = 1
    sequence: str = "whole"
    stacks: str = ""
    sampling: str = "2d"
    newline: bool = False
    reduction: str = "pool"
    padding: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def from_config(cls, config, encoder):
        """What `config.data` and `config.model` describe; `config.visual_layout` finds the encoder to it.

        Args:
          config: of the run.
          encoder: `grid`, `stride` and `mean` of it are asked for, see `models.encoders`.

        Raises:
          ValueError: fields that are not of the known ones or contradict each other, named.
        """
        data, size = config.data, encoder.grid * encoder.stride
        wanted = find_reduction(config.model.reduction).needs_importance
        if wanted and not getattr(encoder, "gives_importance", False):
            raise ValueError(
                f"model.reduction='{config.model.reduction}' asks how important each cell is to the class token, and "
                f"model.encoder='{config.model.encoder}' has no class token; {_others('needs_importance')}"
            )
        return cls(
            size=size,
            cell=encoder.stride,
            canvas=tuple(data.canvas) or (size, size),
            aspect=data.aspect,
            tilings=tuple(map(tuple, data.tilings)),
            zoom=data.zoom,
            sequence=data.sequence,
            stacks=data.stacks,
            sampling=data.sampling,
            newline=config.model.newline,
            reduction=config.model.reduction,
            padding=tuple(int(255 * level) for level in encoder.mean),
        )

    def __post_init__(self):
        for name, known in (
            ("aspect", ASPECTS),
            ("sequence", SEQUENCES),
            ("stacks", STACKS),
            ("sampling", SAMPLINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}")
        if not all(len(t) == 2 and min(t) > 0 for t in self.tilings) or len(set(self.tilings)) < len(self.tilings):
            raise ValueError(f"data.tilings={self.tilings}: expected different pairs (columns, rows) of tiles")
        if len(self.tilings) > 1 and self.aspect not in ("stretch", "anyres"):
            raise ValueError(
                f"data.tilings={self.tilings} are chosen by a picture's shape, which data.aspect='{self.aspect}' "
                "does not follow; set data.aspect to 'stretch' or 'anyres', or name one tiling"
            )
        if self.sequence == "unpad" and self.aspect != "anyres":
            raise ValueError(f"data.sequence='unpad' needs data.aspect='anyres', got '{self.aspect}'")
        if (self.zoom > 1) != (self.stacks == "zoom") or self.zoom < 1:
            raise ValueError(f"data.zoom={self.zoom}: more than 1 goes with data.stacks='zoom', got '{self.stacks}'")
        self._check_reduction()
        self._check_tiles()
        self._check_canvas()

    def _check_reduction(self):
        reduction = find_reduction(self.reduction)
        if reduction.chooses and self.aspect == "own":
            raise ValueError(
                f"model.reduction='{self.reduction}' chooses among the cells of whole square views, which "
                f"data.aspect='own' does not give; {_others('chooses')}"
            )
        if reduction.needs_importance and self.sequence == "blank":
            raise ValueError(
                f"model.reduction='{self.reduction}' chooses among cells of a picture, and with "
                f"data.sequence='blank' none stands in the sequence; {_others('needs_importance')}"
            )

    def _check_tiles(self):
        sampled = "samples" in self.sequence or "samples" in self.stacks
        if (sampled or self.stacks in ("copies", "encoder")) and not self.tilings:
            raise ValueError(f"data.sequence='{self.sequence}', data.stacks='{self.stacks}': data.tilings is empty")
        if self.tilings and self.sequence in ("whole", "blank") and self.stacks in ("", "whole", "zoom"):
            raise ValueError(
                f"data.tilings={self.tilings} are not used by data.sequence='{self.sequence}' with "
                f"data.stacks='{self.stacks}'; set data.stacks='samples', or no tilings"
            )
        valid = STACKS_OVER[self.sequence]
        if self.stacks not in valid:
            raise ValueError(
                f"data.sequence='{self.sequence}' goes with data.stacks {' or '.join(map(repr, valid))}, "
                f"got '{self.stacks}'"
            )
        if self.stacks == "encoder" and (len(self.tilings) > 1 or self.tilings[0][0] != self.tilings[0][1]):
            raise ValueError(f"data.stacks='encoder' needs a single data.tilings=((n, n),), got {self.tilings}")

    def _check_canvas(self):
        own = self.aspect == "own"
        if not own and self.canvas != (self.size, self.size):
            raise ValueError(f"data.canvas={self.canvas} goes with data.aspect='own', got '{self.aspect}'")
        if own and (self.tilings or self.zoom > 1 or self.sequence != "whole" or self.stacks):
            raise ValueError("data.aspect='own' goes with data.sequence='whole', without tilings, zoom and stacks")
        if len(self.canvas) != 2 or min(self.canvas) < self.size or any(side % self.cell for side in self.canvas):
            raise ValueError(
                f"data.canvas={self.canvas}: expected (height, width) in pixels, multiples of {self.cell} and not "
                f"below model.vision.image_size={self.size}"
            )

    @property
    def view_grid(self) -> tuple[int, int]:
        """Rows and columns of a view's features."""
        return self.canvas[0] // self.cell, self.canvas[1] // self.cell

    @property
    def valid_scales(self) -> list[int]:
        """The scales that a view's grid can have, ascending; those that were trained are among them."""
        return find_reduction(self.reduction).valid(self.size // self.cell)

    @property
    def added(self) -> int:
        """Stacks that the data gives, S."""
        most = max((c * r for c, r in self.tilings), default=0)
        count = {"samples": most, "copies": most, "whole": 1, "whole+samples": 1 + most, "zoom": self.zoom**2}
        return count.get(self.stacks, 0)

    @property
    def direct(self) -> bool:
        """Whether the bank takes the encoder's grids as they stand, so that a pack needs no gather."""
        return not self.added and self.sequence in ("whole", "flat", "grid", "unpad")

    @property
    def _seen(self):
        """The tilings in which pictures are seen."""
        return self.tilings if self.tilings and self.stacks != "copies" else ((),)

    @property
    def views_step(self) -> int:
        """What the views of any picture are a multiple of."""
        return math.gcd(*map(self.views_of_tiling, self._seen))

    @property
    def fewest_views(self) -> int:
        """Views of the picture that has fewest."""
        return min(map(self.views_of_tiling, self._seen))

    def choose(self, sizes) -> np.ndarray:
        """Number among the tilings of each picture, `[n]`; sizes `[n, 2]` are (width, height) in pixels."""
        if len(self._seen) == 1:
            return np.zeros(len(sizes), np.int64)
        return choose_canvas(sizes, [(c * self.size, r * self.size) for c, r in self.tilings])

    def tiling(self, width, height) -> tuple[int, ...]:
        """`(columns, rows)` of a picture's tiles, () if it has none; width and height in pixels."""
        return self._seen[0] if len(self._seen) == 1 else select_tiling(width, height, self.size, self.tilings)

    def views_of_tiling(self, tiling) -> int:
        """Views of a picture: whole, tiles, and the zoomed tiles of each."""
        return (1 + math.prod(tiling) if tiling else 1) * (1 + self.zoom**2 if self.zoom > 1 else 1)

    def grids_of_tiling(self, tiling) -> int:
        """Grids of a picture."""
        tiles = math.prod(tiling) if tiling else 0
        return {"whole": 1, "blank": 1, "samples": tiles}.get(self.sequence, 1 + tiles)

    def views_of(self, sizes) -> np.ndarray:
        """Views of each of many pictures, `[n]`."""
        return np.array([self.views_of_tiling(tiling) for tiling in self._seen])[self.choose(sizes)]

    def most_grids(self, views) -> int:
        """The most grids of pictures that have so many views together: U of a pack."""
        if self.direct and self.stacks != "encoder":
            return views
        kinds = {(self.views_of_tiling(tiling), self.grids_of_tiling(tiling)) for tiling in self._seen}
        most = [0] * (views + 1)
        for n in range(1, views + 1):
            most[n] = max([most[n - 1], *(most[n - v] + u for v, u in kinds if v <= n)])
        return most[views]

    def gather(self, tiling) -> np.ndarray:
        """Where bank and stacks come from: `[1 + S, grids, g, g]` int32, cells of the picture's views, -1 = zeros."""
        bank = self._cells_of_bank(tiling)
        stacks = [self._cells_of_stacks(tiling, grid) for grid in range(len(bank))]
        by_grid = [np.stack([cells, *over]) for cells, over in zip(bank, stacks, strict=True)]
        return np.stack(by_grid, axis=1).astype(np.int32)

    def _cells_of_bank(self, tiling):
        """Cells `[g, g]` of each grid of a picture, as `sequence` says."""
        whole, nothing, samples = self._parts(tiling)
        match self.sequence:
            case "whole":
                return [whole]
            case "blank":
                return [nothing]
            case "samples":
                return samples
            case "whole+samples":
                return [whole, *samples]
            case _:  # flat, grid, unpad: every view but the zoomed ones, as the encoder gives it
                return [whole + view * whole.size for view in range(self.grids_of_tiling(tiling))]

    def _cells_of_stacks(self, tiling, grid):
        """Cells `[g, g]` of each stack over one grid of a picture, as `stacks` says; zeros where there is none."""
        whole, nothing, samples = self._parts(tiling)
        match self.stacks:
            case "samples":
                found = samples
            case "copies":
                found = [whole] * self.added
            case "whole":
                found = [whole]
            case "whole+samples":
                found = [whole, *samples]
            case "zoom":  # the zoomed tiles of all views follow the views, those of each together
                n, views = self.zoom, 1 + math.prod(tiling) if tiling else 1
                found = sample(mosaic(n, n, whole.shape, views + grid * n * n), n, n, "2d")
            case _:  # nothing, or inside the encoder
                found = []
        return found + [nothing] * (self.added - len(found))

    def _parts(self, tiling):
        """Cells `[g, g]` of the whole picture, none at all, and the samples of its tiles' mosaic."""
        whole = np.arange(self.view_grid[0] ** 2).reshape(self.view_grid[0], -1)
        samples = sample(mosaic(*tiling, whole.shape, 1), *tiling, self.sampling) if tiling else []
        return whole, np.full_like(whole, -1), samples

    def token_grid(self, scale) -> tuple[int, int]:
        """Rows and columns of the tokens of a whole view at `scale` tokens a square view.

        Raises:
          ValueError: a scale that the grid cannot have, with those that it can; or one whose tokens do not lie in a
            square, which cannot be un-padded.
        """
        rows, columns = self._tokens_over(*self.view_grid, scale)
        if self.sequence == "unpad" and rows != columns:
            raise ValueError(
                f"data.sequence='unpad' cuts squares of tokens, model.reduction='{self.reduction}' gives {rows} rows "
                f"of {columns} at scale {scale}; choose another scale, or data.sequence='grid'"
            )
        return rows, columns

    def grid_tokens(self, scale) -> int:
        """Slots of a grid in the bank at `scale`: `scale`, of a canvas more."""
        return math.prod(self.token_grid(scale))

    def _tokens_over(self, rows, columns, scale):
        """Rows and columns of the tokens over the first `rows` × `columns` cells of a view, ints or arrays."""
        return find_reduction(self.reduction).shape(rows, columns, self.size // self.cell, scale)

    def extents(self, sizes) -> np.ndarray:
        """`[n, 2]` int32 (height, width) in pixels of each picture on its canvas; of aspect "own" alone."""
        height, width = self.canvas
        found = [size_on_canvas(w, h, self.size, width, height)[::-1] for w, h in np.asarray(sizes).tolist()]
        return np.array(found, np.int32).reshape(-1, 2)

    def slots(self, tiling, scale, size) -> np.ndarray:
        """What stands in the sequence for a picture: `[n]` int, grid · `grid_tokens` + token, or `NEWLINE`.

        Args:
          tiling: `(columns, rows)` of its tiles, or ().
          scale: tokens of a square view.
          size: `(width, height)` of the picture, pixels.
        """
        rows, columns = self.token_grid(scale)
        if self.aspect == "own":
            shown = self._tokens_over(*self.extents([size])[0] // self.cell, scale)
            return np.add.outer(np.arange(shown[0]) * columns, np.arange(shown[1])).reshape(-1)
        if self.sequence not in ("grid", "unpad"):
            return np.arange(self.grids_of_tiling(tiling) * rows * columns)
        if tiling:
            canvas = mosaic(*tiling, (rows, columns), 1)
            canvas = canvas[unpad(*canvas.shape, *size)] if self.sequence == "unpad" else canvas
        else:  # one newline alone after a picture without tiles if un-padded, as the reference has it
            canvas = np.zeros((int(self.sequence == "unpad"), 0), np.int64)
        if self.newline:
            canvas = np.pad(canvas, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(rows * columns), canvas.reshape(-1)])

    def tokens(self, sizes, scale) -> np.ndarray:
        """Positions that each of many pictures takes in the sequence, `[n]`; 0 if it is too thin to have any.

        Args:
          sizes: `[n, 2]` (width, height), pixels.
          scale: tokens of a square view.
        """
        sizes = np.asarray(sizes).reshape(-1, 2)
        out, chosen = np.zeros(len(sizes), np.int64), self.choose(sizes)
        for number, tiling in enumerate(self._seen):
            at = np.flatnonzero(chosen == number)
            # Few kinds of pictures differ in what shows of their canvas, so that each is laid out once.
            _, first, kind = np.unique(self._shown(tiling, scale, sizes[at]), return_index=True, return_inverse=True)
            counts = [len(self.slots(tiling, scale, sizes[at[i]].tolist())) for i in first]
            out[at] = np.array(counts, np.int64)[kind]
        return out

    def _shown(self, tiling, scale, sizes):
        """`[n]` int, equal for pictures of which as much shows; of one tiling."""
        if self.aspect == "own":
            a, b = self._tokens_over(*(self.extents(sizes) // self.cell).T, scale)
        elif self.sequence == "unpad" and tiling:
            rows, columns = self.token_grid(scale)
            a, b = margins(tiling[1] * rows, tiling[0] * columns, *sizes.T)
        else:
            return np.zeros(len(sizes), np.int64)
        return a.astype(np.int64) << 32 | b


def _others(attribute):
    """The sentence's end that names the reductions without an attribute."""
    names = [repr(name) for name, reduction in REDUCTIONS.items() if not getattr(reduction, attribute)]
    return f"{' or '.join(names)} can be asked for"


def mosaic(columns, rows, grid, first) -> np.ndarray:
    """Indices `[rows · height, columns · width]` of tiles put together, among grids laid end to end.

    Args:
      columns, rows: tiles.
      grid: `(height, width)` of a tile's grid.
      first: number of the first tile's grid; the others follow row by row.
    """
    height, width = grid
    y, x = np.mgrid[: rows * height, : columns * width]
    tile = first + (y // height) * columns + x // width
    return tile * height * width + (y % height) * width + x % width


def sample(cells, columns, rows, sampling) -> list[np.ndarray]:
    """Takes a mosaic apart into columns · rows grids of a tile's size, see `VisualLayout.sampling`."""
    places = [(i, j) for i in range(rows) for j in range(columns)]
    height, width = cells.shape[0] // rows, cells.shape[1] // columns
    if sampling == "2d":  # each cell of the whole picture receives the features that lie under it
        return [cells[i::rows, j::columns] for i, j in places]
    if sampling == "1d":
        return [cells.reshape(-1)[k :: len(places)].reshape(height, width) for k in range(len(places))]
    return [cells[i * height : (i + 1) * height, j * width : (j + 1) * width] for i, j in places]
