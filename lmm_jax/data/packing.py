"""Which records share a pack, and in which row of the pack each of their copies stands: lengths alone.

A *record* is a conversation with its pictures, as it lies in a prepared folder. A *pack* is what travels through the
training step: a few *rows* of positions, and room for a number of views. A record with pictures is laid out once for
each scale that trains, which makes as many *copies*; they share the record's views, so all of them stand in one pack.

                 copies    views
    record 0     8, 3      1
    record 1     6, 2      1
    record 2     4         0        text alone is the same at every scale: one copy

    a pack of 2 rows of 12 positions and 2 views     row 0   0 0 0 0 0 0 0 0 0 0 0 .
                                                     row 1   1 1 1 1 1 1 1 1 2 2 2 2

    PlannedPack(members=[0, 1, 2], rows=[[0, 0], [1, 1], [1, -1]])

`plan_packs` makes such packs of records in stream order, a window of them at a time. Records of one copy each fill
rows first and the rows then fill packs; records of several copies go one by one where they leave the least room. In
which order records come is decided by `stream`.
"""

import dataclasses

import numpy as np

from lmm_jax.data.segments import DoesNotFit

WINDOW = 1024  # records of the stream that are packed together
MOST_WAITING = 4 * WINDOW  # records that are looked at together when some wait for a better row
FULL_ROW = 0.98  # of its positions: a row filled less waits for the records of the next window
OPEN = 64  # packs that stay open from one window to the next
NO_PLACE = np.iinfo(np.int64).max  # more than any room
NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What a pack holds.

    Attributes:
      rows, length: rows of a pack and positions of each.
      views: views of a pack.
      targets: supervised positions of a pack.
    """

    rows: int
    length: int
    views: int
    targets: int


@dataclasses.dataclass(frozen=True)
class Needs:
    """What each of n records takes in a pack.

    Attributes:
      copies: `[n, C]` int, positions of each copy, longest first; 0 where a record has fewer than C copies.
      views: `[n]` int, of its pictures.
      targets: `[n]` int, supervised positions of all copies together.
      bucket: `[n]` int, of the canvases that a pack may have the one that the record's pictures need.
    """

    copies: np.ndarray
    views: np.ndarray
    targets: np.ndarray
    bucket: np.ndarray | None = None

    def __post_init__(self):
        if self.bucket is None:
            object.__setattr__(self, "bucket", np.zeros(len(self.copies), np.int64))

    def __len__(self):
        return len(self.copies)

    def take(self, records):
        """The needs of some records, named by their numbers or a mask."""
        return Needs(self.copies[records], self.views[records], self.targets[records], self.bucket[records])


@dataclasses.dataclass(frozen=True)
class PlannedPack:
    """One pack: which records stand in it, and where.

    Attributes:
      members: `[m]` numbers of its records, or `[m, 2]` (dataset, record).
      rows: `[m, C]` the pack's row for each copy of each member, as in `Needs.copies`; `NO_ROW` where it has fewer.
      bucket: as in `Needs`, of all members.
    """

    members: np.ndarray
    rows: np.ndarray
    bucket: int = 0


def plan_packs(needs, capacity) -> list[PlannedPack]:
    """Packs records in windows of the stream, so that little is left unused.

    Args:
      needs: of the records, in stream order; every one must fit into a pack of its own, see `fits`.
      capacity: of a pack.
    """
    if needs.copies.shape[1] == 1:
        return _pack_single_copies(needs, capacity)
    return _pack_several_copies(needs, capacity)


def fits(needs, capacity) -> np.ndarray:
    """`[n]` bool: records that an empty pack can hold."""
    within = (needs.views <= capacity.views) & (needs.targets <= capacity.targets)
    if needs.copies.shape[1] == 1:
        return within & (needs.copies[:, 0] <= capacity.length)
    empty = np.full((1, capacity.rows), capacity.length)
    # Many records have copies of the same lengths, so that each combination is tried once.
    lengths, which = np.unique(needs.copies, axis=0, return_inverse=True)
    placed = np.array([place_copies(copies[copies > 0], empty).fits[0] for copies in lengths], bool)
    return within & placed[which.reshape(-1)]


def usage(needs, packs, capacity) -> tuple[float, float]:
    """Shares of the positions and of the views of `packs` that records with these needs use."""
    positions = needs.copies.sum() / (len(packs) * capacity.rows * capacity.length)
    views = needs.views.sum() / max(len(packs) * capacity.views, 1)
    return float(positions), float(views)


def _windows(count):
    """Numbers of the records of each window, one array after the other."""
    for first in range(0, count, WINDOW):
        yield np.arange(first, min(first + WINDOW, count))


# Records of one copy each.


@dataclasses.dataclass(frozen=True)
class _FilledRow:
    """Records that share a row, and what they take of its pack."""

    records: np.ndarray
    views: int
    targets: int


def _pack_single_copies(needs, capacity):
    """Rows are filled first, then put together so that views are spread evenly over the packs."""
    lengths = needs.copies[:, 0]
    packs, waiting = [], np.zeros(0, np.int64)
    for window in _windows(len(needs)):
        records = np.concatenate([waiting, window])
        may_wait = window[-1] + 1 < len(needs) and len(records) < MOST_WAITING
        done, postponed = [], []
        for chosen in fill_rows(lengths[records], capacity.length):
            row = records[chosen]
            full = lengths[row].sum() >= FULL_ROW * capacity.length
            (done if full or not may_wait else postponed).append(row)
        waiting = np.concatenate([np.zeros(0, np.int64), *postponed])
        packs += _group_rows(done, needs, capacity)
    return packs


def _group_rows(rows, needs, capacity):
    """Packs of filled rows: those with most views first, each to the pack that has most views left."""
    filled = [part for row in rows for part in _split_row(row, needs, capacity)]
    takes = np.array([(1, row.views, row.targets) for row in filled]).reshape(-1, 3)
    empty = np.array([(capacity.rows, capacity.views, capacity.targets)])
    room = np.repeat(empty, -(-len(filled) // capacity.rows), axis=0)  # [packs, 3], as `takes`
    held = [[] for _ in room]
    for number in np.argsort(-takes[:, 1], kind="stable"):
        fitting = (room >= takes[number]).all(axis=1)
        if fitting.any():
            pack = int(np.where(fitting, room[:, 1], -1).argmax())
        else:
            pack = len(held)
            held.append([])
            room = np.concatenate([room, empty])
        room[pack] -= takes[number]
        held[pack].append(filled[number].records)
    return [_pack_of_rows(rows_of_pack) for rows_of_pack in held if rows_of_pack]


def _pack_of_rows(rows):
    """The pack whose row i holds the records `rows[i]`, one copy of each."""
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return PlannedPack(np.concatenate(rows), row_of[:, None])


def _split_row(row, needs, capacity):
    """A row cut into `_FilledRow`s none of which has more views or targets than a pack holds; most stay whole."""
    first, views, targets = 0, 0, 0
    for at, record in enumerate(row):
        more_views, more_targets = int(needs.views[record]), int(needs.targets[record])
        if at > first and (views + more_views > capacity.views or targets + more_targets > capacity.targets):
            yield _FilledRow(row[first:at], views, targets)
            first, views, targets = at, 0, 0
        views += more_views
        targets += more_targets
    yield _FilledRow(row[first:], views, targets)


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


# Records of several copies each.


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the copies of one record would stand in each of n packs, each tried by itself.

    Attributes:
      rows: `[n, C]` the row of each copy; of no meaning in packs that do not hold all of them.
      free: `[n, R]` positions left in each row afterwards; likewise.
      left: `[n]` positions left in the row of the longest copy, `NO_PLACE` in packs that do not hold all copies.
    """

    rows: np.ndarray
    free: np.ndarray
    left: np.ndarray

    @property
    def fits(self) -> np.ndarray:
        """`[n]` bool: packs that hold all copies."""
        return self.left < NO_PLACE


def place_copies(copies, free) -> Placement:
    """Places copies, longest first, each into the row of a pack where it leaves the least room.

    Args:
      copies: `[C]` lengths, descending.
      free: `[n, R]` positions left in each row of n packs.
    """
    free, packs, fitting = free.copy(), np.arange(len(free)), np.ones(len(free), bool)
    rows = np.zeros((len(copies), len(free)), np.int64)
    for number, copy in enumerate(copies):
        room = np.where(free >= copy, free, NO_PLACE)
        rows[number] = room.argmin(axis=1)
        fitting &= room[packs, rows[number]] < NO_PLACE
        free[packs, rows[number]] -= copy
    return Placement(rows.T, free, np.where(fitting, free[packs, rows[0]], NO_PLACE))


def _pack_several_copies(needs, capacity):
    """Longest first, each into the pack where its longest copy leaves the least room."""
    finished, open_packs = [], _OpenPacks(capacity, needs.copies.shape[1])
    for window in _windows(len(needs)):
        for record in window[np.argsort(-needs.copies[window].sum(axis=1), kind="stable")]:
            copies = needs.copies[record]
            open_packs.add(record, copies[copies > 0], needs.views[record], needs.targets[record])
        finished += open_packs.finish_all_but(OPEN)
    return finished + open_packs.finish_all_but(0)


class _OpenPacks:
    """Packs that still take records: what each has left stands in arrays, so that one look compares all of them."""

    def __init__(self, capacity, copies):
        """Starts without a pack; `copies` is the most that a record has."""
        self._capacity, self._copies = capacity, copies
        self._free = np.zeros((0, capacity.rows), np.int64)  # [n, R] positions left in each row
        self._views = np.zeros(0, np.int64)  # [n] views left
        self._targets = np.zeros(0, np.int64)  # [n] supervised positions left
        self._held = []  # of each pack the (record, rows of its copies)

    def add(self, record, copies, views, targets):
        """Puts a record into the pack where it leaves the least room, or into a new one if no pack holds it."""
        placement = place_copies(copies, self._free)
        left = np.where((self._views >= views) & (self._targets >= targets), placement.left, NO_PLACE)
        if len(left) and left.min() < NO_PLACE:
            pack = int(left.argmin())
            rows, free = placement.rows[pack], placement.free[pack]
        else:
            pack = self._open()
            alone = place_copies(copies, self._free[pack:])
            rows, free = alone.rows[0], alone.free[0]
        self._free[pack] = free
        self._views[pack] -= views
        self._targets[pack] -= targets
        self._held[pack].append((record, rows))

    def finish_all_but(self, count) -> list[PlannedPack]:
        """Takes all packs away but the `count` with most positions left; returns those taken, oldest first."""
        keep = np.sort(np.argsort(-self._free.sum(axis=1), kind="stable")[:count])
        finished = [self._planned(pack) for pack in np.setdiff1d(np.arange(len(self._held)), keep)]
        self._free, self._views, self._targets = self._free[keep], self._views[keep], self._targets[keep]
        self._held = [self._held[pack] for pack in keep]
        return finished

    def _open(self):
        """Adds an empty pack; returns its number."""
        c = self._capacity
        self._free = np.concatenate([self._free, np.full((1, c.rows), c.length, np.int64)])
        self._views = np.append(self._views, c.views)
        self._targets = np.append(self._targets, c.targets)
        self._held.append([])
        return len(self._held) - 1

    def _planned(self, pack):
        held = self._held[pack]
        rows = np.full((len(held), self._copies), NO_ROW, np.int64)
        for at, (_, of_copies) in enumerate(held):
            rows[at, : len(of_copies)] = of_copies
        return PlannedPack(np.array([record for record, _ in held]), rows)


# Segments that come without a plan.


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
