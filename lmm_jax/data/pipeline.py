"""Packs of a batch, read and laid out: every host loads the ones that its devices hold."""

import dataclasses

import grain
import numpy as np
from absl import flags

from lmm_jax.data.images import open_picture
from lmm_jax.data.layout import Layout
from lmm_jax.data.plan import blank, scales_at
from lmm_jax.data.prepared import Prepared, as_turns
from lmm_jax.data.stream import Capacity, Stream, choose_capacity, fits, needs_of


class Packs:
    """Random access to the packs of an endless stream over prepared folders.

    What stands at a global position is a pure function of the data, the seed and the position. A record that cannot
    be read, decoded or laid out is replaced by padding of the length that was planned for it, so that it moves no
    other and belongs to no loss group; it is reported with its pack.

    Attributes:
      data: the `Prepared` split of each source.
      layout: `Layout` of a pack.
      stream: `stream.Stream` over the usable rows.
    """

    def __init__(self, config, split, packs_per_step, shuffle):
        """`packs_per_step`: packs of a global batch, micro-batches included.

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
        found = [needs_of(d.index, scales, self._phases, data.length, cut) for d in self.data]
        self._needs = [n for n, _ in found]
        weights = [weight for _, weight in sources]
        capacity = _capacity(data, [n.take(ok) for n, ok in found], weights, config.seed)
        self._rows = [np.flatnonzero(ok)[fits(n.take(ok), capacity)] for n, ok in found]
        for d, n, rows in zip(self.data, self._needs, self._rows, strict=True):
            if not len(rows):
                pack = f"{capacity.rows} × {capacity.length} positions, {capacity.targets} of them supervised"
                raise ValueError(
                    f"{d.folder} ({split}): none of {len(n)} rows fits a pack of {pack}; raise data.length"
                )
        needs = [n.take(rows) for n, rows in zip(self._needs, self._rows, strict=True)]
        self.stream = Stream(needs, weights, capacity, config.seed, shuffle)
        self.layout = Layout.from_config(config, capacity)
        self._first = np.cumsum([0, *map(len, self.data)])
        self._known = None, False  # a step, and whether its batch has a picture

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """`(source, row)` of the rows that are too long for a pack, or have no answer."""
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
            "seed": s.seed,
            "capacity": list(dataclasses.astuple(s.capacity)),
            "scales": [list(phase) for phase in self._phases],
            "packs_per_step": self.per_step,
        }

    def members(self, position) -> list[tuple[int, int]]:
        """`(source, row)` of the records of a pack."""
        return [(int(source), int(self._rows[source][i])) for source, i in self.stream[position].members]

    def name(self, source, row) -> str:
        """Folder and row of a record, for messages."""
        return f"{self.data[source].folder} ({self.data[source].split}) row {row}"

    def __getitem__(self, position):
        """The pack at a global position: arrays as `Layout.assemble` gives them, and for the host

        record_index: `[records]` int64, rows numbered on over the sources.
        bad: `[records]` bool, those that were replaced.
        faults: list of dicts (position, file, row, id, reason) of each of them.

        Pixels are left out where no pack of the whole global batch has a picture.
        """
        step = position // self.per_step
        scales = self._phases[step % len(self._phases)]
        where = iter(self.stream[position].where)
        segments, rows, seen, numbers, bad, faults = [], [], [], [], [], []
        for source, row in self.members(position):
            numbers.append(self._first[source] + row)
            pictures = int(self._needs[source].pictures[row])
            try:
                mine, pixels = self._read(source, row, pictures, scales, len(seen))
                bad.append(False)
            except Exception as error:  # whatever is wrong with one record must not end or move the stream
                mine, pixels = list(map(blank, self._lengths(source, row, scales))), [None] * pictures
                faults.append(self._fault(position, source, row, error))
                bad.append(True)
            # In the rows that were planned: the copies of this step may be shorter, but none is longer.
            segments += sorted(mine, key=len, reverse=True)
            rows += [next(where) for _ in range((self._needs[source].copies[row] > 0).sum())][: len(mine)]
            seen += pixels
        out = self.layout.assemble(segments, seen, rows)
        if not self._shows(step):
            out.pop("source", None)
            del out["pixels"]
        return out | {"record_index": np.array(numbers, np.int64), "bad": np.array(bad), "faults": faults}

    def _read(self, source, row, pictures, scales, first):
        record = self.data[source][row]
        turns, images = as_turns(record), record["images"]
        segments = self.layout.training_segments(turns, len(images), self.tokenizer, scales, first)
        if [len(s) for s in segments] != self._lengths(source, row, scales):
            raise ValueError("the record is not the one that was counted when the data was prepared")
        return segments, [self.layout.see(open_picture(data)) for data in images[:pictures]]

    def _lengths(self, source, row, scales):
        """Positions of each copy, from the index alone."""
        index = self.data[source].index
        first, last = index["turn_offsets"][row : row + 2]
        tokens, images = index["turn_tokens"][first:last], index["turn_images"][first:last]
        end = int((tokens + images * max(self.layout.scales) <= self.layout.length).sum()) - 1
        return [int(tokens[end] + images[end] * scale) for scale in (scales if images[end] else scales[:1])]

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
            shows = any(self._needs[s].pictures[r] for p in positions for s, r in self.members(p))
            self._known = step, shows
        return shows


def _capacity(data, needs, weights, seed):
    """What the config says a pack holds; the planner chooses what it leaves open."""
    if data.rows and data.pictures is not None:
        return Capacity(data.rows, data.length, data.pictures, data.targets or data.rows * data.length)
    rows = (data.rows,) if data.rows else (1, 2, 4, 8)
    return choose_capacity(needs, weights, data.length, seed, rows)


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
