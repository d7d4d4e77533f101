"""How a recipe arranges the visual tokens of one picture: its views, what of them stands in the sequence, its stacks.

Everything is index arithmetic on sizes; nothing of a picture's pixels is needed. `layout` places pictures in a pack.

| recipe | tilings | aspect | zoom | sequence | stacks | sampling | newline |
|---|---|---|---|---|---|---|---|
| LLaVA-1.5, M3, ConvLLaVA | () | pad | 1 | whole | | | no |
| ConvLLaVA, any aspect ratio | () | own | 1 | whole | | | no |
| LLaVA-NeXT `flat` | its pinpoints | anyres | 1 | flat | | | no |
| LLaVA-NeXT `spatial` | its pinpoints | anyres | 1 | grid | | | no |
| LLaVA-NeXT `spatial_unpad` | its pinpoints | anyres | 1 | unpad | | | yes |
| LLaVA-OneVision, `shrink` 9 | up to 6 × 6 tiles | anyres | 1 | unpad | | | yes |
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
| Qwen3-VL | () | native | 1 | whole | | | no |
| Granite-Docling | all of up to 32 tiles | stretch | 1 | tiles | | | no |
| SmolVLM | `longest_tilings(4)` | longest | 1 | tiles | | | no |

LLaVA-NeXT's pinpoints are ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)). M3 goes with any of them. Where a picture has
fewer tiles than others, the reference's `string_…` have blank positions for what is missing; here there are none.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping

import numpy as np

from lmm_jax.data.segments import TEXT
from lmm_jax.data.views import (
    ASPECTS,
    LONGEST,
    LONGEST_NATIVE,
    ON_CANVAS,
    choose_by_ratio,
    choose_canvas,
    longest_tilings,
    margins,
    native_size,
    size_on_canvas,
    sizes_by_longest,
    unpad,
)
from lmm_jax.families import MARKS
from lmm_jax.families.kinds import Marks
from lmm_jax.reduction import REDUCTIONS, factor_of, find_reduction

NEWLINE = -1  # among the slots of a picture
SEQUENCES = ("whole", "blank", "samples", "whole+samples", "flat", "grid", "unpad", "tiles")
CHOICES = ("most", "ratio")
MOST_SHRINK = 64  # views
LEAST_SHRINK = 1.1  # along each side; a mosaic that would be shrunk by less stays as it is
MOST_LONGEST = 4096  # pixels of the longer side of a picture of aspect "longest"
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
    "tiles": ("",),
}


@dataclasses.dataclass(frozen=True)
class VisualLayout:
    """Where the visual tokens of a picture come from and where they stand; see the module's table.

    A picture has one or several *grids*, each a square of cells of the bank. Its views and grids are counted from 0.

    Attributes:
      size: side of a square view, or what the short side of a picture of aspect "own" becomes; pixels. Of aspect
        "native" the square view that scales are counted for: what a token stands for is the same in all pictures.
      cell: pixels a side that one feature stands for.
      canvas: `(height, width)` of a view, pixels; the largest if there are several.
      canvases: several, of which each pack has one: see `buckets`. () if there is one.
      aspect, tilings, zoom: see `views.make_views` and `views.select_tiling`.
      sequence: what of a picture stands in the sequence.
        "whole": the whole picture. "blank": as many positions without content. "samples", "whole+samples": what would
        be the stacks, one after the other. "flat": all views, one after the other. "grid": the whole picture, then
        the mosaic of its tiles row by row. "unpad": as "grid", without the rows or columns that are padding.
        "tiles": tile by tile, then the whole picture; the tiling (1, 1) is the whole picture alone.
      stacks: what is added over it.
        "": nothing. "samples": the mosaic of the tiles, sampled. "copies": the whole picture, as often as a picture
        has tiles at most. "whole": the whole picture, once. "whole+samples": both. "zoom": of each grid its own
        zoomed tiles, sampled. "encoder": the tiles are stacked inside the encoder, which returns whole pictures.
      sampling: stack k = i · columns + j of a mosaic of (columns, rows) tiles is "2d": every (rows, columns)-th cell
        from (i, j); "1d": every (columns · rows)-th cell from k on, row by row; "grid": tile k.
      choice: which of several tilings a picture has: "most", the one whose canvas keeps most of it, or "ratio", the
        one of the nearest shape, see `views.choose_by_ratio`. Of aspect "longest" the shape alone says it, see
        `views.sizes_by_longest`.
      marks: name in `families.MARKS` of the text inside a picture's block, "" for none.
      mark_ids: ids of each text of the marks, once `with_marks` has found them.
      newline: whether a newline ends each row of "grid" and "unpad".
      shrink: n, where a mosaic of tiles of "unpad" that has over 1.21 times as many tokens as n views is shrunk to
        about so many, bilinearly: see `blends`. 0 for never.
      tiled_alone: whether a picture is tiled only where it is the one of its conversation. Of several each is seen
        whole, padded to a square: they have a layout of their own among `buckets`.
      reduction: how a grid becomes tokens, a name in `lmm_jax.reduction.REDUCTIONS`.
      shuffle: cells a side of which the projector makes one, of each of its paths.
      padding: RGB 0 … 255 of what stands beside a picture in its square, of aspect "pad".
      pixels: least and most of a picture of aspect "native", see `views.native_size`; () of others.
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
    shuffle: tuple[int, ...] = (1,)
    choice: str = "most"
    canvases: tuple[tuple[int, int], ...] = ()
    marks: str = ""
    mark_ids: Mapping[str, tuple[int, ...]] | None = None
    pixels: tuple[int, ...] = ()
    shrink: int = 0
    tiled_alone: bool = False

    @classmethod
    def from_config(cls, config, encoder):
        """What `config.data` and `config.model` describe; `config.visual_layout` finds the encoder to it.

        Args:
          config: of the run.
          encoder: `side`, `stride` and `mean` of it are asked for, see `models.encoders`.

        Raises:
          ValueError: fields that are not of the known ones or contradict each other, named.
        """
        data, size = config.data, encoder.side
        wanted = find_reduction(config.model.reduction).needs_importance
        if wanted and not getattr(encoder, "gives_importance", False):
            raise ValueError(
                f"model.reduction='{config.model.reduction}' asks how important each cell is to the class token, and "
                f"model.encoder='{config.model.encoder}' has no class token; {_others('needs_importance')}"
            )
        if data.tiled_alone and not data.tilings:
            raise ValueError("data.tiled_alone=True: data.tilings is empty")
        shuffle, native = tuple(config.model.projector.shuffle), data.aspect == "native"
        # Where none is named, a square that holds as many pixels as a picture may have.
        step = encoder.stride * max(shuffle)
        square = -(-math.isqrt(data.max_pixels) // step) * step if native else size
        return cls(
            size=size,
            cell=encoder.stride,
            canvas=max(map(tuple, data.canvases), key=math.prod, default=tuple(data.canvas) or (square, square)),
            canvases=tuple(map(tuple, data.canvases)),
            aspect=data.aspect,
            tilings=tuple(map(tuple, data.tilings)),
            zoom=data.zoom,
            sequence=data.sequence,
            stacks=data.stacks,
            sampling=data.sampling,
            choice=data.choice,
            marks=data.marks,
            newline=config.model.newline,
            reduction=config.model.reduction,
            shuffle=shuffle,
            padding=tuple(int(255 * level) for level in encoder.mean),
            pixels=(data.min_pixels, data.max_pixels) if native else (),
            shrink=data.shrink,
            tiled_alone=data.tiled_alone,
        )

    def __post_init__(self):
        for name, known in (
            ("aspect", ASPECTS),
            ("sequence", SEQUENCES),
            ("stacks", STACKS),
            ("sampling", SAMPLINGS),
            ("choice", CHOICES),
            ("marks", ("", *MARKS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name}={getattr(self, name)!r} is none of {', '.join(map(repr, known))}")
        if not all(len(t) == 2 and min(t) > 0 for t in self.tilings) or len(set(self.tilings)) < len(self.tilings):
            raise ValueError(f"data.tilings={self.tilings}: expected different pairs (columns, rows) of tiles")
        if len(self.tilings) > 1 and self.aspect not in ("stretch", "anyres", LONGEST):
            raise ValueError(
                f"data.tilings={self.tilings} are chosen by a picture's shape, which data.aspect='{self.aspect}' "
                "does not follow; set data.aspect to 'stretch' or 'anyres', or name one tiling"
            )
        if self.aspect == LONGEST:
            self._check_longest()
        if self.sequence == "unpad" and self.aspect != "anyres" and not self._of_several:
            raise ValueError(f"data.sequence='unpad' needs data.aspect='anyres', got '{self.aspect}'")
        for name in ("shrink", "tiled_alone"):
            if getattr(self, name) and (self.sequence != "unpad" or not self.tilings) and not self._of_several:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} goes with data.sequence='unpad' and data.tilings, got "
                    f"'{self.sequence}' and {self.tilings}"
                )
        if (self.zoom > 1) != (self.stacks == "zoom") or self.zoom < 1:
            raise ValueError(f"data.zoom={self.zoom}: more than 1 goes with data.stacks='zoom', got '{self.stacks}'")
        self._check_reduction()
        self._check_tiles()
        self._check_canvas()

    def _check_reduction(self):
        reduction = find_reduction(self.reduction)
        if reduction.chooses and self.on_canvas:
            raise ValueError(
                f"model.reduction='{self.reduction}' chooses among the cells of whole square views, which "
                f"data.aspect='{self.aspect}' does not give; {_others('chooses')}"
            )
        if reduction.needs_importance and self.shuffle != (1,):
            raise ValueError(
                f"model.reduction='{self.reduction}' asks how important each cell of the encoder is, and "
                f"model.projector.shuffle={self.shuffle} makes one of several; {_others('needs_importance')}"
            )
        side = self.size // self.cell
        if any(side % factor for factor in self.shuffle):
            raise ValueError(
                f"model.projector.shuffle={self.shuffle} does not divide the {side}×{side} features of a view"
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
        if self.sequence == "tiles" and not self.tilings:
            raise ValueError("data.sequence='tiles': data.tilings is empty")
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

    def _check_longest(self):
        most = max((max(tiling) for tiling in self.tilings), default=0)
        if set(self.tilings) != set(longest_tilings(most)) or not most:
            raise ValueError(
                f"data.aspect='{LONGEST}' makes the longer side of every picture n tiles long, for which "
                f"data.tilings must be all with a side of n tiles and no longer one, n from 1 up; got {self.tilings}"
            )
        if most * self.size > MOST_LONGEST or self.size % 2:
            raise ValueError(
                f"data.aspect='{LONGEST}': {most} tiles of {self.size} pixels; an even number of pixels a tile is "
                f"supported, {MOST_LONGEST} of them in a row at most"
            )
        if self.sequence not in ("tiles", "flat") or self.zoom > 1:
            raise ValueError(
                f"data.aspect='{LONGEST}' goes with data.sequence='tiles' or 'flat' and no zoom, got "
                f"'{self.sequence}' and {self.zoom}"
            )

    def _check_canvas(self):
        aspects = " or ".join(f"'{aspect}'" for aspect in ON_CANVAS)
        if not self.on_canvas:
            if self.canvases:
                raise ValueError(f"data.canvases={self.canvases} go with data.aspect={aspects}, got '{self.aspect}'")
            if self.canvas != (self.size, self.size):
                raise ValueError(f"data.canvas={self.canvas} goes with data.aspect={aspects}, got '{self.aspect}'")
            return
        if self.tilings or self.zoom > 1 or self.sequence != "whole" or self.stacks:
            raise ValueError(
                f"data.aspect='{self.aspect}' goes with data.sequence='whole', without tilings, zoom and stacks"
            )
        for canvas in self.canvases or (self.canvas,):
            self._check_one_canvas(canvas)
        if self.aspect == "native" and not self.step**2 <= self.pixels[0] <= self.pixels[1]:
            raise ValueError(
                f"data.min_pixels={self.pixels[0]}, data.max_pixels={self.pixels[1]}: expected as many pixels as a "
                f"token stands for, {self.step**2}, or more, the second not below the first"
            )

    def _check_one_canvas(self, canvas):
        if self.aspect == "native":
            if any(side % self.step for side in canvas):
                raise ValueError(
                    f"data.canvas={canvas}: expected (height, width) in pixels, multiples of {self.step}, which a "
                    "token stands for"
                )
        elif min(canvas) < self.size or any(side % self.cell for side in canvas):
            raise ValueError(
                f"data.canvas={canvas}: expected (height, width) in pixels, multiples of {self.cell} and not "
                f"below model.vision.image_size={self.size}"
            )

    @property
    def on_canvas(self) -> bool:
        """Whether a view is a canvas of which a picture fills as much as its own shape takes."""
        return self.aspect in ON_CANVAS

    @property
    def canvas_each(self) -> bool:
        """Whether the canvas says nothing of a picture but that it has a place there: see `holding`."""
        return self.aspect == "native"

    @property
    def buckets(self) -> tuple["VisualLayout", ...]:
        """This layout with each of its canvases alone; what is on a canvas is told apart by its number here.

        Or that of a picture alone and that of several, see `tiled_alone`, whose packs have the same shapes.
        """
        if self.tiled_alone and not self._of_several:
            return self, dataclasses.replace(self, aspect="pad", tilings=())
        one = functools.partial(dataclasses.replace, self, canvases=())
        return tuple(one(canvas=canvas) for canvas in self.canvases) or (self,)

    @property
    def _of_several(self):
        """Whether this is the layout of several pictures in `buckets`."""
        return self.tiled_alone and self.aspect == "pad" and not self.tilings

    def choose_buckets(self, sizes, of_group, groups) -> np.ndarray:
        """The bucket for each of several groups of pictures that share a canvas size, `[groups]` int.

        It is the smallest canvas that shows as much of the pictures as the best one does, pixel for pixel. Where
        canvases are all alike it is the first for one picture or none, and the second for several.

        Args:
          sizes: `[n, 2]` (width, height) of pictures, pixels.
          of_group: `[n]` the group of each.
          groups: how many there are; one without pictures is in the bucket that most of the others are in.
        """
        if self.tiled_alone:
            return (np.bincount(of_group, minlength=groups) > 1).astype(np.int64)
        shown = np.zeros((groups, len(self.buckets)), np.int64)
        for number, bucket in enumerate(self.buckets):
            pixels = bucket.extents(sizes).astype(np.int64).prod(axis=1)
            np.add.at(shown[:, number], of_group, pixels)
        area = np.array([math.prod(bucket.canvas) for bucket in self.buckets])
        chosen = np.where(shown == shown.max(axis=1, keepdims=True), area, np.iinfo(np.int64).max).argmin(axis=1)
        shows = shown.any(axis=1)
        most = np.bincount(chosen[shows], minlength=len(area)).argmax() if shows.any() else 0
        return np.where(shows, chosen, most)

    @property
    def view_grid(self) -> tuple[int, int]:
        """Rows and columns of a view's features."""
        return self.canvas[0] // self.cell, self.canvas[1] // self.cell

    @property
    def valid_scales(self) -> list[int]:
        """The scales that a view's grid can have, ascending; those that were trained are among them."""
        side, valid = self.size // self.cell, find_reduction(self.reduction).valid
        grids = [(factor, valid(side // factor)) for factor in self.shuffle]
        return sorted({s for factor, scales in grids for s in scales if factor_of(s, side, self.shuffle) == factor})

    @property
    def added(self) -> int:
        """Stacks that the data gives, S."""
        most = max((c * r for c, r in self.tilings), default=0)
        count = {"samples": most, "copies": most, "whole": 1, "whole+samples": 1 + most, "zoom": self.zoom**2}
        return count.get(self.stacks, 0)

    @property
    def direct(self) -> bool:
        """Whether the bank takes the encoder's grids as they stand, so that a pack needs no gather."""
        return not self.added and self.sequence in ("whole", "flat", "grid", "unpad", "tiles")

    @property
    def _seen(self):
        """The tilings in which pictures are seen."""
        if self.sequence == "tiles":
            return tuple(() if tiling == (1, 1) else tiling for tiling in self.tilings)
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
        if self.aspect == LONGEST:
            _, tiles = sizes_by_longest(sizes, self.size, max(map(max, self.tilings)))
            numbers = {tiling: number for number, tiling in enumerate(self.tilings)}
            return np.array([numbers[tuple(tiling)] for tiling in tiles.tolist()], np.int64)
        if self.choice == "ratio":
            return choose_by_ratio(sizes, self.tilings, self.size)
        return choose_canvas(sizes, [(c * self.size, r * self.size) for c, r in self.tilings])

    def tiling(self, width, height) -> tuple[int, ...]:
        """`(columns, rows)` of a picture's tiles, () if it has none; width and height in pixels."""
        return self._seen[self.choose([(width, height)])[0]]

    def views_of_tiling(self, tiling) -> int:
        """Views of a picture: whole, tiles, and the zoomed tiles of each."""
        return (1 + math.prod(tiling) if tiling else 1) * (1 + self.zoom**2 if self.zoom > 1 else 1)

    def grids_of_tiling(self, tiling) -> int:
        """Grids of a picture."""
        tiles = math.prod(tiling) if tiling else 0
        return {"whole": 1, "blank": 1, "samples": tiles}.get(self.sequence, 1 + tiles)

    def views_in_sequence(self, tiling) -> list[int]:
        """Numbers of a picture's views, in the order in which what is made of them stands in the sequence."""
        if self.sequence == "tiles":
            return [part for part in self._block(tiling) if not isinstance(part, str)]
        return list(range(self.views_of_tiling(tiling)))

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
            case _:  # flat, grid, unpad, tiles: every view but the zoomed ones, as the encoder gives it
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
        side = self.size // self.cell
        k = factor_of(scale, side, self.shuffle)
        return find_reduction(self.reduction).shape(rows // k, columns // k, side // k, scale)

    def extents(self, sizes) -> np.ndarray:
        """`[n, 2]` int32 (height, width) in pixels of each picture on its canvas; of aspects of `ON_CANVAS` alone.

        (0, 0) for a picture that has no place on it, see `refusal`.
        """
        height, width = self.canvas
        if self.aspect == "native":
            found = [self._native_size(*size) for size in np.asarray(sizes).tolist()]
            found = [(h, w) if h <= height and w <= width else (0, 0) for w, h in found]
        else:
            found = [size_on_canvas(w, h, self.size, width, height)[::-1] for w, h in np.asarray(sizes).tolist()]
        return np.array(found, np.int32).reshape(-1, 2)

    def _native_size(self, width, height):
        return native_size(width, height, self.step, *self.pixels)

    @property
    def step(self) -> int:
        """Pixels of which the sides of a canvas are multiples: the finest grid has whole tokens then."""
        return self.cell * max(self.shuffle)

    def refusal(self, size) -> str:
        """Why a picture of `(width, height)` pixels has no place on a canvas at whatever scale; "" if it has one."""
        if self.aspect != "native" or self.extents([size]).any():
            return ""
        width, height = self._native_size(*size)
        if not width:
            return (
                f"a picture of {size[0]} x {size[1]} pixels is more than {LONGEST_NATIVE} times as long as wide; "
                "leave it out"
            )
        canvas = "{1} x {0}".format(*self.canvas)
        return (
            f"a picture of {size[0]} x {size[1]} pixels, {width} x {height} by data.max_pixels={self.pixels[1]}, "
            f"does not fit a canvas of {canvas}; leave it out, or set data.canvas (height, width) or data.max_pixels"
        )

    @property
    def no_token(self) -> str:
        """Why pictures are left out that have no visual token at some scale, for a list of reasons."""
        if self.aspect != "native":
            return "a picture is too thin to have a visual token"
        canvas, most = "{1} x {0}".format(*self.canvas), self.pixels[1]
        return (
            f"a picture by data.max_pixels={most} does not fit a canvas of {canvas} (data.canvas), or is too thin to "
            "have a visual token"
        )

    def holding(self, sizes) -> "VisualLayout":
        """This layout with a canvas that holds pictures of these sizes, if `canvas_each`.

        For those who lay out a few pictures and need not compile a program for each canvas.
        """
        if not self.canvas_each:
            return self
        found = np.array([(self.step, self.step), *(self._native_size(*size) for size in sizes)])
        width, height = found.max(axis=0).tolist()
        return dataclasses.replace(self, canvas=(height, width), canvases=())

    def shown(self, size, scale) -> tuple[int, int]:
        """Rows and columns of the tokens that stand in the sequence for a picture of one grid."""
        if not self.on_canvas:
            return self.token_grid(scale)
        return tuple(int(n) for n in self._tokens_over(*self.extents([size])[0] // self.cell, scale))

    def with_marks(self, tokenizer) -> "VisualLayout":
        """This layout with the ids of all text that stands inside the block of a picture."""
        if not self.marks:
            return self
        found = {}
        for tiling in self._seen:
            for text in filter(lambda part: isinstance(part, str), self._block(tiling)):
                items = tokenizer.markup(text)
                ids = [tokenizer.encode(x, prefix=False) if isinstance(x, str) else [x] for x in items]
                found[text] = tuple(i for part in ids for i in part)
        return dataclasses.replace(self, mark_ids=found)

    def _block(self, tiling) -> list[str | int]:
        """What stands in the sequence for a picture, in order: numbers of its grids, and text between them."""
        marks = MARKS[self.marks] if self.marks else Marks()
        if not tiling or self.sequence != "tiles":
            parts = [marks.alone[0], *range(self.grids_of_tiling(tiling)), marks.alone[1]]
        else:
            columns, rows = tiling
            parts = []
            for row in range(rows):
                for column in range(columns):
                    mark = marks.tile.format(row=row + 1, column=column + 1)
                    parts += [mark, 1 + row * columns + column]
                parts.append(marks.row_end)
            parts += [marks.whole[0], 0, marks.whole[1]]
        texts = itertools.groupby(parts, key=lambda part: isinstance(part, str))
        joined = [["".join(group)] if is_text else list(group) for is_text, group in texts]
        return [part for group in joined for part in group if part != ""]

    def slots(self, tiling, scale, size) -> np.ndarray:
        """What stands in the sequence for a picture: `[n]` int, grid · `grid_tokens` + token, `NEWLINE`, or text.

        Text is `segments.TEXT` less an id: what `marks` says inside a picture's block.

        Args:
          tiling: `(columns, rows)` of its tiles, or ().
          scale: tokens of a square view.
          size: `(width, height)` of the picture, pixels.
        """
        cells = self._cells_of_grids(tiling, scale, size)
        if not len(cells):
            return cells
        if self.sequence == "tiles":
            by_grid = np.split(cells, self.grids_of_tiling(tiling))
            block = [self._text(part) if isinstance(part, str) else by_grid[part] for part in self._block(tiling)]
            return np.concatenate(block)
        if self.marks:
            before, after = map(self._text, MARKS[self.marks].alone)
            return np.concatenate([before, cells, after])
        return cells

    def blends(self, tiling, scale, size) -> tuple[np.ndarray, np.ndarray]:
        """What a picture's tokens are made of in layouts that `shrink`: four of its slots each, and their shares.

        What is not shrunk is all of its first one. Of a shrunk mosaic each token lies between two rows and two
        columns of it and takes of each the more the nearer it is, as torch's `interpolate` does it ("bilinear").

        Args:
          tiling, scale, size: as of `slots`.

        Returns:
          `[n, 4]` int as of `slots`, of which the first ones are what that returns, and `[n, 4]` float32.
        """
        first = self.slots(tiling, scale, size)
        slots, shares = np.repeat(first[:, None], 4, axis=1), np.tile(np.float32([1, 0, 0, 0]), (len(first), 1))
        if tiling and len(first):
            canvas = self._unpadded(tiling, scale, size)
            (y, below, down), (x, beside, across) = self._shrunk(canvas.shape, scale)
            down, across = np.stack([1 - down, down]), np.stack([1 - across, across])
            found = [canvas[np.ix_(rows, columns)] for rows in (y, below) for columns in (x, beside)]
            of_mosaic = first >= self.grid_tokens(scale)  # neither of the whole picture, nor newlines, nor text
            slots[of_mosaic] = np.stack(found, axis=-1).reshape(-1, 4)
            shares[of_mosaic] = np.einsum("iy,jx->yxij", down, across).reshape(-1, 4)
        return slots, shares

    def _shrunk(self, shape, scale):
        """Of a mosaic of `(rows, columns)` tokens, how the rows and the columns of what it is shrunk to are made.

        The fractions are computed in float32, as torch does. A row or a column is left of any; torch refuses to
        shrink to none.

        Returns:
          for each of both the numbers of two lines `[n]` that each of theirs lies between, and `[n]` float32, the
          share of the second.
        """
        ratio = math.sqrt(math.prod(shape) / (self.shrink * self.grid_tokens(scale))) if self.shrink else 0
        lengths, out = shape, []
        if ratio > LEAST_SHRINK:
            lengths = [max(int(length // ratio), 1) for length in shape]
        for length, left in zip(shape, lengths, strict=True):
            step = np.float32(length) / np.float32(max(left, 1))  # of padding alone there is nothing
            at = np.maximum(step * (np.arange(left, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
            first = at.astype(np.int64)
            out.append((first, np.minimum(first + 1, length - 1), at - first.astype(np.float32)))
        return out

    def _unpadded(self, tiling, scale, size):
        """The mosaic `[rows, columns]` of a picture's tiles without its padding, as `_cells_of_grids` counts."""
        canvas = mosaic(*tiling, self.token_grid(scale), 1)
        return canvas[unpad(*canvas.shape, *size, self.shrink > 0)] if self.sequence == "unpad" else canvas

    def _text(self, text):
        """What stands for text among the slots of a picture."""
        if self.mark_ids is None:
            raise ValueError(f"data.marks='{self.marks}': the ids of its text are not known, see `with_marks`")
        return TEXT - np.array(self.mark_ids[text] if text else (), np.int64)

    def _cells_of_grids(self, tiling, scale, size):
        """`slots` of a picture's grids alone, without text and in the order of the bank."""
        rows, columns = self.token_grid(scale)
        if self.on_canvas:
            shown = self.shown(size, scale)
            return np.add.outer(np.arange(shown[0]) * columns, np.arange(shown[1])).reshape(-1)
        if self.sequence not in ("grid", "unpad"):
            return np.arange(self.grids_of_tiling(tiling) * rows * columns)
        if tiling:
            canvas = self._unpadded(tiling, scale, size)
            if self.shrink:
                (y, *_), (x, *_) = self._shrunk(canvas.shape, scale)
                canvas = canvas[np.ix_(y, x)]
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
        if self.on_canvas:
            a, b = self._tokens_over(*(self.extents(sizes) // self.cell).T, scale)
        elif self.sequence == "unpad" and tiling:
            rows, columns = self.token_grid(scale)
            a, b = margins(tiling[1] * rows, tiling[0] * columns, *sizes.T, self.shrink > 0)
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
