"""Placing segments in the rows of a pack."""

import numpy as np

from lmm_jax.data.plan import NO_TARGET

FULL = np.iinfo(np.int64).max


class DoesNotFit(ValueError):
    """A pack's segments, or their targets, exceed its rows."""


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


def assign_rows(records, rows, length) -> list[int]:
    """Rows of a pack for the copies of its records, placed one record after the other.

    Args:
      records: lengths of each record's copies, descending.
      rows, length: of the pack.

    Returns:
      the row of each copy, in the order given.

    Raises:
      DoesNotFit: naming what is needed.
    """
    # As `place_copies` does it; for one pack plain numbers are faster.
    free, found = [length] * rows, []
    for copy in (int(n) for copies in records for n in copies):
        room, row = min(((room, row) for row, room in enumerate(free) if room >= copy), default=(0, None))
        if row is None:
            needed = [int(n) for copies in records for n in copies]
            raise DoesNotFit(
                f"segments of {needed} positions do not fit into {rows} rows of {length}; "
                "raise data.length or data.rows"
            )
        free[row] = room - copy
        found.append(row)
    return found


def pack(segments, where, rows, length, targets) -> dict[str, np.ndarray]:
    """Lays segments into the rows of a pack, one behind the other.

    Args:
      segments: `plan.Segment`s; all may use any slot of the pack.
      where: the row of each, as `assign_rows` gives them.
      rows: rows R of the pack.
      length: positions T of a row.
      targets: supervised positions K that a pack can hold.

    Returns:
      id, slot, position, segment: `[R, T]` int32; segment 0 is padding.
      target_at, target, group: `[K]` int32; index into the pack's R·T positions, id, bitmask (0 = unused).

    Raises:
      DoesNotFit: more targets than there is room for.
    """
    out = {name: np.zeros((rows, length), np.int32) for name in ("id", "position", "segment")}
    out["slot"] = np.full((rows, length), -1, np.int32)
    next_id = np.full((rows, length), NO_TARGET, np.int32)
    group = np.zeros((rows, length), np.int32)
    used = np.zeros(rows, np.int64)
    for number, (segment, row) in enumerate(zip(segments, where, strict=True), start=1):
        n = len(segment)
        at = (row, slice(used[row], used[row] + n))
        out["id"][at], out["slot"][at] = segment.id, segment.slot
        out["position"][at] = np.arange(n)
        out["segment"][at] = number
        next_id[at] = segment.target
        group[at] = np.where(segment.target == NO_TARGET, 0, segment.group)
        used[row] += n
    found = np.flatnonzero(group)
    if len(found) > targets:
        raise DoesNotFit(f"{len(found)} supervised tokens, room for {targets}; raise data.targets")
    for name, values in (("target_at", found), ("target", next_id.flat[found]), ("group", group.flat[found])):
        out[name] = np.zeros(targets, np.int32)
        out[name][: len(found)] = values
    return out
