"""The static shape of a pack, and how conversations and pictures are laid out in it."""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import encode, truncate
from lmm_jax.data.packing import DoesNotFit, assign_rows, pack
from lmm_jax.data.plan import Segment, lay_out, scale_slots, tile_source
from lmm_jax.data.stream import Capacity
from lmm_jax.data.views import views


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shape of a pack, and how a conversation is laid out in it.

    Attributes:
      image_size, grid: sides of a view in pixels and in features.
      scales: scales of the bank.
      pictures: pictures of a pack.
      rows, length, targets: rows, positions of a row, supervised positions of a pack.
      aspect, tiling: see `views.views`.
      template: see `conversation.encode`.
      too_long: see `conversation.truncate`.
    """

    image_size: int
    grid: int
    scales: tuple[int, ...]
    pictures: int
    rows: int
    length: int
    targets: int
    aspect: str
    tiling: tuple[int, ...]
    template: str
    too_long: str

    @classmethod
    def from_config(cls, config, capacity=None):
        """The layout that `config.model` and `config.data` describe; `capacity` is that of a pack, if known."""
        data, vision = config.data, config.model.vision
        capacity = capacity or Capacity(data.rows or 1, data.length, data.pictures or 1, 0)
        return cls(
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            scales=tuple(config.model.scales),
            pictures=capacity.pictures,
            rows=capacity.rows,
            length=capacity.length,
            targets=capacity.targets,
            aspect=data.aspect,
            tiling=tuple(data.tiling),
            template=data.template,
            too_long=data.too_long,
        )

    @property
    def views(self) -> int:
        """Views of a picture."""
        return 1 + int(np.prod(self.tiling)) if self.tiling else 1

    def segments(self, turns, pictures, tokenizer, scales) -> list[Segment]:
        """Copies of one conversation, one for each of `scales`.

        Args:
          turns: `(role, text)` pairs.
          pictures: how many pictures come with them.
          tokenizer: a `Tokenizer`.
          scales: some of the layout's scales; bit i of a loss group is the layout's scale number i.

        Raises:
          ValueError: bad turns, or tags that do not match the pictures.
        """
        return self._copies(self._encode(turns, pictures, tokenizer), scales)

    def training_segments(self, turns, pictures, tokenizer, scales, first=0) -> list[Segment]:
        """As `segments`, of a sample to train on: it ends with an answer and fits into a row at every scale.

        Args:
          first: number in the pack of the sample's first picture.

        Raises:
          ValueError: as `segments`, or too long, or nothing is supervised.
        """
        encoded = self._encode(turns, pictures, tokenizer)
        longest = max(self.scales)  # not of `scales`: the cut must not depend on the step
        return self._copies(truncate(encoded, [longest] * pictures, self.length, self.too_long), scales, first)

    def _encode(self, turns, pictures, tokenizer):
        encoded = encode(turns, tokenizer, self.template)
        if encoded.images != pictures:
            raise ValueError(f"{encoded.images} <image> tags in the text, {pictures} pictures")
        return encoded

    def _copies(self, encoded, scales, first=0):
        bits = [1 << self.scales.index(scale) for scale in scales]
        if not encoded.images:  # the same at every scale: one copy, in the groups of all of them
            return [lay_out(encoded.ids, encoded.supervised, [], sum(bits))]
        shown = range(first, first + encoded.images)
        slots = {scale: [scale_slots(i, scale, self.scales, self.pictures) for i in shown] for scale in scales}
        return [
            lay_out(encoded.ids, encoded.supervised, slots[scale], bit)
            for scale, bit in zip(scales, bits, strict=True)
        ]

    def see(self, picture) -> np.ndarray:
        """Views `[n, image_size, image_size, 3]` uint8 of an opened RGB picture."""
        return views(picture, self.image_size, self.aspect, self.tiling)

    def assemble(self, segments, seen, where=None):
        """One pack.

        Args:
          segments: `Segment`s.
          seen: what `see` returned for each picture of the pack, None for one that is not shown.
          where: row of each segment; if None, each goes where it leaves the least room.

        Returns:
          The arrays of `packing.pack`, pixels `[V, H, W, 3]` uint8, and source `[1 + S, U, g, g]` when tiled.

        Raises:
          DoesNotFit: too many pictures, positions or targets for a pack.
        """
        if len(seen) > self.pictures:
            raise DoesNotFit(f"{len(seen)} pictures, room for {self.pictures}; raise data.pictures")
        if where is None:
            where = assign_rows([len(segment) for segment in segments], self.rows, self.length)
        out = pack(segments, where, self.rows, self.length, self.targets)
        out["pixels"] = np.zeros((self.pictures * self.views, self.image_size, self.image_size, 3), np.uint8)
        for i, pixels in enumerate(seen):
            if pixels is not None:
                out["pixels"][i * self.views : (i + 1) * self.views] = pixels
        if self.tiling:
            out["source"] = tile_source(self.grid, self.tiling, self.pictures)
        return out
