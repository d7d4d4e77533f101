"""Placing segments in the rows of a pack."""

import numpy as np

from lmm_jax.data.plan import NO_TARGET


class DoesNotFit(ValueError):
    """A pack's segments, or their targets, exceed its rows."""


def pack(segments, rows, length, targets) -> dict[str, np.ndarray]:
    """Places segments in the first row with room, longest first.

    Args:
      segments: `plan.Segment`s; all may use any slot of the pack.
      rows: rows R of the pack.
      length: positions T of a row.
      targets: supervised positions K that a pack can hold.

    Returns:
      id, slot, position, segment: `[R, T]` int32; segment 0 is padding.
      target_at, target, group: `[K]` int32; index into the pack's R·T positions, id, bitmask (0 = unused).

    Raises:
      DoesNotFit: naming what is needed.
    """
    out = {name: np.zeros((rows, length), np.int32) for name in ("id", "position", "segment")}
    out["slot"] = np.full((rows, length), -1, np.int32)
    next_id = np.full((rows, length), NO_TARGET, np.int32)
    group = np.zeros((rows, length), np.int32)
    used = np.zeros(rows, np.int64)
    for number, segment in enumerate(sorted(segments, key=len, reverse=True), start=1):
        n = len(segment)
        row = int(np.argmax(used + n <= length))
        if used[row] + n > length:
            needed = [len(s) for s in segments]
            raise DoesNotFit(
                f"segments of {needed} positions do not fit into {rows} rows of {length}; "
                "raise data.length or data.rows"
            )
        at = (row, slice(used[row], used[row] + n))
        out["id"][at], out["slot"][at] = segment.id, segment.slot
        out["position"][at] = np.arange(n)
        out["segment"][at] = number
        next_id[at] = segment.target
        group[at] = np.where(segment.target == NO_TARGET, 0, segment.group)
        used[row] += n
    where = np.flatnonzero(group)
    if len(where) > targets:
        raise DoesNotFit(f"{len(where)} supervised tokens, room for {targets}; raise data.targets")
    for name, values in (("target_at", where), ("target", next_id.flat[where]), ("group", group.flat[where])):
        out[name] = np.zeros(targets, np.int32)
        out[name][: len(where)] = values
    return out
