"""The static shape of a pack, and how conversations and pictures are laid out in it."""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import encode, truncate
from lmm_jax.data.packing import assign_rows
from lmm_jax.data.segments import DoesNotFit, Segment, lay_out, pack
from lmm_jax.data.stream import Capacity
from lmm_jax.data.views import resize_on_canvas, views
from lmm_jax.data.visual_layout import VisualLayout


@dataclasses.dataclass(frozen=True)
class Placed:
    """A picture in its pack: its views and grids lie one after the other.

    Attributes:
      size: `(width, height)`, pixels.
      tiling: `(columns, rows)` of its tiles, or ().
      view, grid: numbers in the pack of its first view and its first grid.
    """

    size: tuple[int, int]
    tiling: tuple[int, ...]
    view: int
    grid: int


@dataclasses.dataclass(frozen=True)
class PackLayout:
    """The static shape of a pack, and how a conversation is laid out in it.

    Attributes:
      visual: of each picture.
      scales: scales of the bank.
      views: views of a pack.
      rows, length, targets: rows, positions of a row, supervised positions of a pack.
      template: see `conversation.encode`.
      too_long: see `conversation.truncate`.
    """

    visual: VisualLayout
    scales: tuple[int, ...]
    views: int
    rows: int
    length: int
    targets: int
    template: str
    too_long: str

    @classmethod
    def from_config(cls, config, visual, capacity=None):
        """The layout that `config.model` and `config.data` describe.

        Args:
          config: of the run.
          visual: its `VisualLayout`, see `config.visual_layout`.
          capacity: what a pack holds, if that is known already.
        """
        data = config.data
        capacity = capacity or Capacity(data.rows or 1, data.length, data.views or visual.fewest_views, 0)
        return cls(
            visual=visual,
            scales=tuple(config.model.scales),
            views=capacity.views,
            rows=capacity.rows,
            length=capacity.length,
            targets=capacity.targets,
            template=data.template,
            too_long=data.too_long,
        )

    @property
    def grids(self) -> int:
        """Units of a pack, U: the most that its views can hold."""
        return self.visual.most_grids(self.views)

    @property
    def newline(self) -> int:
        """The newline's slot, behind those of all grids at all scales."""
        return self.grids * sum(map(self.visual.grid_tokens, self.scales))

    def place(self, sizes, view=0, grid=0) -> list[Placed]:
        """Places pictures one after the other.

        Args:
          sizes: `(width, height)` of each, pixels.
          view, grid: numbers of the first view and the first grid.
        """
        placed = []
        for size in sizes:
            placed.append(Placed(tuple(size), self.visual.tiling(*size), view, grid))
            view += self.visual.views(placed[-1].tiling)
            grid += self.visual.grids(placed[-1].tiling)
        return placed

    def segments(self, turns, sizes, tokenizer, scales) -> list[Segment]:
        """Copies of one conversation, one for each of `scales`.

        Args:
          turns: `(role, text)` pairs.
          sizes: `(width, height)` of the pictures that come with them, pixels.
          tokenizer: a `Tokenizer`.
          scales: some of the layout's scales; bit i of a loss group is the layout's scale number i.

        Raises:
          ValueError: bad turns, tags that do not match the pictures, or a picture too thin to have a visual token.
        """
        return self._copies(self._encode(turns, sizes, tokenizer), self.place(sizes), scales)

    def training_segments(self, turns, sizes, tokenizer, scales, grid=0) -> list[Segment]:
        """As `segments`, of a sample to train on: it ends with an answer and fits into a row at every scale.

        Args:
          grid: number in the pack of the first grid of the sample's first picture.

        Raises:
          ValueError: as `segments`, or too long, or nothing is supervised.
        """
        encoded = self._encode(turns, sizes, tokenizer)
        longest = self.visual.tokens(sizes, max(self.scales))  # not of `scales`: it must not depend on the step
        kept = truncate(encoded, longest, self.length, self.too_long)
        return self._copies(kept, self.place(sizes[: kept.images], grid=grid), scales)

    def _encode(self, turns, sizes, tokenizer):
        encoded = encode(turns, tokenizer, self.template)
        if encoded.images != len(sizes):
            raise ValueError(f"{encoded.images} <image> tags in the text, {len(sizes)} pictures")
        return encoded

    def _copies(self, encoded, placed, scales):
        bits = [1 << self.scales.index(scale) for scale in scales]
        if not placed:  # the same at every scale: one copy, in the groups of all of them
            return [lay_out(encoded.ids, encoded.supervised, [], sum(bits))]
        return [
            lay_out(encoded.ids, encoded.supervised, [self.slots(picture, scale) for picture in placed], bit)
            for scale, bit in zip(scales, bits, strict=True)
        ]

    def slots(self, picture, scale) -> np.ndarray:
        """Bank slots `[n]` of what stands in the sequence for a `Placed` picture at one scale.

        Raises:
          ValueError: the picture is too thin to have a visual token.
        """
        cells = self.visual.slots(picture.tiling, scale, picture.size)
        if not len(cells):
            canvas = "{1} x {0}".format(*self.visual.canvas)
            raise ValueError(
                f"a picture of {picture.size[0]} x {picture.size[1]} pixels, fitted into a canvas of {canvas}, is "
                f"too thin to have a visual token at scale {scale}; leave it out, or choose another data.canvas"
            )
        tokens = [self.visual.grid_tokens(s) for s in self.scales]
        return bank_slots(cells, picture.grid, self.scales.index(scale), tokens, self.grids)

    def see(self, picture) -> np.ndarray:
        """Views `[n, H, W, 3]` uint8 of an opened RGB picture."""
        a = self.visual
        if a.aspect == "own":
            return resize_on_canvas(picture, a.size, *a.canvas[::-1])[None]
        return views(picture, a.size, a.aspect, a.tiling(*picture.size), a.zoom, a.padding)

    def assemble(self, segments, pictures, where=None):
        """One pack.

        Args:
          segments: `Segment`s.
          pictures: for each picture of the pack its `(width, height)`, and what `see` returned or None, which leaves
            its views blank.
          where: row of each segment; if None, each goes where it leaves the least room.

        Returns:
          The arrays of `segments.pack`, pixels `[V, H, W, 3]` uint8, and where the layout needs them gather
          `[1 + S, U, g, g]` int32, index into the pack's features or -1, and extent `[V, 2]` int32, (height, width)
          in pixels of what a canvas shows.

        Raises:
          DoesNotFit: too many views, positions or targets for a pack.
        """
        a, placed = self.visual, self.place([size for size, _ in pictures])
        needed = sum(a.views(p.tiling) for p in placed)
        if needed > self.views:
            raise DoesNotFit(f"{needed} views of {len(pictures)} pictures, room for {self.views}; raise data.views")
        if where is None:
            where = assign_rows([len(segment) for segment in segments], self.rows, self.length)
        out = pack(segments, where, self.rows, self.length, self.targets)
        out["pixels"] = np.zeros((self.views, *a.canvas, 3), np.uint8)
        if not a.direct:
            out["gather"] = np.full((1 + a.added, self.grids, *a.view_grid), -1, np.int32)
        if a.aspect == "own":
            out["extent"] = np.zeros((self.views, 2), np.int32)
        for p, (_, pixels) in zip(placed, pictures, strict=True):
            if pixels is None:
                continue
            out["pixels"][p.view : p.view + len(pixels)] = pixels
            if "gather" in out:
                cells = a.gather(p.tiling)
                cells = np.where(cells < 0, -1, cells + p.view * a.view_grid[0] * a.view_grid[1])
                out["gather"][:, p.grid : p.grid + cells.shape[1]] = cells
            if "extent" in out:
                out["extent"][p.view] = a.extents([p.size])[0]
        return out


def bank_slots(cells, first, number, tokens, grids) -> np.ndarray:
    """Slots `[n]` int32 of a picture's visual tokens in the bank that `visual_tokens.bank` builds.

    Args:
      cells: `[n]` int, grid · tokens + token, the picture's grids counted from 0; negative for the newline, whose
        slot is the bank's last.
      first: number of the picture's first grid in its pack.
      number: of the scale among those of the bank.
      tokens: slots of a grid at each scale of the bank, in its order.
      grids: grids of a pack, U.
    """
    slots = grids * sum(tokens[:number]) + first * tokens[number] + cells
    return np.where(cells < 0, grids * sum(tokens), slots).astype(np.int32)
