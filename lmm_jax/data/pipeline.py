"""The stream: what stands at global position p is a pure function of (seed, data, p), on any number of hosts."""

import dataclasses

import grain
import numpy as np

from lmm_jax.data.conversation import encode, truncate
from lmm_jax.data.packing import DoesNotFit, pack
from lmm_jax.data.plan import Segment, lay_out, scale_slots, scales_at, tile_source
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns
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
    def from_config(cls, config):
        """The layout that `config.model` and `config.data` describe."""
        data, vision = config.data, config.model.vision
        return cls(
            image_size=vision.image_size,
            grid=vision.image_size // vision.patch_size,
            scales=tuple(config.model.scales),
            pictures=data.pictures,
            rows=data.rows,
            length=data.length,
            targets=data.targets or data.rows * data.length,
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

    def training_segments(self, turns, pictures, tokenizer, scales) -> list[Segment]:
        """As `segments`, of a sample to train on: one of the layout's length, at every scale the same turns.

        Raises:
          ValueError: as `segments`, or too long, or nothing is supervised.
        """
        encoded = self._encode(turns, pictures, tokenizer)
        longest = max(self.scales)  # not of `scales`: the cut must not depend on the step
        return self._copies(truncate(encoded, [longest] * pictures, self.length, self.too_long), scales)

    def _encode(self, turns, pictures, tokenizer):
        encoded = encode(turns, tokenizer, self.template)
        if encoded.images != pictures:
            raise ValueError(f"{encoded.images} <image> tags in the text, {pictures} pictures")
        return encoded

    def _copies(self, encoded, scales):
        bits = [1 << self.scales.index(scale) for scale in scales]
        if not encoded.images:  # the same at every scale: one copy, in the groups of all of them
            return [lay_out(encoded.ids, encoded.supervised, [], sum(bits))]
        return [
            lay_out(
                encoded.ids,
                encoded.supervised,
                [scale_slots(i, scale, self.scales, self.pictures) for i in range(encoded.images)],
                bit,
            )
            for scale, bit in zip(scales, bits, strict=True)
        ]

    def assemble(self, segments, pictures):
        """One pack of segments and opened RGB pictures.

        Returns:
          The arrays of `packing.pack`, pixels `[V, H, W, 3]` uint8, and source `[1 + S, U, g, g]` when tiled.

        Raises:
          DoesNotFit: too many pictures, positions or targets for a pack.
        """
        if len(pictures) > self.pictures:
            raise DoesNotFit(f"{len(pictures)} pictures, room for {self.pictures}; raise data.pictures")
        out = pack(segments, self.rows, self.length, self.targets)
        out["pixels"] = np.zeros((self.pictures * self.views, self.image_size, self.image_size, 3), np.uint8)
        for i, picture in enumerate(pictures):
            seen = views(picture, self.image_size, self.aspect, self.tiling)
            out["pixels"][i * self.views : (i + 1) * self.views] = seen
        if self.tiling:
            out["source"] = tile_source(self.grid, self.tiling, self.pictures)
        return out


class Packs:
    """Random access to the packs of an endless stream over one split of a prepared folder."""

    def __init__(self, config, split, packs_per_step, shuffle):
        """`packs_per_step`: packs of a global batch, micro-batches included."""
        self.data = Prepared(config.data.path, split)
        self.layout = Layout.from_config(config)
        self.per_step = packs_per_step
        self.scales_per_step = config.train.scales_per_step or len(self.layout.scales)
        order = grain.MapDataset.range(len(self.data)).seed(config.seed)
        self._order = (order.shuffle() if shuffle else order).repeat()

    def __getitem__(self, position):
        """The pack at global `position`; `record_index` names its row.

        Raises:
          ValueError: naming the record that cannot be laid out.
        """
        row = int(self._order[position])
        record = self.data[row]
        scales = scales_at(position // self.per_step, self.layout.scales, self.scales_per_step)
        try:
            pictures = as_pictures(record)
            segments = self.layout.training_segments(as_turns(record), len(pictures), self.data.tokenizer, scales)
            out = self.layout.assemble(segments, pictures)
        except ValueError as error:
            where = f"{self.data.folder} ({self.data.split}), row {row}, id {record['id'].decode()}"
            raise ValueError(f"{where}: {error}") from error
        out["record_index"] = np.int64(row)
        return out


def batches(packs, local, start, stop, threads, workers):
    """Iterates this host's part of the global batches `start` … `stop` - 1.

    Args:
      packs: `Packs`.
      local: numbers `[n]` of this host's packs within a global batch, as `sharding.local_packs` gives them.
      start: first step; resuming needs no other state.
      stop: step to end before.
      threads: reader threads.
      workers: reader processes, 0 reads in this process.

    Yields:
      dicts of numpy arrays `[n, …]`.
    """

    def load(i):
        step, k = divmod(int(i), len(local))
        return packs[step * packs.per_step + int(local[k])]

    # A range, not a slice, so that a resumed stream reads nothing of what came before.
    stream = grain.MapDataset.range(start * len(local), stop * len(local)).map(load).batch(len(local))
    stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
