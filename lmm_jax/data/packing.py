"""Which copies of conversations go into which row of a pack: numbers alone, longest first."""

import numpy as np

from lmm_jax.data.segments import DoesNotFit

FULL = np.iinfo(np.int64).max


def place_copies(copies, free):
    """Places copies, longest first, each into the row of a pack where it leaves the least room.

    Args:
      copies: `[C]` lengths, descending.
      free: `[n, R]` room in each row of n packs, each of which is tried by itself.

    Returns:
      room afterwards `[n, R]`; `[n]` what the longest copy's row has left, `FULL` if a copy finds no place; and the
      row of each copy, `[C, n]`.
    """
    free, at, placed = free.copy(), np.arange(len(free)), np.ones(len(free), bool)
    rows = np.zeros((len(copies), len(free)), np.int64)
    for n, copy in enumerate(copies):
        room = np.where(free >= copy, free, FULL)
        rows[n] = room.argmin(axis=1)
        placed &= room[at, rows[n]] < FULL
        free[at, rows[n]] -= copy
    return free, np.where(placed, free[at, rows[0]], FULL), rows


def fill_rows(lengths, length) -> list[list[int]]:
    """Fills rows one after the other: the longest that is left, then again and again what comes closest to the room.

    What comes closest is one or two of the lengths that are left. Of lengths near a third of a row, where putting the
    longest first wastes much, this leaves far less.

    Args:
      lengths: `[n]` int, none above `length`.
      length: positions of a row.

    Returns:
      numbers of the lengths in each row.
    """
    order = np.argsort(lengths, kind="stable")
    sizes, rows = np.asarray(lengths)[order], []
    while len(sizes):
        chosen, room, row = [len(sizes) - 1], length, []
        while chosen:
            row += order[chosen].tolist()
            room -= int(sizes[chosen].sum())
            sizes, order = np.delete(sizes, chosen), np.delete(order, chosen)
            chosen = _closest(sizes, room)
        rows.append(row)
    return rows


def _closest(sizes, room) -> list[int]:
    """Indices of the one or two ascending `sizes` whose sum comes closest to `room` from below; [] if none does."""
    if not len(sizes) or sizes[0] > room:
        return []
    one = int(np.searchsorted(sizes, room, "right")) - 1
    first = np.arange(np.searchsorted(sizes, room - sizes[0], "right"))
    if not len(first):
        return [one]
    second = np.searchsorted(sizes, room - sizes[first], "right") - 1
    second -= second == first
    total = np.where(second >= 0, sizes[first] + sizes[second], -1)
    best = int(total.argmax())
    return [best, int(second[best])] if total[best] > sizes[one] else [one]


def assign_rows(lengths, rows, length) -> list[int]:
    """Rows of a pack for segments that no plan has placed: each goes where it leaves the least room.

    Args:
      lengths: of the segments.
      rows, length: of the pack.

    Returns:
      the row of each.

    Raises:
      DoesNotFit: naming what is needed.
    """
    free, found = [length] * rows, []
    for needed in lengths:
        room, row = min(((room, row) for row, room in enumerate(free) if room >= needed), default=(0, None))
        if row is None:
            raise DoesNotFit(
                f"segments of {list(lengths)} positions do not fit into {rows} rows of {length}; "
                "raise data.length or data.rows"
            )
        free[row] = room - needed
        found.append(row)
    return found
