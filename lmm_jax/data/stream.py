"""Which rows stand in which pack: a pure function of (seed, data, position), planned from stored lengths alone.

Rows are drawn in *rounds*: of one source, a round is an epoch in a new order; of a mixture, as many rows as all
sources have, drawn by weight, each source going through its own epochs. The rows of a round are packed, the packs
shuffled, and the packs of all rounds numbered on: that number is the global position.
"""

import dataclasses
import hashlib

import numpy as np

from lmm_jax.data.packing import FULL, fill_rows, place_copies

WINDOW = 1024  # rows of the stream that are packed together
OPEN = 64  # packs that stay open from one window to the next


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
    """What each row of a source takes in a pack.

    Attributes:
      copies: `[n, C]` int, positions of each copy, longest first; 0 where a row has fewer copies.
      views: `[n]` int, of its pictures.
      targets: `[n]` int, supervised positions of all copies together.
    """

    copies: np.ndarray
    views: np.ndarray
    targets: np.ndarray

    def __len__(self):
        return len(self.copies)

    def take(self, rows):
        """The needs of some rows."""
        return Needs(self.copies[rows], self.views[rows], self.targets[rows])


def fits(needs, capacity) -> np.ndarray:
    """`[n]` bool: rows that an empty pack can hold."""
    empty = np.full((1, capacity.rows), capacity.length)
    alone = (needs.views <= capacity.views) & (needs.targets <= capacity.targets)
    if needs.copies.shape[1] == 1:
        return alone & (needs.copies[:, 0] <= capacity.length)
    # Few kinds of rows differ in what they need, so that each is tried once.
    kinds, which = np.unique(needs.copies, axis=0, return_inverse=True)
    placed = np.array([place_copies(c[c > 0], empty)[1][0] < FULL for c in kinds], bool)
    return alone & placed[which.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Planned:
    """One pack.

    Attributes:
      members: `[m]` numbers of its rows, or `[m, 2]` (source, row).
      where: the pack's row for each copy of each member, longest copy first, one member after the other.
    """

    members: np.ndarray
    where: list[int]


def plan_packs(needs, capacity) -> list[Planned]:
    """Packs rows in windows of the stream, so that little is left unused.

    Args:
      needs: of the rows, in stream order; every row must fit into a pack of its own, see `fits`.
      capacity: of a pack.
    """
    if needs.copies.shape[1] == 1:
        return _single_copies(needs, capacity)
    return _best_fit(needs, capacity)


def _single_copies(needs, capacity):
    """Rows of a pack are filled first, then put together so that views are spread evenly over the packs."""
    packs, left = [], np.zeros(0, np.int64)
    lengths = needs.copies[:, 0]
    for first in range(0, len(needs), WINDOW):
        window = np.concatenate([left, np.arange(first, min(first + WINDOW, len(needs)))])
        rows = [window[row] for row in fill_rows(lengths[window], capacity.length)]
        more = first + WINDOW < len(needs) and len(window) < 4 * WINDOW
        full = [lengths[row].sum() >= 0.98 * capacity.length or not more for row in rows]
        # What did not fill a row waits for the next window.
        left = np.concatenate([np.zeros(0, np.int64), *(r for r, done in zip(rows, full, strict=True) if not done)])
        packs += _group_rows([r for r, done in zip(rows, full, strict=True) if done], needs, capacity)
    return packs


def _group_rows(rows, needs, capacity):
    """Packs of filled rows: those with most views first, each to the pack that lacks most."""
    parts = [part for row in rows for part in _within(row, needs, capacity)]
    takes = np.array([[1, needs.views[p].sum(), needs.targets[p].sum()] for p in parts]).reshape(-1, 3)
    empty = np.array([capacity.rows, capacity.views, capacity.targets])
    room = np.tile(empty, (-(-len(parts) // capacity.rows), 1))
    held = [[] for _ in room]
    for i in np.argsort(-takes[:, 1], kind="stable"):
        fitting = (room >= takes[i]).all(axis=1)
        pack = int(np.where(fitting, room[:, 1], -1).argmax())
        if not fitting.any():
            pack = len(held)
            held.append([])
            room = np.concatenate([room, empty[None]])
        room[pack] -= takes[i]
        held[pack].append(parts[i])
    return [Planned(np.concatenate(of), [n for n, row in enumerate(of) for _ in row]) for of in held if of]


def _within(row, needs, capacity):
    """Parts of a filled row, each with no more views and targets than a pack holds."""
    part, taken = [], np.zeros(2, np.int64)
    for member in row:
        takes = np.array([needs.views[member], needs.targets[member]])
        if part and (taken + takes > (capacity.views, capacity.targets)).any():
            yield np.array(part)
            part, taken = [], np.zeros(2, np.int64)
        part.append(member)
        taken += takes
    yield np.array(part)


def _best_fit(needs, capacity):
    """Longest first, each into the pack where its longest copy leaves the least room."""
    packs, members, where = [], [], []  # finished packs; the open ones
    free = np.zeros((0, capacity.rows), np.int64)
    views, targets = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for first in range(0, len(needs), WINDOW):
        window = np.arange(first, min(first + WINDOW, len(needs)))
        for row in window[np.argsort(-needs.copies[window].sum(axis=1), kind="stable")]:
            copies = needs.copies[row][needs.copies[row] > 0]
            after, left, rows = place_copies(copies, free)
            left = np.where((views >= needs.views[row]) & (targets >= needs.targets[row]), left, FULL)
            if not len(left) or left.min() == FULL:
                free = np.concatenate([free, np.full((1, capacity.rows), capacity.length, np.int64)])
                views, targets = np.append(views, capacity.views), np.append(targets, capacity.targets)
                members.append([])
                where.append([])
                after, left, rows = place_copies(copies, free)
                left[:-1] = FULL
            chosen = int(left.argmin())
            free[chosen] = after[chosen]
            views[chosen] -= needs.views[row]
            targets[chosen] -= needs.targets[row]
            members[chosen].append(row)
            where[chosen] += rows[:, chosen].tolist()
        keep = np.sort(np.argsort(-free.sum(axis=1), kind="stable")[:OPEN])
        packs += [Planned(np.array(members[i]), where[i]) for i in np.setdiff1d(np.arange(len(members)), keep)]
        members, where = [members[i] for i in keep], [where[i] for i in keep]
        free, views, targets = free[keep], views[keep], targets[keep]
    return packs + [Planned(np.array(m), w) for m, w in zip(members, where, strict=True)]


class Stream:
    """The endless stream of packs over one or several sources.

    Attributes:
      needs: of each source.
      weights: share of each source in the rows of a round.
      capacity: of a pack.
      seed: of all orders.
    """

    def __init__(self, needs, weights, capacity, seed, shuffle=True):
        """Raises ValueError for an empty source, or weights that are not positive."""
        if not all(len(n) for n in needs):
            raise ValueError("data.mixture: a source has no usable row")
        if min(weights) <= 0:
            raise ValueError(f"data.mixture: weights must be positive, got {list(weights)}")
        self.needs, self.capacity = list(needs), capacity
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)
        self.seed, self._shuffle = seed, shuffle
        self._ends = [0]  # packs before each round that was planned
        self._plans = {}  # of the latest rounds

    def __getitem__(self, position) -> Planned:
        """The pack at a global position, its members as (source, row)."""
        number = 0
        while position >= self._end(number):
            number += 1
        return self._round(number)[position - self._ends[number]]

    def usage(self, number=0):
        """Shares of positions and of views that the packs of a round use."""
        packs, c = self._round(number), self.capacity
        taken = self.drawn(np.concatenate([pack.members for pack in packs]))
        positions = taken.copies.sum() / (len(packs) * c.rows * c.length)
        return float(positions), float(taken.views.sum() / max(len(packs) * c.views, 1))

    def _end(self, number):
        while len(self._ends) <= number + 1:
            self._ends.append(self._ends[-1] + len(self._round(len(self._ends) - 1)))
        return self._ends[number + 1]

    def _round(self, number):
        if number not in self._plans:
            self._plans = {n: plan for n, plan in self._plans.items() if n == number - 1}
            self._plans[number] = self._plan_round(number)
        return self._plans[number]

    def _plan_round(self, number):
        rows = self.rows(number)
        packs = plan_packs(self.drawn(rows), self.capacity)
        order = _permutation(len(packs), self.seed, "packs", number) if self._shuffle else range(len(packs))
        return [Planned(rows[packs[i].members], packs[i].where) for i in order]

    def drawn(self, rows) -> Needs:
        """Needs of rows `[n, 2]` (source, row)."""
        copies = np.zeros((len(rows), max(n.copies.shape[1] for n in self.needs)), np.int64)
        views, targets = np.zeros((2, len(rows)), np.int64)
        for source, needs in enumerate(self.needs):
            at = rows[:, 0] == source
            some = needs.take(rows[at, 1])
            copies[at, : some.copies.shape[1]] = some.copies
            views[at], targets[at] = some.views, some.targets
        return Needs(copies, views, targets)

    def rows(self, number) -> np.ndarray:
        """Rows `[n, 2]` (source, row) of a round, in the order in which they are packed."""
        size = sum(len(n) for n in self.needs)
        drawn = []
        for source, needs in enumerate(self.needs):
            share = self.weights[source] * size
            first, last = round(share * number), round(share * (number + 1))
            if len(self.needs) == 1:
                first, last = size * number, size * (number + 1)
            drawn.append(np.stack([np.full(last - first, source), self._draws(source, first, last, len(needs))], 1))
        rows = np.concatenate(drawn)
        if self._shuffle and len(self.needs) > 1:
            rows = rows[_permutation(len(rows), self.seed, "mixture", number)]
        return rows

    def _draws(self, source, first, last, size):
        """Rows number `first` … `last` - 1 of a source's own stream, epoch after epoch, each in its own order."""
        parts = []
        for epoch in range(first // size, -(-last // size)):
            order = _permutation(size, self.seed, f"rows {source}", epoch) if self._shuffle else np.arange(size)
            begin = epoch * size
            parts.append(order[max(first - begin, 0) : last - begin])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def choose_capacity(needs, weights, length, seed, rows=(1, 2, 4, 8), views_step=1, sample=4096) -> Capacity:
    """Rows and views of a pack that leave the least unused, tried on a sample of the stream.

    More rows even out how many views stand in a pack; the fewest rows within one percent of the best are taken.

    Args:
      needs, weights, seed: as for `Stream`.
      length: positions of a row, all of which may be supervised.
      rows: numbers of rows to try.
      views_step: what the views are a multiple of.
      sample: rows of the stream to try on.

    Raises:
      ValueError: a pack of the most rows does not hold the longest row.
    """
    whole = Stream(needs, weights, Capacity(1, length, 0, 0), seed)
    some = whole.drawn(whole.rows(0)[:sample])
    most, found = int(some.views.max()), {}
    for r in rows:
        per_pack = some.views.sum() / some.copies.sum() * r * length
        for share in (0.85, 0.9, 0.95, 1.0, 1.05):
            capacity = Capacity(r, length, max(round(per_pack * share / views_step) * views_step, most), r * length)
            if capacity not in found and fits(some, capacity).all():
                packs = len(plan_packs(some, capacity))
                positions = some.copies.sum() / (packs * r * length)
                slots = some.views.sum() / (packs * capacity.views) if most else 1.0
                found[capacity] = min(positions, slots)
    if not found:
        raise ValueError(f"no pack of {max(rows)} rows of {length} positions holds the longest; raise data.length")
    best = max(found.values())
    return next(c for c in sorted(found, key=lambda c: (c.rows, -found[c])) if found[c] >= best - 0.01)


def _permutation(size, seed, what, number) -> np.ndarray:
    """A permutation that depends on its arguments alone; bit generators' raw output never changes with numpy."""
    key = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    return np.argsort(raw, kind="stable")


def scales_at(step, scales, per_step) -> tuple[int, ...]:
    """The scales that train at `step` when only `per_step` of them do: evenly spread, each equally often."""
    n = len(scales)
    return tuple(scales[i] for i in sorted({(step + j * n // per_step) % n for j in range(per_step)}))
