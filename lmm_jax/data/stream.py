"""Which records stand at which global position: a pure function of (seed, data, position), from lengths alone.

    datasets      prepared folders, each read epoch after epoch in a new order
                      dataset 0:  2 0 3 1 | 1 3 0 2 | …
                      dataset 1:  0 1 | 1 0 | …
                         │  drawn by weight and mixed, as many in a round as there are records in all datasets
    records       round 0:  (0, 2) (1, 0) (0, 0) (0, 3) (1, 1) (0, 1)        (dataset, record)
                         │  `packing.plan_packs`: copies to rows, rows to packs
    packs         {(0, 2) (1, 0)}  {(0, 3) (0, 0)}  {(1, 1) (0, 1)}
                         │  shuffled
    positions     0  1  2 | 3  4  5  6 | …          the packs of round 0, of round 1, …
                         │  packs of a step
    steps         0       | 1       | …

Where pictures have canvases of several shapes, those of a step have one: packs are planned for each canvas apart, and
shuffled as steps. The last step of each canvas in a round is filled up with packs without records.

Of one dataset a round is an epoch. Nothing but the position is needed to resume, and hosts may be of any number: each
asks for the positions that its devices hold.
"""

import hashlib
import threading

import numpy as np

from lmm_jax.data.packing import Capacity, Needs, PlannedPack, fits, plan_packs, usage

# Reader threads, and the loop that asks how far it is, plan rounds of one stream; one at a time. It is not the
# stream's own, as a stream is handed to reader processes.
PLANNING = threading.RLock()

VIEW_SHARES = (0.85, 0.9, 0.95, 1.0, 1.05)  # of the views that go with a pack's positions: what is tried


class Mixture:
    """The records of one or several datasets, drawn by weight, round after round.

    Attributes:
      needs: of the records of each dataset.
      weights: share of each dataset in the records of a round.
      seed: of all orders.
      shuffle: whether the orders are random; if not, each dataset is read as it lies, one after the other.
    """

    def __init__(self, needs, weights, seed, shuffle=True):
        """Raises ValueError for an empty dataset, or weights that are not positive."""
        if not all(len(n) for n in needs):
            raise ValueError("data.mixture: a dataset has no usable record")
        if min(weights) <= 0:
            raise ValueError(f"data.mixture: weights must be positive, got {list(weights)}")
        self.needs, self.seed, self.shuffle = list(needs), seed, shuffle
        self.weights = np.asarray(weights, np.float64) / np.sum(weights)

    def drawn(self, number) -> np.ndarray:
        """Records `[n, 2]` (dataset, record) of round `number`, in the order in which they are packed."""
        size = sum(len(n) for n in self.needs)
        parts = []
        for dataset, weight in enumerate(self.weights):
            share = weight * size  # records a round, not always a whole number
            records = self._from_epochs(dataset, round(share * number), round(share * (number + 1)))
            parts.append(np.stack([np.full(len(records), dataset), records], axis=1))
        drawn = np.concatenate(parts)
        if self.shuffle and len(parts) > 1:
            drawn = drawn[_permutation(len(drawn), self.seed, "mixture", number)]
        return drawn

    def needs_of(self, drawn) -> Needs:
        """Needs of records `[n, 2]` (dataset, record), with as many columns of copies as any dataset has."""
        copies = np.zeros((len(drawn), max(n.copies.shape[1] for n in self.needs)), np.int64)
        views, targets, bucket = np.zeros((3, len(drawn)), np.int64)
        for dataset, needs in enumerate(self.needs):
            at = drawn[:, 0] == dataset
            some = needs.take(drawn[at, 1])
            copies[at, : some.copies.shape[1]] = some.copies
            views[at], targets[at], bucket[at] = some.views, some.targets, some.bucket
        return Needs(copies, views, targets, bucket)

    def _from_epochs(self, dataset, first, last):
        """Records number `first` … `last` - 1 of a dataset that is read epoch after epoch."""
        size, parts = len(self.needs[dataset]), [np.zeros(0, np.int64)]
        for epoch in range(first // size, -(-last // size)):
            begin = epoch * size
            parts.append(self._epoch(dataset, epoch)[max(first - begin, 0) : last - begin])
        return np.concatenate(parts)

    def _epoch(self, dataset, epoch):
        size = len(self.needs[dataset])
        # "rows" is part of what the order is derived from: with another word every stream would be another.
        return _permutation(size, self.seed, f"rows {dataset}", epoch) if self.shuffle else np.arange(size)


class Stream:
    """The endless stream of packs over one or several datasets.

    Attributes:
      mixture: `Mixture` that the records are drawn from.
      capacity: of a pack.
      per_step: packs of a step, which have one canvas.
    """

    def __init__(self, needs, weights, capacity, seed, shuffle=True, per_step=1):
        """Args: see `Mixture` and `packing.Capacity`; raises what `Mixture` does."""
        self.mixture, self.capacity, self.per_step = Mixture(needs, weights, seed, shuffle), capacity, per_step
        self._ends = [0]  # packs before each round that was planned
        self._plans = {}  # of the latest rounds

    def __getitem__(self, position) -> PlannedPack:
        """The pack at a global position, its members as (dataset, record)."""
        with PLANNING:
            number = self._round_of(position)
            return self._round(number)[position - self._ends[number]]

    def usage(self, number=0) -> tuple[float, float]:
        """Shares of positions and of views that the packs of a round use."""
        packs = self.round(number)
        needs = self.mixture.needs_of(np.concatenate([pack.members for pack in packs]))
        return usage(needs, packs, self.capacity)

    def round(self, number) -> list[PlannedPack]:
        """The packs of a round in order, their members as (dataset, record)."""
        with PLANNING:
            return self._round(number)

    def records_per_pack(self) -> float:
        """Records that a pack of the first round holds on average."""
        packs = self.round(0)
        return sum(len(pack.members) for pack in packs) / len(packs)

    def epoch(self, position) -> float:
        """How often the stream has read all records before a global position: rounds, and the share of the last."""
        with PLANNING:
            number = self._round_of(position)
            first, end = self._ends[number : number + 2]
        return number + (position - first) / (end - first)

    def _round_of(self, position) -> int:
        """The round that a global position lies in; its end is known then."""
        number = 0
        while position >= self._end(number):
            number += 1
        return number

    def _end(self, number):
        """The position behind the last pack of a round."""
        while len(self._ends) <= number + 1:
            self._ends.append(self._ends[-1] + len(self._round(len(self._ends) - 1)))
        return self._ends[number + 1]

    def _round(self, number):
        """Packs of a round in order; this one and the one before are kept."""
        if number not in self._plans:
            self._plans = {n: plan for n, plan in self._plans.items() if n == number - 1}
            self._plans[number] = self._plan_round(number)
        return self._plans[number]

    def _plan_round(self, number):
        drawn = self.mixture.drawn(number)
        needs = self.mixture.needs_of(drawn)
        if len(np.unique(np.concatenate([some.bucket for some in self.mixture.needs]))) > 1:
            return self._plan_buckets(number, drawn, needs)
        packs = self._shuffled(plan_packs(needs, self.capacity), "packs", number)
        bucket = int(needs.bucket[0])
        return [PlannedPack(drawn[pack.members], pack.rows, bucket) for pack in packs]

    def _plan_buckets(self, number, drawn, needs):
        """As `_plan_round` where there are several canvases: a list of whole steps."""
        steps = []
        for bucket in np.unique(needs.bucket).tolist():
            at = np.flatnonzero(needs.bucket == bucket)
            packs = self._shuffled(plan_packs(needs.take(at), self.capacity), f"packs {bucket}", number)
            packs = [PlannedPack(drawn[at[pack.members]], pack.rows, bucket) for pack in packs]
            copies = needs.copies.shape[1]
            nothing = PlannedPack(np.zeros((0, 2), np.int64), np.zeros((0, copies), np.int64), bucket)
            packs += [nothing] * (-len(packs) % self.per_step)
            steps += [packs[i : i + self.per_step] for i in range(0, len(packs), self.per_step)]
        return [pack for step in self._shuffled(steps, "steps", number) for pack in step]

    def _shuffled(self, items, what, number):
        """`items` in an order of their own, where the stream has any."""
        if not self.mixture.shuffle:
            return items
        return [items[i] for i in _permutation(len(items), self.mixture.seed, what, number)]


def choose_capacity(needs, weights, length, seed, rows=(1, 2, 4, 8), views_step=1, sample=4096) -> Capacity:
    """Rows and views of a pack that leave the least unused, tried on a sample of the stream.

    More rows even out how many views stand in a pack; the fewest rows within one percent of the best are taken.

    Args:
      needs, weights, seed: as for `Mixture`.
      length: positions of a row, all of which may be supervised.
      rows: numbers of rows to try.
      views_step: pictures bring a multiple of this many views (a picture with four tiles five), so that a pack's room
        for views is one too.
      sample: records of the stream to try on.

    Raises:
      ValueError: a pack of the most rows does not hold the longest record.
    """
    mixture = Mixture(needs, weights, seed)
    some = mixture.needs_of(mixture.drawn(0)[:sample])
    most_views = int(some.views.max())
    used = {}  # of each capacity that holds every record, the share of what it uses least
    for number in rows:
        even = some.views.sum() / some.copies.sum() * number * length  # views beside positions that are all used
        for share in VIEW_SHARES:
            views = max(round(even * share / views_step) * views_step, most_views)
            capacity = Capacity(number, length, views, number * length)
            if capacity in used or not fits(some, capacity).all():
                continue
            of_positions, of_views = usage(some, plan_packs(some, capacity), capacity)
            used[capacity] = min(of_positions, of_views) if most_views else of_positions
    if not used:
        raise ValueError(f"no pack of {max(rows)} rows of {length} positions holds the longest; raise data.length")
    good = [capacity for capacity in used if used[capacity] >= max(used.values()) - 0.01]
    return min(good, key=lambda capacity: (capacity.rows, -used[capacity]))


def _permutation(size, seed, what, number) -> np.ndarray:
    """A permutation that depends on its arguments alone; bit generators' raw output never changes with numpy."""
    key = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()[:16]
    raw = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(size)
    return np.argsort(raw, kind="stable")


def scales_at(step, scales, per_step) -> tuple[int, ...]:
    """The scales that train at `step` when only `per_step` of them do: evenly spread, each equally often."""
    n = len(scales)
    return tuple(scales[i] for i in sorted({(step + j * n // per_step) % n for j in range(per_step)}))
