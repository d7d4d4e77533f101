"""The static shape of a pack, and how conversations and pictures are laid out in it.

A picture brings *views*, which the encoder sees, and *grids* of visual tokens, which stand in the bank: those of a
pack lie one after the other, picture by picture. At each trained scale the bank has some *slots* for each grid. A
pack with room for three grids, at the scales of one and of four tokens, and two pictures, the second of two grids:

    grid              0      1  2                       picture 0: grid 0     picture 1: grids 1 and 2
    slot, scale 1     0      1  2
          scale 4     3…6    7…10  11…14
          newline     15                                one for all pictures, behind all others

A text position has slot -1; a visual token of picture 1 at scale 4 has one of the slots 7 to 14. What features of
which views a grid is made of, `gather` says: see `visual_layout`.
"""

import dataclasses
import math

import numpy as np

from lmm_jax.data.conversation import NO_ANSWER, encode, truncate
from lmm_jax.data.packing import Capacity, assign_rows
from lmm_jax.data.questions import PlacedQuestion, answer_numbers, question_arrays, read_questions
from lmm_jax.data.segments import NO_QUESTION, TEXT, DoesNotFit, Segment, lay_out, pack
from lmm_jax.data.views import make_views, resize_on_canvas
from lmm_jax.data.visual_layout import NEWLINE, VisualLayout


@dataclasses.dataclass(frozen=True)
class PlacedPicture:
    """A picture and its place in a pack; its views follow each other there, and so do its grids.

    Attributes:
      size: `(width, height)`, pixels.
      tiling: `(columns, rows)` of its tiles, or ().
      first_view, first_grid: numbers in the pack of its first view and of its first grid.
    """

    size: tuple[int, int]
    tiling: tuple[int, ...]
    first_view: int
    first_grid: int


@dataclasses.dataclass(frozen=True)
class PackLayout:
    """The static shape of a pack, and how a conversation is laid out in it.

    Attributes:
      visual: how the visual tokens of each picture are laid out.
      scales: scales of the bank.
      views: views that a pack has room for.
      rows, length, targets: rows of a pack, positions of each, supervised positions that a pack has room for.
      template: see `conversation.encode`.
      too_long: see `conversation.truncate`.
      questions: questions that a pack has room for, Q; 0 leaves out what only a router reads.
      question_length: ids of a question that a router reads, I.
      axes: shape of the number of a position, () or (3,), see `segments.positions`.
    """

    visual: VisualLayout
    scales: tuple[int, ...]
    views: int
    rows: int
    length: int
    targets: int
    template: str
    too_long: str
    questions: int = 0
    question_length: int = 0
    axes: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config, visual, capacity=None):
        """The layout that `config.model` and `config.data` describe, without room for the questions of a router.

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
            question_length=config.model.router.tokens,
            axes=(3,) if config.model.decoder.rope_axes else (),
        )

    @property
    def grids(self) -> int:
        """Grids that a pack has room for, U: the most that its views can belong to."""
        return self.visual.most_grids(self.views)

    @property
    def newline(self) -> int:
        """The newline's slot, behind those of all grids at all scales."""
        return self.grids * sum(map(self.visual.grid_tokens, self.scales))

    @property
    def bytes(self) -> int:
        """Bytes of a pack's arrays on the host, see `assemble`."""
        height, width = self.visual.canvas
        rows, columns = self.visual.view_grid
        gather = 0 if self.visual.direct else (1 + self.visual.added) * self.grids * rows * columns
        router = self.questions * (self.question_length + self.grids) + self.targets if self.questions else 0
        of_position = 3 + math.prod(self.axes) + (8 if self.visual.shrink else 0)
        numbers = of_position * self.rows * self.length + 3 * self.targets + gather + router
        return 4 * numbers + 3 * self.views * height * width

    def place(self, sizes, first_grid=0) -> list[PlacedPicture]:
        """Places pictures one after the other.

        Args:
          sizes: `(width, height)` of each, pixels.
          first_grid: number in the pack of the first picture's first grid.
        """
        placed, view, grid = [], 0, first_grid
        for size in sizes:
            tiling = self.visual.tiling(*size)
            placed.append(PlacedPicture(tuple(size), tiling, view, grid))
            view += self.visual.views_of_tiling(tiling)
            grid += self.visual.grids_of_tiling(tiling)
        return placed

    def segments(self, turns, sizes, tokenizer, scales) -> list[Segment]:
        """Copies of one conversation, one for each of `scales`.

        Args:
          turns: `Turn`s, or `(role, text)` pairs.
          sizes: `(width, height)` of the pictures that come with them, pixels.
          tokenizer: a `Tokenizer`.
          scales: some of the layout's scales; bit i of a loss group is the layout's scale number i.

        Raises:
          ValueError: bad turns, tags that do not match the pictures, or a picture too thin to have a visual token.
        """
        return self._copies(self._encode(turns, sizes, tokenizer), self.place(sizes), scales)

    def training_segments(self, turns, sizes, tokenizer, scales, first_grid=0, first_question=0) -> list[Segment]:
        """As `segments`, of a sample to train on: it ends with an answer and fits into a row at every scale.

        Args:
          first_grid: number in the pack of the first grid of the sample's first picture.
          first_question: number in the pack of the sample's first question, see `training_questions`.

        Raises:
          ValueError: as `segments`, or too long, or nothing is supervised.
        """
        encoded = self._encode(turns, sizes, tokenizer)
        longest = self.visual.tokens(sizes, max(self.scales))  # not of `scales`: it must not depend on the step
        kept = truncate(encoded, longest, self.length, self.too_long)
        return self._copies(kept, self.place(sizes[: kept.images], first_grid), scales, first_question)

    def training_questions(self, turns, sizes, tokenizer, first_grid=0) -> list[PlacedQuestion]:
        """The questions of a sample whose answers are trained on, those included that were cut to fit.

        Args:
          turns, sizes, tokenizer, first_grid: as for `training_segments`.
        """
        placed = self.place(sizes, first_grid)
        ends = [first_grid, *(picture.first_grid + self.visual.grids_of_tiling(picture.tiling) for picture in placed)]
        return [
            PlacedQuestion(question.ids, (first_grid, ends[question.pictures]))
            for question in read_questions(turns, tokenizer, self.template, self.question_length)
            if question.trained
        ]

    def _encode(self, turns, sizes, tokenizer):
        encoded = encode(turns, tokenizer, self.template)
        if encoded.images != len(sizes):
            raise ValueError(f"{encoded.images} <image> tags in the text, {len(sizes)} pictures")
        return encoded

    def _copies(self, encoded, placed, scales, first_question=0):
        bits = [1 << self.scales.index(scale) for scale in scales]
        if not placed:  # the same at every scale: one copy, in the groups of all of them
            return [lay_out(encoded.ids, encoded.supervised, [], sum(bits), shapes=[] if self.axes else None)]
        answers = encoded.answers
        question = np.where(answers == NO_ANSWER, NO_QUESTION, first_question + answers)

        def copy(scale, bit):
            slots = [self.slots(picture, scale) for picture in placed]
            shapes = [self.visual.shown(picture.size, scale) for picture in placed] if self.axes else None
            blends = [self.blends(picture, scale) for picture in placed] if self.visual.shrink else None
            return lay_out(encoded.ids, encoded.supervised, slots, bit, question, shapes, blends)

        return [copy(scale, bit) for scale, bit in zip(scales, bits, strict=True)]

    def slots(self, picture, scale) -> np.ndarray:
        """Bank slots `[n]` of what stands in the sequence for a `PlacedPicture` at one scale.

        Raises:
          ValueError: the picture is too thin to have a visual token.
        """
        refused = self.visual.refusal(picture.size)
        if refused:
            raise ValueError(refused)
        cells = self.visual.slots(picture.tiling, scale, picture.size)
        if not len(cells):
            canvas = "{1} x {0}".format(*self.visual.canvas)
            raise ValueError(
                f"a picture of {picture.size[0]} x {picture.size[1]} pixels, fitted into a canvas of {canvas}, is "
                f"too thin to have a visual token at scale {scale}; leave it out, or choose another data.canvas"
            )
        return self._bank_slots(cells, picture, scale)

    def blends(self, picture, scale) -> tuple[np.ndarray, np.ndarray]:
        """Bank slots `[n, 4]` of what stands there in a layout that shrinks, and their shares `[n, 4]` float32."""
        cells, shares = self.visual.blends(picture.tiling, scale, picture.size)
        return self._bank_slots(cells, picture, scale), shares

    def _bank_slots(self, cells, picture, scale):
        tokens = [self.visual.grid_tokens(s) for s in self.scales]
        return bank_slots(cells, picture.first_grid, self.scales.index(scale), tokens, self.grids)

    def see(self, picture) -> np.ndarray:
        """Views `[n, H, W, 3]` uint8 of an opened RGB picture."""
        visual = self.visual
        if visual.on_canvas:
            (h, w), (height, width) = visual.extents([picture.size])[0].tolist(), visual.canvas
            return resize_on_canvas(picture, w, h, width, height)[None]
        tiling = visual.tiling(*picture.size)
        return make_views(picture, visual.size, visual.aspect, tiling, visual.zoom, visual.padding)

    def assemble(self, segments, pictures, row_of=None, questions=()):
        """One pack.

        Args:
          segments: `Segment`s.
          pictures: for each picture of the pack its `(width, height)`, and what `see` returned or None, which leaves
            its views blank.
          row_of: row of each segment; if None, each goes where it leaves the least room.
          questions: the pack's `PlacedQuestion`s, for a layout that has room for them.

        Returns:
          The arrays of `segments.pack`, pixels `[V, H, W, 3]` uint8, and where the layout needs them gather
          `[1 + S, U, g, g]` int32, index into the pack's features or -1, and extent `[V, 2]` int32, (height, width)
          in pixels of what a canvas shows. With room for questions, what `questions` draws.

        Raises:
          DoesNotFit: too many views, positions or targets for a pack.
        """
        placed = self.place([size for size, _ in pictures])
        needed = sum(self.visual.views_of_tiling(picture.tiling) for picture in placed)
        if needed > self.views:
            raise DoesNotFit(f"{needed} views of {len(pictures)} pictures, room for {self.views}; raise data.views")
        if row_of is None:
            row_of = assign_rows([len(segment) for segment in segments], self.rows, self.length)
        blended = self.visual.shrink > 0
        out = pack(segments, row_of, self.rows, self.length, self.targets, self.axes, blended)
        out |= self._without_pictures()
        for picture, (_, pixels) in zip(placed, pictures, strict=True):
            if pixels is not None:
                self._show(picture, pixels, out)
        if self.questions:
            out |= question_arrays(questions, self.questions, self.question_length, self.grids)
            out["answer"] = answer_numbers(out, segments, self.questions)
        return out

    def _without_pictures(self):
        """The arrays of a pack that its pictures fill."""
        visual = self.visual
        out = {"pixels": np.zeros((self.views, *visual.canvas, 3), np.uint8)}
        if not visual.direct:
            out["gather"] = np.full((1 + visual.added, self.grids, *visual.view_grid), -1, np.int32)
        if visual.on_canvas:
            out["extent"] = np.zeros((self.views, 2), np.int32)
        return out

    def _show(self, picture, pixels, out):
        """Writes the views of a `PlacedPicture` and what belongs to them into the arrays of a pack."""
        view, grid = picture.first_view, picture.first_grid
        out["pixels"][view : view + len(pixels)] = pixels
        if "gather" in out:
            cells = self.visual.gather(picture.tiling)  # of the picture's own views, [1 + S, grids, g, g]
            rows, columns = self.visual.view_grid
            out["gather"][:, grid : grid + cells.shape[1]] = np.where(cells < 0, -1, cells + view * rows * columns)
        if "extent" in out:
            out["extent"][view] = self.visual.extents([picture.size])[0]


def bank_slots(cells, first_grid, scale_number, tokens, grids) -> np.ndarray:
    """Slots `[n]` int32 of a picture's visual tokens in the bank that `visual_tokens.bank` builds.

    The bank has all grids at its first scale, then all at its second, and so on; the newline is its last. See the
    drawing of this module.

    Args:
      cells: `[n]` int, grid · tokens + token, the picture's grids counted from 0; `NEWLINE`, or text as it is.
      first_grid: number of the picture's first grid in its pack.
      scale_number: of the picture's scale among those of the bank, from 0.
      tokens: slots of a grid at each scale of the bank, in its order.
      grids: grids that a pack has room for, U.
    """
    before = grids * sum(tokens[:scale_number])
    newline = grids * sum(tokens)
    slots = np.where(cells == NEWLINE, newline, before + first_grid * tokens[scale_number] + cells)
    return np.where(cells <= TEXT, cells, slots).astype(np.int32)
