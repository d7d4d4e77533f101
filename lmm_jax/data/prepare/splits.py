"""Which rows of a file are kept from training, to validate and to test with.

On which side a row lies is decided by what it is of, its pictures, or its id if it has none: their hash is its place
between 0 and 1. The test rows are those of the lowest places, the validation rows those of the highest ones. So the
test rows are the same whether or how many validation rows are asked for, wherever a row stands in the file, and
whatever else is refused; and a share, unlike a number, keeps each row on its side where rows are added or taken away
(but for groups of rows that are very large beside the share, see `assign`).

Rows that share a picture lie on the same side, through any number of rows that link them. Pictures are told apart by
their files, whatever their names are written like and through links, or by their bytes where a file of rows holds
these: copies are not seen.
"""

import array
import hashlib
import os
import re

import numpy as np

from lmm_jax.data.prepare.picture_names import LONGEST, file_name

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
UNUSABLE = len(SPLITS)  # stands for the split of a row that cannot be read


def parse_amount(flag, value) -> int | float:
    """How many rows a split gets: a whole number of them, or a share of all.

    Args:
      flag: that gives it, for the message.
      value: text of a command line, or the number itself.

    Raises:
      ValueError: neither a whole number from 1 on nor a share between 0 and 1.
    """
    text = str(value).strip()
    if re.fullmatch(r"[0-9]{1,18}", text) and int(text) > 0:
        return int(text)
    if re.fullmatch(r"[0-9]*\.[0-9]+(e-[0-9]+)?|[0-9]+e-[0-9]+", text) and 0 < float(text) < 1:
        return float(text)
    raise ValueError(f"{flag} {text[:80]}: expected a number of rows, such as 500, or a share of them, such as 0.05")


class Keys:
    """What each row of a file is of: 8 bytes a row, and 8 a picture; 100 more a picture while they are grouped."""

    def __init__(self, folder):
        """`folder` is the one that pictures are named in."""
        self._folder = os.path.realpath(folder)
        self._hashes, self._offsets = array.array("Q"), array.array("q", [0])

    def add(self, id, images):
        """Adds a row: its id, and the names of its pictures, or their bytes."""
        for image in images:
            self._hashes.append(_hash(b"picture", self._name(image)))
        if not images:
            self._hashes.append(_hash(b"id", id.encode()))
        self._offsets.append(len(self._hashes))

    def add_unusable(self):
        """Adds a row that cannot be read."""
        self._offsets.append(len(self._hashes))

    def _name(self, image):
        if isinstance(image, bytes):
            return hashlib.sha256(image).digest()
        name = file_name(image)
        if "\0" not in name and len(name) <= LONGEST:  # other rows are refused later
            name = os.path.relpath(os.path.realpath(os.path.join(self._folder, name)), self._folder)
        return name.encode(errors="surrogatepass")

    def groups(self):
        """Rows that belong together.

        Returns:
          `(groups, places)`: the group of each row, [rows] int64, -1 for one that cannot be read; and where each
          group lies between 0 and 1, [groups] float64.
        """
        offsets = np.array(self._offsets, np.int64)
        hashes, nodes = np.unique(np.array(self._hashes, np.uint64), return_inverse=True)
        parents = list(range(len(hashes)))

        def root(node):
            while parents[node] != node:
                parents[node] = node = parents[parents[node]]
            return node

        for row in np.flatnonzero(np.diff(offsets) > 1):
            first, *others = (root(node) for node in nodes[offsets[row] : offsets[row + 1]].tolist())
            for other in others:
                # The smaller hash leads, so that the place of a group does not depend on the order of the rows.
                first, other = sorted((first, root(other)))
                parents[other] = first
        usable = np.diff(offsets) > 0
        leaders = np.array([root(node) for node in nodes[offsets[:-1][usable]].tolist()], np.int64)
        leaders, inverse = np.unique(leaders, return_inverse=True)
        groups = np.full(len(offsets) - 1, -1)
        groups[usable] = inverse
        places = [_hash(b"place", int(hashes[leader]).to_bytes(8, "big")) / 2**64 for leader in leaders]
        return groups, np.array(places)


def _hash(kind, data) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=kind).digest(), "big")


def assign(keys, validation=None, test=None, where="the file") -> np.ndarray:
    """The split of each row.

    A number takes groups of rows that share a picture in the order of their places, each that still fits. A share
    takes the groups whose places lie within it, at least one; a group of more rows than the share comes to, such as
    the rows of one placeholder picture, is left to training, unless all are as large.

    Args:
      keys: `Keys` of the rows.
      validation, test: see `parse_amount`; None or no rows.
      where: the rows stand, for the message.

    Returns:
      [rows] uint8, indices into `SPLITS`, `UNUSABLE` for a row that cannot be read.

    Raises:
      ValueError: numbers that leave no row to train on, or that are smaller than any group of rows.
    """
    groups, places = keys.groups()
    sizes = np.bincount(groups[groups >= 0], minlength=len(places))
    rows, order = int(sizes.sum()), np.argsort(places, kind="stable")
    if rows == 0:
        return np.full(len(groups), UNUSABLE, np.uint8)
    asked = {f"--{name}": amount for name, amount in ((TEST, test), (VALIDATION, validation)) if amount is not None}
    together = " ".join(f"{flag} {amount}" for flag, amount in asked.items())
    if sum(amount if isinstance(amount, int) else amount * rows for amount in asked.values()) >= rows:
        raise ValueError(f"{together}: no row of {where} is left to train on, which has {rows:,} that can be read")
    of_group = np.full(len(places), SPLITS.index(TRAIN), np.uint8)
    for split, amount, ordered, distances in (
        (TEST, test, order, places),
        (VALIDATION, validation, order[::-1], 1 - places),
    ):
        if amount is None:
            continue
        free = ordered[of_group[ordered] == SPLITS.index(TRAIN)]
        chosen = (
            _first(free, sizes, amount) if isinstance(amount, int) else _within(free, sizes, distances, amount, rows)
        )
        if not chosen:
            smallest = f"{sizes[free].min():,} rows" if len(free) else "no row"
            raise ValueError(
                f"--{split} {amount}: rows that share a picture stay on one side, and the smallest group of these in "
                f"{where} has {smallest}; ask for that many at least, or give the split a file of its own"
            )
        of_group[chosen] = SPLITS.index(split)
    if not (of_group == SPLITS.index(TRAIN)).any():
        raise ValueError(
            f"{together}: no row of {where} is left to train on, as rows that share a picture stay together"
        )
    return np.append(of_group, np.uint8(UNUSABLE))[groups]


def _first(ordered, sizes, number):
    """Groups in order, each that fits into what is left of a number of rows."""
    chosen = []
    for group in ordered:
        if number == 0:
            break
        if sizes[group] <= number:
            chosen.append(group)
            number -= sizes[group]
    return chosen


def _within(ordered, sizes, distances, share, rows):
    """Groups within a share of the places, without the very large ones."""
    if not len(ordered):
        return []
    most = max(share * rows, sizes[ordered].min())
    fitting = [group for group in ordered if sizes[group] <= most]
    return [group for group in fitting if distances[group] < share] or fitting[:1]
