"""What the encoder saw of pictures, kept so that each is encoded once, whatever is asked of it at any budget."""

import collections
import dataclasses
import functools
import hashlib

import numpy as np
from etils import epath
from PIL import Image

from lmm_jax import sharding
from lmm_jax.data.images import open_picture
from lmm_jax.reduction import factor_of, find_reduction

KEPT = 2**30  # bytes of this host's memory that what was seen may take
SHORTEST_READ = 64  # positions


def bucket(n, shortest=SHORTEST_READ) -> int:
    """`n` positions rounded up: to a power of two, or one and a half times that, and to `shortest`."""
    power = max(shortest, 1 << (n - 1).bit_length())
    return power * 3 // 4 if power > shortest and n <= power * 3 // 4 else power


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a request, not decoded yet.

    Attributes:
      source: a path, the bytes of a file, or a `PIL.Image`.
      size: `(width, height)`, pixels.
      of: name of the prompt that it belongs to, for messages.
      bucket: number of its canvas among `VisualLayout.buckets`.
    """

    source: object
    size: tuple[int, int]
    of: str
    bucket: int = 0

    @functools.cached_property
    def digest(self) -> bytes:
        """Of files by their bytes, of images by their pixels: what is equal is the same picture."""
        if isinstance(self.source, Image.Image):
            content = self.open().tobytes()
        else:
            content = self.source if isinstance(self.source, bytes) else epath.Path(self.source).read_bytes()
        return hashlib.blake2b(content, digest_size=16, person=repr(self.size).encode()[:16]).digest()

    def open(self) -> Image.Image:
        """Decodes it; ValueError says of which prompt it is if it cannot be read, or has another size by now."""
        try:
            opened = open_picture(self.source)
        except ValueError as error:
            raise ValueError(f"images of {self.of}: {error}") from error
        if opened.size != self.size:
            raise ValueError(f"images of {self.of}: {self.source} was {self.size} pixels and is {opened.size} now")
        return opened


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is kept of a picture.

    Attributes:
      grids: of each path of the projector `[1 + S, U, h, w, D]`, as it gave them: the bank's, then each stack's; of a
        picture with a canvas of its own what shows it.
      importance: `[U, h, w]` float32 of the bank's cells, where the model's reduction needs it; else None.
      pooled: `[V, C]` of its views, which a `DensityRouter` reads; None without one.
    """

    grids: tuple[np.ndarray, ...]
    importance: np.ndarray | None
    pooled: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory."""
        return sum(x.nbytes for x in (*self.grids, self.importance, self.pooled) if x is not None)


class Pictures:
    """Visual vectors of pictures at any number of tokens, from grids that are computed once each.

    The grids lie in the host's memory, where there is room, as encoder and projector gave them. Reducing them to the
    tokens of a budget is cheap and is done there. What was not used for longest goes when they take more than `KEPT`.

    Attributes:
      encoded: pictures that were encoded so far.
    """

    def __init__(self, program, programs, params, layout):
        """For the `Program` of a model, its `Programs` and parameters, and its `PackLayout`."""
        self._program, self._programs = program, programs
        one = dataclasses.replace(layout, rows=1, length=1, targets=0)
        self._layouts = [dataclasses.replace(one, visual=bucket) for bucket in layout.visual.buckets]
        self._kept, self._bytes = collections.OrderedDict(), 0
        self._numbers = {}
        self._dtype = np.dtype(program.model.decoder.dtype)
        self._newline = self._newlines(params)
        self.encoded = 0

    def _newlines(self, params):
        """What stands at a newline, and what each stack adds there: `[1 + S, 1, D]`."""
        model = self._program.model
        shape = (1 + self._programs.stacks, 1, model.decoder.width)
        vectors = np.zeros(shape, self._dtype)
        if model.newline:
            vectors[: None if model.newline_in_stacks else 1] = np.asarray(params["image_newline"]).astype(
                self._dtype
            )
        return vectors

    def number(self, picture) -> int:
        """A number that equal pictures on equal canvases share."""
        return self._numbers.setdefault((picture.digest, picture.bucket), len(self._numbers))

    def see(self, pictures):
        """Encodes those of the `Picture`s whose grids are not kept; ValueError for one that cannot be read."""
        missing = {}
        for picture in pictures:
            if self.number(picture) in self._kept:
                self._kept.move_to_end(self.number(picture))
            else:
                missing[self.number(picture)] = picture
        alike = collections.defaultdict(list)
        for number, picture in missing.items():
            layout = _on_few_canvases(self._layouts[picture.bucket], picture.size)
            views = layout.see(picture.open())
            alike[picture.bucket, layout.visual.canvas, len(views)].append((number, picture.size, views))
        with self._program.use():
            ways = sharding.ways("batch")
        for (bucket, canvas, views), members in alike.items():
            layout = _on_canvas(dataclasses.replace(self._layouts[bucket], views=views), canvas)
            # As many at once as there are devices that share out packs: more would only be more programs.
            count = ways if len(members) > 1 else 1
            for first in range(0, len(members), count):
                self._encode(layout, members[first : first + count], count)

    def grids(self, pictures):
        """Grids `[U, h, w, D]` of the bank of some pictures, one behind the other, by the projector's first path."""
        self.see(pictures)
        return np.concatenate([self._seen(picture).grids[0][0] for picture in pictures])

    def pooled(self, pictures):
        """`[V, C]` of the views of some pictures, which a `DensityRouter` reads."""
        self.see(pictures)
        return np.concatenate([self._seen(picture).pooled for picture in pictures])

    def _seen(self, picture):
        """What was seen of a picture; it is encoded again if that had to go."""
        if self.number(picture) not in self._kept:
            self.see([picture])
        return self._kept[self.number(picture)]

    def _encode(self, layout, members, count):
        packs = [layout.assemble([], [(size, pixels)]) for _, size, pixels in members]
        packs += packs[-1:] * (count - len(packs))
        arrays = [
            np.stack([pack[n] for pack in packs]) if n in packs[0] else None for n in ("pixels", "gather", "extent")
        ]
        paths, importance, pooled = self._programs.see(*arrays)
        paths = [np.asarray(grids) for grids in paths]  # [1 + S, G, U, h, w, D] each
        importance = None if importance is None else np.asarray(importance)  # [G, U, h, w]
        pooled = None if pooled is None else np.asarray(pooled)  # [G, V, C]
        for n, (number, size, _) in enumerate(members):
            used = layout.visual.grids_of_tiling(layout.visual.tiling(*size))
            weights = None if importance is None else np.array(importance[n, :used])
            of_views = None if pooled is None else np.array(pooled[n])
            shown = [np.array(grids[:, n, :used][self._shown(layout.visual, size, grids)]) for grids in paths]
            self._keep(number, Seen(tuple(shown), weights, of_views))
        self.encoded += len(members)

    def _shown(self, visual, size, grids):
        """Index of what of grids `[..., h, w, D]` shows a picture."""
        if not visual.canvas_each:
            return ...
        factor = visual.view_grid[0] // grids.shape[-3]
        rows, columns = visual.extents([size])[0] // (visual.cell * factor)
        return ..., slice(rows), slice(columns), slice(None)

    def _keep(self, number, seen):
        self._kept[number] = seen
        self._bytes += seen.nbytes
        while self._bytes > KEPT and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def vectors(self, pictures, scale, slot, newline, blend=None):
        """What stands at the positions of a prompt, and what each stack adds there.

        Args:
          pictures: of the prompt, in order.
          scale: tokens of a square view.
          slot: `[n]` int, of a `Prompt`; of all of its positions or of some of them.
          newline: the slot of the newline.
          blend: `[n, 4]` int as `slot`, and `[n, 4]` float32, their shares in what stands there; None for `slot`.

        Returns:
          `[1 + S, n, D]` in the dtype of the decoder, zeros at text.
        """
        out = np.zeros((len(self._newline), len(slot), self._newline.shape[-1]), self._dtype)
        at = slot >= 0
        if not at.any():  # text alone, or all of the pictures were read before
            return out
        model = self._program.model
        reduce, tokens = find_reduction(model.reduction), []
        factors = model.projector.shuffle
        factor = factor_of(scale, model.vision.grid, factors)
        for picture in pictures:
            seen = self._seen(picture)
            further = () if seen.importance is None else (seen.importance,)
            # [1 + S, U, tokens, D]
            grids = seen.grids[factors.index(factor)].astype(np.float32)
            reduced = reduce(grids, scale, model.vision.grid // factor, *further)
            tokens.append(reduced.reshape(len(reduced), -1, reduced.shape[-1]).astype(self._dtype))
        bank = np.concatenate([*tokens, self._newline], axis=1)
        slots = slot[at] if blend is None else blend[0][at]
        found = bank[:, np.where(slots == newline, bank.shape[1] - 1, slots)]
        if blend is not None:
            found = np.einsum("snkd,nk->snd", found.astype(np.float32), blend[1][at])
        out[:, at] = found
        return out


def _on_few_canvases(layout, size):
    """The layout for a picture, which may have a canvas of its own: one of few, as each has a program of its own."""
    if not layout.visual.canvas_each:
        return layout
    step, canvas = layout.visual.step, layout.visual.holding([size]).canvas
    return _on_canvas(layout, tuple(step * bucket(side // step, 1) for side in canvas))


def _on_canvas(layout, canvas):
    visual = dataclasses.replace(layout.visual, canvas=canvas, canvases=())
    return dataclasses.replace(layout, visual=visual)
