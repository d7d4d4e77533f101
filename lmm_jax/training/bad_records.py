"""The records that could not be used: every one is written down, too many stop the run."""

import json

import jax
import numpy as np
from etils import epath

from lmm_jax import storage
from lmm_jax.pods import hosts

LEAST = 10_000  # records that the share is taken of at least, so that an early fault does not stop a run


def _share(total):
    """This host's part of a count; all parts add up to it."""
    number, count = jax.process_index(), jax.process_count()
    return total // count + (number < total % count)


class BadData(ValueError):
    """More records than allowed could not be read."""


class BadRecords:
    """Faults of this process's part of the stream, one JSON line each in `WORKDIR/bad_records.jsonl`.

    Attributes:
      seen, bad: records so far, and those of them that were replaced; of a run that goes on, this host's share.
    """

    def __init__(self, workdir, max_share, max_run, before=None):
        """Args:
        workdir: of the run.
        max_share, max_run: see `config.data.max_bad_share` and `max_bad_run`.
        before: what `total` gave when the step was saved that the run goes on from, of any number of hosts.
        """
        name = "bad_records.jsonl" if jax.process_count() == 1 else f"bad_records_{jax.process_index()}.jsonl"
        self._lines = storage.Lines(epath.Path(workdir) / name)
        before = before or {"seen": 0, "bad": 0, "run": 0}
        self.seen, self.bad = (_share(before[name]) for name in ("seen", "bad"))
        self._run = before["run"]
        self._max_share, self._max_run = max_share, max_run

    def add(self, bad, faults):
        """Takes in the records of a batch.

        Args:
          bad: `[records]` bool, in stream order.
          faults: dicts of the bad ones, as `pipeline.Packs` gives them.

        Raises:
          BadData: more than the allowed share, or too many in a row; the message names the last one.
        """
        self.seen += len(bad)
        self.bad += len(faults)
        if faults:
            self._lines.add(map(json.dumps, faults))
        good = np.flatnonzero(~bad)
        runs = np.diff(np.concatenate([[-1], good, [len(bad)]])) - 1  # of bad records between the good ones
        runs[0] += self._run
        self._run = int(runs[-1])
        if not faults:  # what an earlier run had may be more than is allowed now: the next bad record ends this one
            return
        if runs.max() >= self._max_run:
            raise BadData(f"{runs.max()} records one after another could not be read, {self._last(faults)}")
        if self.bad > self._max_share * max(self.seen, LEAST):
            raise BadData(f"{self.bad} of {self.seen} records could not be read, {self._last(faults)}")

    def note_left_out(self, packs):
        """Writes down the records that `packs` (a `pipeline.Packs`) cannot use, before the first step."""
        files = [str(d.folder) for d in packs.data]
        self._lines.add(
            json.dumps({"file": files[dataset], "record": record, "reason": f"left out: {reason}"})
            for dataset, record, reason in packs.why_left_out()
        )

    def total(self) -> dict[str, int]:
        """The counters of all hosts together, all of which must ask: records seen and bad, and bad ones in a row."""
        counted = hosts.spread([self.seen, self.bad, self._run])
        seen, bad = counted[:, :2].sum(axis=0)
        return {"seen": int(seen), "bad": int(bad), "run": int(counted[:, 2].max())}

    def flush(self):
        """Makes sure that all lines are in the file."""
        self._lines.flush()

    def close(self):
        """Makes sure that all lines are in the file; raises OSError if the disk is full."""
        self._lines.close()

    def _last(self, faults):
        self.flush()
        last = faults[-1]
        return f"the last: {last['file']} record {last['record']}: {last['reason']}; all are in {self._lines.path}"
