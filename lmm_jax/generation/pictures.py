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
from lmm_jax.reduction import find_reduction

KEPT = 2**30  # bytes of this host's memory that what was seen may take


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of a request, not decoded yet.

    Attributes:
      source: a path, the bytes of a file, or a `PIL.Image`.
      size: `(width, height)`, pixels.
      of: name of the prompt that it belongs to, for messages.
    """

    source: object
    size: tuple[int, int]
    of: str

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
      grids: `[1 + S, U, h, w, D]`, as encoder and projector gave them: the bank's, then those of each stack.
      importance: `[U, h, w]` float32 of the bank's cells, where the model's reduction needs it; else None.
    """

    grids: np.ndarray
    importance: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes of the host's memory."""
        return self.grids.nbytes + (0 if self.importance is None else self.importance.nbytes)


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
        self._layout = dataclasses.replace(layout, rows=1, length=1, targets=0)
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
        """A number that equal pictures share."""
        return self._numbers.setdefault(picture.digest, len(self._numbers))

    def see(self, pictures):
        """Encodes those of the `Picture`s whose grids are not kept; ValueError for one that cannot be read."""
        missing = {}
        for picture in pictures:
            if self.number(picture) in self._kept:
                self._kept.move_to_end(self.number(picture))
            else:
                missing[self.number(picture)] = picture
        by_views = collections.defaultdict(list)
        for number, picture in missing.items():
            views = self._layout.see(picture.open())
            by_views[len(views)].append((number, picture.size, views))
        with self._program.use():
            ways = sharding.ways("batch")
        for views, members in by_views.items():
            # As many at once as there are devices that share out packs: more would only be more programs.
            count = ways if len(members) > 1 else 1
            for first in range(0, len(members), count):
                self._encode(views, members[first : first + count], count)

    def grids(self, pictures):
        """Grids `[U, h, w, D]` of the bank of some pictures, one behind the other."""
        self.see(pictures)
        return np.concatenate([self._seen(picture).grids[0] for picture in pictures])

    def _seen(self, picture):
        """What was seen of a picture; it is encoded again if that had to go."""
        if self.number(picture) not in self._kept:
            self.see([picture])
        return self._kept[self.number(picture)]

    def _encode(self, views, members, count):
        layout = dataclasses.replace(self._layout, views=views)
        packs = [layout.assemble([], [(size, pixels)]) for _, size, pixels in members]
        packs += packs[-1:] * (count - len(packs))
        arrays = [
            np.stack([pack[n] for pack in packs]) if n in packs[0] else None for n in ("pixels", "gather", "extent")
        ]
        grids, importance = self._programs.see(*arrays)
        grids = np.asarray(grids)  # [1 + S, G, U, h, w, D]
        importance = None if importance is None else np.asarray(importance)  # [G, U, h, w]
        for n, (number, size, _) in enumerate(members):
            used = layout.visual.grids_of_tiling(layout.visual.tiling(*size))
            weights = None if importance is None else np.array(importance[n, :used])
            self._keep(number, Seen(np.array(grids[:, n, :used]), weights))
        self.encoded += len(members)

    def _keep(self, number, seen):
        self._kept[number] = seen
        self._bytes += seen.nbytes
        while self._bytes > KEPT and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def vectors(self, pictures, scale, slot, newline):
        """What stands at the positions of a prompt, and what each stack adds there.

        Args:
          pictures: of the prompt, in order.
          scale: tokens of a square view.
          slot: `[n]` int, see `PackLayout.slots`, of a pack that holds these pictures alone at this scale alone; of
            all positions of the prompt or of some of them.
          newline: the slot of the newline.

        Returns:
          `[1 + S, n, D]` in the dtype of the decoder, zeros at text.
        """
        out = np.zeros((len(self._newline), len(slot), self._newline.shape[-1]), self._dtype)
        at = slot >= 0
        if not at.any():  # text alone, or all of the pictures were read before
            return out
        model = self._program.model
        reduce, tokens = find_reduction(model.reduction), []
        for picture in pictures:
            seen = self._seen(picture)
            further = () if seen.importance is None else (seen.importance,)
            # [1 + S, U, tokens, D]
            reduced = reduce(seen.grids.astype(np.float32), scale, model.vision.grid, *further)
            tokens.append(reduced.reshape(len(reduced), -1, reduced.shape[-1]).astype(self._dtype))
        bank = np.concatenate([*tokens, self._newline], axis=1)
        out[:, at] = bank[:, np.where(slot[at] == newline, bank.shape[1] - 1, slot[at])]
        return out
