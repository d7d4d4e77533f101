"""A pack of the stream put in order for a page: its records, their copies and pictures, and what of them was cut."""

import dataclasses

import numpy as np

from lmm_jax.data.pack_layout import PackLayout, PlacedPicture
from lmm_jax.data.packing import NO_ROW
from lmm_jax.data.pipeline import Packs


@dataclasses.dataclass(frozen=True)
class ShownCopy:
    """A copy of a record at one scale, and where it stands.

    Attributes:
      member: number of its record among those of the pack.
      row, begin, end: positions `begin` … `end` - 1 of that row.
      supervised: `[n]` bool, whether the position before predicts this one.
      scales: those whose loss it takes part in.
    """

    member: int
    row: int
    begin: int
    end: int
    supervised: np.ndarray
    scales: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ShownPack:
    """A pack of the stream, put in order for the page.

    Attributes:
      packs: the `Packs` that it is one of.
      position: its place in the stream.
      arrays: as `packs` gives them.
      members: `(dataset, record)` of each record.
      faults: of each record that could not be read, by its number among the members.
      pictures, picture_of: a `PlacedPicture` for each picture, and the number of its record among the members.
      copies: `ShownCopy`s.
    """

    packs: Packs
    position: int
    arrays: dict
    members: list[tuple[int, int]]
    faults: dict[int, dict]
    pictures: list[PlacedPicture]
    picture_of: list[int]
    copies: list[ShownCopy]

    @classmethod
    def read(cls, packs, position):
        """Reads the pack at a position of the stream."""
        arrays, members = packs[position], packs.members(position)
        sizes = [packs.sizes(*member) for member in members]
        return cls(
            packs=packs,
            position=position,
            arrays=arrays,
            members=members,
            faults=dict(zip(np.flatnonzero(arrays["bad"]).tolist(), arrays["faults"], strict=True)),
            pictures=packs.layout_at(position).place([size for of_record in sizes for size in of_record]),
            picture_of=[number for number, of_record in enumerate(sizes) for _ in of_record],
            copies=_find_copies(packs, position, arrays),
        )

    @property
    def layout(self) -> PackLayout:
        """That of the pack's canvas."""
        return self.packs.layout_at(self.position)

    @property
    def size(self) -> int:
        """Positions."""
        return self.arrays["segment"].size

    @property
    def filled(self) -> int:
        """Positions that are no padding."""
        return int((self.arrays["segment"] > 0).sum())

    @property
    def supervised(self) -> int:
        """Positions whose next token the loss asks for."""
        return int((self.arrays["group"] > 0).sum())

    @property
    def views_filled(self) -> int:
        """Views that show a picture."""
        visual = self.layout.visual
        return sum(visual.views_of_tiling(picture.tiling) for picture in self.pictures)

    def views(self, picture):
        """Views `[n, H, W, 3]` of a `PlacedPicture`, or None where the batch has none."""
        if "pixels" not in self.arrays:
            return None
        count = self.layout.visual.views_of_tiling(picture.tiling)
        return self.arrays["pixels"][picture.first_view : picture.first_view + count]

    def of_copy(self, name, copy) -> np.ndarray:
        """The part of one of the arrays `[R, T]` that belongs to a `ShownCopy`."""
        return self.arrays[name][copy.row, copy.begin : copy.end]

    def text_ids(self, copy) -> np.ndarray:
        """Token ids of a `ShownCopy`, without its visual tokens."""
        return self.of_copy("id", copy)[self.of_copy("slot", copy) < 0]

    def identity(self, member) -> str:
        """The `id` of a record, as its row named it."""
        if member in self.faults:
            return self.faults[member]["id"]
        dataset, record = self.members[member]
        return self.packs.data[dataset][record]["id"].decode()

    def cut(self, member) -> str:
        """What of a record does not stand in the pack because it would be too long, or nothing."""
        dataset, record = self.members[member]
        data = self.packs.datasets[dataset]
        answers, pictures = data.counts.answers[record], data.counts.pictures[record]
        all_answers, all_pictures = data.all_answers(record), len(data.all_sizes(record))
        if answers == all_answers:
            return ""
        kept = f"{answers} of {all_answers} answers"
        if pictures < all_pictures:
            kept += f" and {pictures} of {all_pictures} pictures"
        return f"cut to fit data.length={self.packs.layout.length}: {kept} kept"


def _find_copies(packs, position, arrays) -> list[ShownCopy]:
    """The copies of a pack, in the order of its segments: those of a record follow each other."""
    copies_of = (packs.stream[position].rows != NO_ROW).sum(axis=1)
    group = np.zeros(arrays["id"].size, np.int32)  # of the loss groups, at each position
    used = arrays["group"] > 0
    group[arrays["target_at"][used]] = arrays["group"][used]
    group = group.reshape(arrays["id"].shape)
    found = []
    for number, member in enumerate(np.repeat(np.arange(len(copies_of)), copies_of).tolist(), start=1):
        rows, at = np.nonzero(arrays["segment"] == number)
        row, begin, end = int(rows[0]), int(at[0]), int(at[-1]) + 1
        of_copy = group[row, begin:end]
        bits = np.bitwise_or.reduce(of_copy)
        scales = tuple(scale for i, scale in enumerate(packs.layout.scales) if bits >> i & 1)
        found.append(ShownCopy(member, row, begin, end, np.concatenate([[False], of_copy[:-1] > 0]), scales))
    return found
