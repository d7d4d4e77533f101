"""Packs of a batch, read and laid out: every host loads the ones that its devices hold.

A record is named by two numbers, (dataset, record): the prepared folder among those of `data.mixture`, and the
record in it. `stream` says which records stand in the pack at a position; here they are read, opened into segments
and views, and put together by `PackLayout.assemble`.
"""

import ctypes
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from lmm_jax.data.counts import NO_LENGTH, Counts, count_records, needs_of
from lmm_jax.data.images import open_picture
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.packing import Capacity, Needs, fits
from lmm_jax.data.prepared import Prepared, as_turns
from lmm_jax.data.questions import PlacedQuestion
from lmm_jax.data.segments import Segment, blank
from lmm_jax.data.stream import Stream, choose_capacity, scales_at


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared folder of the stream, and what is planned with of its records.

    Attributes:
      data: the `Prepared` split.
      counts: what each record takes.
      needs: what each record takes in a pack.
      used: `[n]` numbers of the records that stand in the stream, which counts them 0 … n - 1.
      no_token: what keeps a picture from having a visual token, `VisualLayout.no_token`.
    """

    data: Prepared
    counts: Counts
    needs: Needs
    used: np.ndarray
    no_token: str

    @property
    def needs_used(self) -> Needs:
        """Needs of the records that stand in the stream."""
        return self.needs.take(self.used)

    @property
    def left_out(self) -> np.ndarray:
        """Numbers of the other records."""
        return np.setdiff1d(np.arange(len(self.data)), self.used)

    @property
    def name(self) -> str:
        """Folder and split, for messages."""
        return f"{self.data.folder} ({self.data.split})"

    def held_by(self, capacity):
        """This dataset with those of its used records that fit into a pack."""
        return dataclasses.replace(self, used=self.used[fits(self.needs_used, capacity)])

    def why_left_out(self, capacity) -> dict[str, np.ndarray]:
        """Numbers of the records that are left out, by reason; a reason names the field that binds.

        Args:
          capacity: of a pack.
        """
        counts, needs = self.counts, self.needs
        out = np.zeros(len(needs), bool)
        out[self.left_out] = True
        tests = {
            "no answer of an assistant is supervised": counts.needed == NO_LENGTH,
            self.no_token: counts.thin,
            f"longer than data.length={capacity.length} positions": counts.needed > capacity.length,
            f"more pictures than data.views={capacity.views} views hold": needs.views > capacity.views,
            f"more supervised tokens than data.targets={capacity.targets}": needs.targets > capacity.targets,
            f"its copies do not fit data.rows={capacity.rows} rows of {capacity.length} positions": out,
        }
        found = {}
        for reason, holds in tests.items():
            found[reason] = np.flatnonzero(out & holds)
            out = out & ~holds
        return {reason: records for reason, records in found.items() if len(records)}

    def length_that_holds(self, share) -> int:
        """Positions that a row must have for a share of the records to fit; of those that fit any length at all."""
        needed = np.sort(self.counts.needed[(self.counts.needed != NO_LENGTH) & ~self.counts.thin])
        return int(needed[min(math.ceil(share * len(needed)), len(needed)) - 1]) if len(needed) else 0

    def all_answers(self, record) -> int:
        """Answers of a record, those behind a cut included."""
        first, last = self.data.index["turn_offsets"][record : record + 2]
        return int(last - first)

    def all_sizes(self, record) -> list[tuple[int, int]]:
        """`(width, height)` of all pictures of a record, pixels."""
        first, last = self.data.index["image_offsets"][record : record + 2]
        return list(map(tuple, self.data.index["image_sizes"][first:last].tolist()))

    def sizes(self, record) -> list[tuple[int, int]]:
        """`(width, height)` of the pictures of a record that are left after a cut, pixels."""
        return self.all_sizes(record)[: self.counts.pictures[record]]

    def lengths(self, record, scale_numbers) -> list[int]:
        """Positions of a record's copies at some of the bank's scales, from the index alone; of text alone one."""
        lengths = self.counts.positions[record, scale_numbers].tolist()
        return lengths if self.counts.pictures[record] else lengths[:1]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A record as it goes into a pack.

    Attributes:
      segments: its copies, one for each scale that trains; blank ones if it could not be read.
      pictures: `(width, height)` and views of each, as `PackLayout.assemble` takes them; None for views if it could
        not be read.
      questions: what a router reads of it; none where the model has no router, or the record no picture.
      fault: why it could not be read, see `Packs.__getitem__`, or None.
    """

    segments: list[Segment]
    pictures: list[tuple]
    questions: list[PlacedQuestion] = dataclasses.field(default_factory=list)
    fault: dict | None = None


class Packs:
    """Random access to the packs of an endless stream over prepared folders.

    What stands at a global position is a pure function of the data, the seed and the position. A record that cannot
    be read, decoded or laid out is replaced by padding of the length that was planned for it, so that it moves no
    other and belongs to no loss group; it is reported with its pack.

    Attributes:
      datasets: a `Dataset` for each prepared folder.
      layout: `PackLayout` of a pack; of several canvases that of the largest.
      layouts: that of each canvas, see `VisualLayout.buckets`.
      stream: `stream.Stream` over the records that are used.
      per_step: packs of a global batch.
    """

    def __init__(self, config, visual, split, packs_per_step, shuffle):
        """Plans the stream.

        Args:
          config: of the run.
          visual: its `VisualLayout`, see `config.visual_layout`.
          split: of the prepared folders.
          packs_per_step: packs of a global batch, micro-batches included.
          shuffle: whether records and packs come in an order of their own in each round.

        Raises:
          FileNotFoundError, ValueError: data that is not there, does not agree, or of which more than the share
            `data.max_left_out` cannot be used.
        """
        data, scales = config.data, tuple(config.model.scales)
        mixture = tuple(data.mixture) or ((data.path, 1.0),)
        weights = [weight for _, weight in mixture]
        # The sets of scales that train together; the rotation begins again after the last.
        self._phases = [scales_at(i, scales, config.train.scales_per_step or len(scales)) for i in range(len(scales))]

        def counted(prepared):
            counts = count_records(prepared.index, visual, scales, data.length, cut=data.too_long == "cut")
            needs = needs_of(counts, scales, self._phases)
            return Dataset(prepared, counts, needs, np.flatnonzero(counts.usable), visual.no_token)

        prepared = [Prepared(path, split) for path, _ in mixture]
        visual = visual.with_marks(prepared[0].tokenizer)
        _check_agreement(prepared, data.template)
        datasets = list(map(counted, prepared))
        for dataset in datasets:
            if not len(dataset.used):
                _refuse(dataset, Capacity(data.rows or 1, data.length, data.views or 0, data.targets or 0), 0.0)
        capacity = _capacity(data, [d.needs_used for d in datasets], weights, config.seed, visual.views_step)
        self.datasets = [d.held_by(capacity) for d in datasets]
        for dataset in self.datasets:
            share = data.max_left_out if len(dataset.used) else 0.0
            if len(dataset.left_out) > share * len(dataset.data):
                _refuse(dataset, capacity, share)
        self.per_step = packs_per_step
        needs = [d.needs_used for d in self.datasets]
        self.stream = Stream(needs, weights, capacity, config.seed, shuffle, packs_per_step)
        self._visual = visual
        questions = self._most_questions() if config.model.router.width else 0
        layouts = [PackLayout.from_config(config, bucket, capacity) for bucket in visual.buckets]
        self.layouts = [dataclasses.replace(layout, questions=questions) for layout in layouts]
        self.layout = max(self.layouts, key=lambda layout: layout.bytes)
        self._first_number = np.cumsum([0, *map(len, self.data)])  # of each dataset's records, see `record_index`
        self._known = None, False  # a step, and whether its batch has a picture

    def _most_questions(self) -> int:
        """The most questions of a pack of the first round that a router can learn from, at least one.

        Should a pack of a later round have more, a router does not learn from the last of them.
        """
        asked = [np.where(d.counts.pictures > 0, d.counts.answers, 0)[d.used] for d in self.datasets]
        return max(1, *(sum(int(asked[d][n]) for d, n in pack.members) for pack in self.stream.round(0)))

    @property
    def data(self) -> list[Prepared]:
        """The `Prepared` split of each dataset."""
        return [d.data for d in self.datasets]

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """`(dataset, record)` of what does not fit into a pack, has no answer, or a picture without tokens."""
        return [(number, int(record)) for number, d in enumerate(self.datasets) for record in d.left_out]

    def why_left_out(self) -> list[tuple[int, int, str]]:
        """`(dataset, record, reason)` of each of them."""
        return [
            (number, int(record), reason)
            for number, d in enumerate(self.datasets)
            for reason, records in d.why_left_out(self.stream.capacity).items()
            for record in records
        ]

    @property
    def tokenizer(self):
        """The tokenizer of all datasets."""
        return self.data[0].tokenizer

    @property
    def records_per_step(self) -> float:
        """Records that the packs of a step hold, on average over the first round of the stream."""
        return self.per_step * self.stream.records_per_pack()

    def state(self) -> dict:
        """What, beside the position, decides the stream; JSON."""
        mixture = self.stream.mixture
        return {
            "data": [d.fingerprint for d in self.data],
            "weights": [float(w) for w in mixture.weights],
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.layout.template,
            "visual_layout": json.loads(json.dumps(dataclasses.asdict(self._visual) | {"mark_ids": None})),
            "seed": mixture.seed,
            "capacity": list(dataclasses.astuple(self.stream.capacity)),
            "scales": [list(phase) for phase in self._phases],
            "packs_per_step": self.per_step,
        }

    def members(self, position) -> list[tuple[int, int]]:
        """`(dataset, record)` of the records of a pack."""
        return [(int(dataset), int(self.datasets[dataset].used[n])) for dataset, n in self.stream[position].members]

    def sizes(self, dataset, record) -> list[tuple[int, int]]:
        """`(width, height)` of the pictures of a record that are left after a cut, pixels."""
        return self.datasets[dataset].sizes(record)

    def name(self, dataset, record) -> str:
        """Folder and number of a record, for messages."""
        return f"{self.datasets[dataset].name} record {record}"

    def __getitem__(self, position):
        """The pack at a global position: arrays as `PackLayout.assemble` gives them, and for the host

        record_index: `[records]` int64, records numbered on over the datasets.
        bad: `[records]` bool, those that were replaced.
        faults: list of dicts (position, file, record, id, reason) of each of them.

        What is of pictures, `OF_PICTURES`, is left out where no pack of the whole global batch has one.
        """
        step, planned = position // self.per_step, self.stream[position]
        members, layout = self.members(position), self.layout_at(position)
        loaded = self._load_all(layout, members, self._phases[step % len(self._phases)], position)
        segments, row_of = [], []
        for record, rows in zip(loaded, planned.rows, strict=True):
            # Rows are planned for the copies of any step, longest first: none of this step's is longer.
            copies = sorted(record.segments, key=len, reverse=True)
            segments += copies
            row_of += rows[: len(copies)].tolist()
        pictures = [picture for record in loaded for picture in record.pictures]
        questions = [question for record in loaded for question in record.questions]
        out = layout.assemble(segments, pictures, row_of, questions)
        if not self._shows_pictures(step):
            out = {name: x for name, x in out.items() if name not in OF_PICTURES}
        return out | {
            "record_index": np.array([self._first_number[dataset] + record for dataset, record in members], np.int64),
            "bad": np.array([record.fault is not None for record in loaded], bool),
            "faults": [record.fault for record in loaded if record.fault is not None],
        }

    def layout_at(self, position) -> PackLayout:
        """The layout of the pack at a global position: that of its canvas."""
        return self.layouts[self.stream[position].bucket]

    def _load_all(self, layout, members, scales, position) -> list[Loaded]:
        """The records of a pack; each has its grids and its questions behind those of the one before."""
        visual, loaded, first_grid, first_question = layout.visual, [], 0, 0
        for dataset, record in members:
            loaded.append(self._load(layout, dataset, record, scales, first_grid, first_question, position))
            first_question += len(loaded[-1].questions)
            sizes = self.sizes(dataset, record)
            first_grid += sum(visual.grids_of_tiling(visual.tiling(*size)) for size in sizes)
        return loaded

    def _load(self, layout, dataset, record, scales, first_grid, first_question, position) -> Loaded:
        """A record of a pack, or blank segments of the lengths that were planned for it."""
        try:
            return self._read(layout, dataset, record, scales, first_grid, first_question)
        except Exception as error:  # whatever is wrong with one record must not end or move the stream
            blanks = [blank(length) for length in self._lengths(dataset, record, scales)]
            unseen = [(size, None) for size in self.sizes(dataset, record)]
            return Loaded(blanks, unseen, fault=self._fault(position, dataset, record, error))

    def _read(self, layout, dataset, record, scales, first_grid, first_question) -> Loaded:
        """Reads a record and lays it out; raises whatever is wrong with it."""
        sizes, stored = self.sizes(dataset, record), self.data[dataset][record]
        all_sizes, turns = self.datasets[dataset].all_sizes(record), as_turns(stored)
        segments = layout.training_segments(turns, all_sizes, self.tokenizer, scales, first_grid, first_question)
        pictures = [open_picture(data) for data in stored["images"][: len(sizes)]]
        lengths = [len(segment) for segment in segments]
        if lengths != self._lengths(dataset, record, scales) or [picture.size for picture in pictures] != sizes:
            raise ValueError("the record is not the one that was counted when the data was prepared")
        seen = [(picture.size, layout.see(picture)) for picture in pictures]
        if not layout.questions or not pictures:
            return Loaded(segments, seen)
        questions = layout.training_questions(turns, all_sizes, self.tokenizer, first_grid)
        return Loaded(segments, seen, questions[: self.datasets[dataset].counts.answers[record]])

    def _lengths(self, dataset, record, scales):
        """Positions of each copy, as they were counted."""
        return self.datasets[dataset].lengths(record, [self.layout.scales.index(scale) for scale in scales])

    def _fault(self, position, dataset, record, error):
        try:
            name = self.data[dataset][record]["id"].decode()
        except Exception:  # the record itself is unreadable
            name = ""
        return {
            "position": int(position),
            "file": str(self.data[dataset].folder),
            "record": record,
            "id": name,
            "reason": f"{type(error).__name__}: {error}",
        }

    def _shows_pictures(self, step):
        """Whether any pack of a global batch has a picture; kept for the next pack, mostly of the same batch."""
        known, shows = self._known
        if known != step:
            positions = range(step * self.per_step, (step + 1) * self.per_step)
            members = (member for position in positions for member in self.members(position))
            shows = any(self.datasets[dataset].counts.pictures[record] for dataset, record in members)
            self._known = step, shows
        return shows


def _refuse(dataset, capacity, share):
    """Raises ValueError for a dataset of which too much is left out: how much, why, and what to set instead."""
    reasons = {reason: len(records) for reason, records in dataset.why_left_out(capacity).items()}
    told = "; ".join(f"{count:,} {reason}" for reason, count in reasons.items())
    usable = f"{len(dataset.left_out):,} of {len(dataset.data):,} records cannot be used"
    more = f", more than a share of data.max_left_out={share:g}" if len(dataset.used) else ""
    remedies = []
    if any("data.length" in reason for reason in reasons):
        remedies.append(f"data.length={dataset.length_that_holds(0.99)} would hold 99 % of them")
        if len(dataset.used):
            remedies.append("data.too_long=cut uses each up to the last answer that fits")
    if any("data.rows" in reason for reason in reasons):
        remedies.append(f"data.rows={dataset.needs.copies.shape[1]} has a row for each copy")
    if any("data.views" in reason for reason in reasons):
        remedies.append(f"data.views={int(dataset.needs.views.max())} would hold the pictures of all")
    if any("data.targets" in reason for reason in reasons):
        remedies.append(f"data.targets={int(dataset.needs.targets.max())} would hold all supervised tokens")
    if len(dataset.used):
        remedies.append("data.max_left_out=1 trains on the rest")
    raise ValueError(f"{dataset.name}: {usable}{more}: {told}. " + "; ".join(remedies))


def _capacity(data, needs, weights, seed, views_step):
    """What the config says a pack holds; the planner chooses what it leaves open."""
    if data.rows and data.views is not None:
        return Capacity(data.rows, data.length, data.views, data.targets or data.rows * data.length)
    rows = (data.rows,) if data.rows else (1, 2, 4, 8)
    return choose_capacity(needs, weights, data.length, seed, rows, views_step)


def _check_agreement(prepared, template):
    """Datasets must agree on tokenizer and template, which their stored lengths depend on."""
    for data in prepared:
        if data.tokenizer.fingerprint != prepared[0].tokenizer.fingerprint:
            raise ValueError(f"data.mixture: {data.folder} and {prepared[0].folder} have different tokenizers")
        if data.about["template"] != template:
            raise ValueError(
                f"{data.folder} was prepared with template '{data.about['template']}', data.template is '{template}'"
            )


OF_PICTURES = ("pixels", "gather", "extent", "question", "question_grids", "answer")  # of a batch
OF_PICTURES += ("blend_slot", "blend_share")
HOST_ONLY = ("record_index", "bad", "faults")  # of a batch; the rest goes to the devices


def collate(packs):
    """Stacks packs; `record_index` is filled up with -1 and `bad` with False, `faults` become one list."""
    out = {name: np.stack([p[name] for p in packs]) for name in packs[0] if name not in HOST_ONLY}
    most = max(len(p["record_index"]) for p in packs)
    for name, fill in (("record_index", -1), ("bad", False)):
        out[name] = np.stack([np.pad(p[name], (0, most - len(p[name])), constant_values=fill) for p in packs])
    return out | {"faults": [fault for p in packs for fault in p["faults"]]}


def batches(packs, local, start, stop, threads, workers):
    """Iterates this host's part of the global batches `start` … `stop` - 1.

    Args:
      packs: `Packs`.
      local: numbers `[n]` of this host's packs within a global batch, as `sharding.local_packs` gives them.
      start: first step; resuming needs no other state.
      stop: step to end before.
      threads: reader threads.
      workers: reader processes, 0 reads in this process.

    Returns:
      an iterator to `close` if it is not read to its end. It gives dicts of numpy arrays `[n, …]`, and what
      `HOST_ONLY` names: see `Packs` and `collate`.
    """

    def load(i):
        step, k = divmod(int(i), len(local))
        return packs[step * packs.per_step + int(local[k])]

    # A range, not a slice, so that a resumed stream reads nothing of what came before.
    stream = grain.MapDataset.range(start * len(local), stop * len(local)).map(load)
    stream = stream.batch(len(local), batch_fn=collate)
    stream = stream.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes ask for flags, which absl's own programs parse
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers)
        return _read_by_processes(stream.mp_prefetch(options, worker_init_fn=_end_with_parent))
    return iter(stream)


OF_THE_RUN = {signal.SIGINT, signal.SIGTERM}  # signals at which a run saves, for which it needs its readers


def _read_by_processes(stream):
    """The batches of a stream whose reader processes leave Ctrl-C and SIGTERM to this process.

    A terminal, or a scheduler, sends them to all processes of a run. Readers start with the first batch, and have the
    mask of what starts them; this process misses nothing meanwhile, what comes in waits.
    """
    resource_tracker.ensure_running()  # of Python's own; when it starts it takes the mask away
    old = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_RUN)
    try:
        iterator = iter(stream)
        first = list(itertools.islice(iterator, 1))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    try:
        yield from first
        yield from iterator
    finally:
        iterator.close()


KILLED_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


def _end_with_parent(*_):
    """Ends this reader process if the process that started it ends, also one that is killed.

    Linux does it when asked to; elsewhere a thread waits for the end of a pipe that the other process holds open.
    """
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILLED_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent.pid:  # it ended before it was asked for
            os._exit(1)
