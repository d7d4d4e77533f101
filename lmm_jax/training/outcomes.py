"""What became of each step: looked at two steps later, when the devices are past it and nobody waits for them."""

import collections
import contextlib

import jax
import numpy as np

from lmm_jax.training import events

LAG = 2  # steps that are on their way to the devices, or there
NAMED = 16  # records of a skipped step that are named at most


class Outcomes:
    """The steps whose outcome is not known yet, and the skipped updates of those whose is.

    Attributes:
      stopped: the step after which the run stops, as `train.max_skipped` updates in a row were skipped; 0 if none.
      in_row: skipped updates up to the last step that was looked at, without an update between.
      latest: metrics of that step on the host, after `take(all=True)`.
    """

    def __init__(self, limit, happened, note, within=lambda step: contextlib.nullcontext()):
        """Args:
        limit: `train.max_skipped`.
        happened: `Events` of the run.
        note: called with a line for each skipped update.
        within: of a step, a context that it is waited for in, such as a limit of time.
        """
        self._limit, self._happened, self._note, self._within = limit, happened, note, within
        self._pending = collections.deque()
        self._records = ""  # of the last skipped step, in words
        self.stopped, self.in_row, self.latest = 0, 0, {}

    def add(self, step, records, metrics):
        """Takes a step in that was asked for.

        Args:
          step: its number.
          records: `[packs, records]` numbers of this host's records, -1 where there is none.
          metrics: that `step.train_step` gives, on the devices.
        """
        self._pending.append((step, records, metrics))

    def take(self, all=False) -> bool:
        """Looks at what must be done by now; whether the run is to stop, and the state is that of `stopped`.

        Args:
          all: whether to wait for every step that was asked for.
        """
        while len(self._pending) > (0 if all else LAG) and not self.stopped:
            step, records, metrics = self._pending.popleft()
            with self._within(step):
                finite, spike, in_row = jax.device_get([metrics[n] for n in ("finite", "spike", "skipped_in_row")])
                self.in_row = int(in_row)
                if not finite or spike:
                    self._skipped(step, records, bool(finite), metrics)
            if self.in_row >= self._limit:
                self.stopped = step
            if all or self.stopped:
                self.latest = metrics
        self.latest = jax.device_get(self.latest)
        return bool(self.stopped)

    def words(self) -> str:
        """Why the run is to stop."""
        return (
            f"loss or gradient was not finite, or the loss a spike, in the last {self.in_row} steps, up to step "
            f"{self.stopped}; their updates were skipped (train.max_skipped={self._limit}), the last had "
            f"{self._records}"
        )

    def _skipped(self, step, records, finite, metrics):
        numbers = np.unique(records[records >= 0]).tolist()
        whose = f" of host {jax.process_index()}" if jax.process_count() > 1 else ""
        self._records = f"records{whose} {numbers[:NAMED]}{' …' if len(numbers) > NAMED else ''}"
        loss = float(jax.device_get(metrics["loss"]))
        event = events.SPIKE if finite else events.NOT_FINITE
        why = f"the loss, {loss:.4g}, is a spike" if finite else "loss or gradient is not finite"
        text = f"step {step}: {why}, update skipped, {self.in_row} in a row; {self._records}"
        (print if jax.process_index() else self._note)(text)  # each host knows its own records
        self._happened.add(event, step, loss=str(loss), records=numbers)
