"""Packs of a batch, read and laid out: every host loads the ones that its devices hold."""

import dataclasses
import json

import grain
import numpy as np
from absl import flags

from lmm_jax.data.counts import count_rows, needs_of
from lmm_jax.data.images import open_picture
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.prepared import Prepared, as_turns
from lmm_jax.data.segments import blank
from lmm_jax.data.stream import Capacity, Stream, choose_capacity, fits, scales_at


class Packs:
    """Random access to the packs of an endless stream over prepared folders.

    What stands at a global position is a pure function of the data, the seed and the position. A record that cannot
    be read, decoded or laid out is replaced by padding of the length that was planned for it, so that it moves no
    other and belongs to no loss group; it is reported with its pack.

    Attributes:
      data: the `Prepared` split of each source.
      layout: `PackLayout` of a pack.
      stream: `stream.Stream` over the usable rows.
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
          FileNotFoundError, ValueError: data that is not there, does not agree, or does not fit into a pack.
        """
        data, scales = config.data, tuple(config.model.scales)
        sources = tuple(data.mixture) or ((data.path, 1.0),)
        self.data = [Prepared(path, split) for path, _ in sources]
        _check_sources(self.data, data.template)
        self.per_step = packs_per_step
        # The sets of scales that train together; the rotation begins again after the last.
        self._phases = [scales_at(i, scales, config.train.scales_per_step or len(scales)) for i in range(len(scales))]
        cut = data.too_long == "cut"
        self._counts = [count_rows(d.index, visual, scales, data.length, cut) for d in self.data]
        self._needs = [needs_of(counts, scales, self._phases) for counts in self._counts]
        weights = [weight for _, weight in sources]
        usable = [np.flatnonzero(counts.usable) for counts in self._counts]
        capacity = _capacity(
            data,
            [n.take(rows) for n, rows in zip(self._needs, usable, strict=True)],
            weights,
            config.seed,
            visual.views_step,
        )
        self._rows = [rows[fits(n.take(rows), capacity)] for n, rows in zip(self._needs, usable, strict=True)]
        for d, n, rows in zip(self.data, self._needs, self._rows, strict=True):
            if not len(rows):
                pack = f"{capacity.rows} × {capacity.length} positions, {capacity.targets} of them supervised"
                raise ValueError(
                    f"{d.folder} ({split}): none of {len(n)} rows fits a pack of {pack}, and {capacity.views} views; "
                    "raise data.length or data.views"
                )
        needs = [n.take(rows) for n, rows in zip(self._needs, self._rows, strict=True)]
        self.stream = Stream(needs, weights, capacity, config.seed, shuffle)
        self.layout = PackLayout.from_config(config, visual, capacity)
        self._first = np.cumsum([0, *map(len, self.data)])
        self._known = None, False  # a step, and whether its batch has a picture

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """`(source, row)` of the rows that do not fit into a pack, have no answer, or a picture without tokens."""
        rows = (np.setdiff1d(np.arange(len(d)), used) for d, used in zip(self.data, self._rows, strict=True))
        return [(source, int(row)) for source, missing in enumerate(rows) for row in missing]

    @property
    def tokenizer(self):
        """The tokenizer of all sources."""
        return self.data[0].tokenizer

    def state(self) -> dict:
        """What, beside the position, decides the stream; JSON."""
        s = self.stream
        return {
            "data": [d.fingerprint for d in self.data],
            "weights": [float(w) for w in s.weights],
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.layout.template,
            "visual_layout": json.loads(json.dumps(dataclasses.asdict(self.layout.visual))),  # without tuples
            "seed": s.seed,
            "capacity": list(dataclasses.astuple(s.capacity)),
            "scales": [list(phase) for phase in self._phases],
            "packs_per_step": self.per_step,
        }

    def members(self, position) -> list[tuple[int, int]]:
        """`(source, row)` of the records of a pack."""
        return [(int(source), int(self._rows[source][i])) for source, i in self.stream[position].members]

    def sizes(self, source, row) -> list[tuple[int, int]]:
        """`(width, height)` of the pictures of a record that are left after a cut, pixels."""
        return self._sizes(source, row)[: self._counts[source].pictures[row]]

    def name(self, source, row) -> str:
        """Folder and row of a record, for messages."""
        return f"{self.data[source].folder} ({self.data[source].split}) row {row}"

    def __getitem__(self, position):
        """The pack at a global position: arrays as `PackLayout.assemble` gives them, and for the host

        record_index: `[records]` int64, rows numbered on over the sources.
        bad: `[records]` bool, those that were replaced.
        faults: list of dicts (position, file, row, id, reason) of each of them.

        Pixels, gather and extent are left out where no pack of the whole global batch has a picture.
        """
        step = position // self.per_step
        scales = self._phases[step % len(self._phases)]
        where = iter(self.stream[position].where)
        segments, rows, pictures, numbers, bad, faults = [], [], [], [], [], []
        visual, grid = self.layout.visual, 0
        for source, row in self.members(position):
            numbers.append(self._first[source] + row)
            sizes = self.sizes(source, row)
            try:
                mine, pixels = self._read(source, row, scales, grid)
                bad.append(False)
            except Exception as error:  # whatever is wrong with one record must not end or move the stream
                mine, pixels = list(map(blank, self._lengths(source, row, scales))), [None] * len(sizes)
                faults.append(self._fault(position, source, row, error))
                bad.append(True)
            # In the rows that were planned: the copies of this step may be shorter, but none is longer.
            segments += sorted(mine, key=len, reverse=True)
            rows += [next(where) for _ in range((self._needs[source].copies[row] > 0).sum())][: len(mine)]
            pictures += zip(sizes, pixels, strict=True)
            grid += sum(visual.grids(visual.tiling(*size)) for size in sizes)
        out = self.layout.assemble(segments, pictures, rows)
        if not self._shows(step):
            out = {name: x for name, x in out.items() if name not in ("pixels", "gather", "extent")}
        return out | {"record_index": np.array(numbers, np.int64), "bad": np.array(bad), "faults": faults}

    def _read(self, source, row, scales, grid):
        record, sizes = self.data[source][row], self._sizes(source, row)
        segments = self.layout.training_segments(as_turns(record), sizes, self.tokenizer, scales, grid)
        pictures = [open_picture(data) for data in record["images"][: self._counts[source].pictures[row]]]
        found = [picture.size for picture in pictures]
        if [len(s) for s in segments] != self._lengths(source, row, scales) or found != self.sizes(source, row):
            raise ValueError("the record is not the one that was counted when the data was prepared")
        return segments, [self.layout.see(picture) for picture in pictures]

    def _sizes(self, source, row):
        """Sizes of all pictures of a record."""
        index = self.data[source].index
        first, last = index["image_offsets"][row : row + 2]
        return list(map(tuple, index["image_sizes"][first:last].tolist()))

    def _lengths(self, source, row, scales):
        """Positions of each copy, from the index alone."""
        counts = self._counts[source]
        lengths = [int(counts.positions[row, self.layout.scales.index(scale)]) for scale in scales]
        return lengths if counts.pictures[row] else lengths[:1]

    def _fault(self, position, source, row, error):
        try:
            name = self.data[source][row]["id"].decode()
        except Exception:  # the record itself is unreadable
            name = ""
        reason = f"{type(error).__name__}: {error}"
        return {
            "position": int(position),
            "file": str(self.data[source].folder),
            "row": row,
            "id": name,
            "reason": reason,
        }

    def _shows(self, step):
        """Whether any pack of a global batch has a picture; kept for the next pack, mostly of the same batch."""
        known, shows = self._known
        if known != step:
            positions = range(step * self.per_step, (step + 1) * self.per_step)
            shows = any(self._counts[s].pictures[r] for p in positions for s, r in self.members(p))
            self._known = step, shows
        return shows


def _capacity(data, needs, weights, seed, views_step):
    """What the config says a pack holds; the planner chooses what it leaves open."""
    if data.rows and data.views is not None:
        return Capacity(data.rows, data.length, data.views, data.targets or data.rows * data.length)
    rows = (data.rows,) if data.rows else (1, 2, 4, 8)
    return choose_capacity(needs, weights, data.length, seed, rows, views_step)


def _check_sources(sources, template):
    """Sources must agree on tokenizer and template, which their stored lengths depend on."""
    for source in sources:
        prepared = source.about["template"]
        if source.tokenizer.fingerprint != sources[0].tokenizer.fingerprint:
            raise ValueError(f"data.mixture: {source.folder} and {sources[0].folder} have different tokenizers")
        if prepared != template:
            raise ValueError(
                f"{source.folder} was prepared with template '{prepared}', data.template is '{template}'"
            )


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

    Yields:
      dicts of numpy arrays `[n, …]`, and what `HOST_ONLY` names: see `Packs` and `collate`.
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
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(stream)
