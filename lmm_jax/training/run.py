"""A run while it lasts: its data, its checkpoints and what it tells of itself, within its limits of time."""

import dataclasses
import errno
import functools
import sys

import jax
import numpy as np
from etils import epath

from lmm_jax import errors, lock, sharding
from lmm_jax.data.pipeline import HOST_ONLY, Packs, batches
from lmm_jax.exit_codes import STALLED
from lmm_jax.pods import hosts
from lmm_jax.pods.wire import end, within
from lmm_jax.training import events, soundness
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.events import Events
from lmm_jax.training.metrics import MetricWriter
from lmm_jax.training.pace import slow_hosts
from lmm_jax.training.plan import Plan, about_run
from lmm_jax.training.state import Program
from lmm_jax.watchdog import Watchdog

PATIENCE = 2.0  # seconds for what is told before a process ends: the disk may be what does not answer


def end_stalled(words):
    """Ends the process, and with it the run on all hosts, after a watchdog has written down all stacks."""
    told = f"{words}; this process ends with exit code {STALLED}, and the same command continues"
    within(PATIENCE, lambda: print(f"lmm: {told}", file=sys.stderr, flush=True))
    hosts.leave(STALLED, told)
    end(STALLED)


def shapes_of(batch):
    """What a program is compiled for: the names and shapes of a batch's arrays, but for the host's own."""
    return frozenset((name, x.shape) for name, x in batch.items() if name not in HOST_ONLY)


@dataclasses.dataclass
class Run:
    """What a run consists of while it lasts, beside its state.

    Attributes:
      plan: what was known before it began.
      checkpoints, writer, happened: where state, metrics and events go.
      held: the `lock.Hold` of the workdir; None on all hosts but the first.
      main: whether this process speaks and writes for all.
      base: what checkpoints leave out, see `base.describe`.
      bad_before: counters of bad records when the step was saved that it goes on from; None if it begins.
      saved: the newest step that is known to be on disk.
      coming: the step that is on its way there; None if none is.
      failed_saves: saves that failed since one did not, on all hosts alike.
      watchdog: holds everything to its time.
    """

    plan: Plan
    checkpoints: Checkpoints
    writer: MetricWriter
    happened: Events
    held: lock.Hold | None
    main: bool
    base: dict | None
    bad_before: dict | None
    saved: int
    coming: int | None = dataclasses.field(init=False, default=None)
    failed_saves: int = dataclasses.field(init=False, default=0)
    validated: set = dataclasses.field(init=False, default_factory=set)  # shapes that a validation is compiled for
    watchdog: Watchdog = dataclasses.field(init=False)

    def __post_init__(self):
        self.watchdog = Watchdog(self._stalled)
        hosts.when_another_ends(self._ended_by_another)

    @property
    def program(self) -> Program:
        """See `state.make_program`."""
        return self.plan.program

    @property
    def packs(self) -> Packs:
        """Of the training split."""
        return self.plan.packs

    @property
    def workdir(self) -> epath.Path:
        """Of the run."""
        return self.plan.workdir

    def save(self, state, bad_records, note):
        """Begins to save a state, unless it is not fit for it, or another process has taken the workdir over.

        A save that fails is told and counted, and training goes on, `train.max_failed_saves` times.

        Args:
          state: the `TrainState`.
          bad_records: the `BadRecords`, whose counters go with it.
          note: called with a line about a save that failed.

        Raises:
          Held: another process has taken over.
          FloatingPointError, Corrupted: see `soundness`.
          Exception: what went wrong with the last of so many saves.
        """
        step = int(state.step)
        self.finish_saving(note)
        with self._within_limit(f"beginning to save step {step}"):
            self._check_held()
            soundness.check_finite(state)
            soundness.check_replicas(state)
            about = about_run(self.program.config, self.plan.stream) | {"bad_records": bad_records.total()}
            more = {"check_held": self._check_held, "on_saved": self._on_saved, "within": self._within_limit}
            if self._try_to_save(lambda: self.checkpoints.check_room(state, self.base), step, note) and (
                self._try_to_save(lambda: self.checkpoints.save(state, about, self.base, **more), step, note)
            ):
                self.coming = step
            self.writer.flush()

    def _check_held(self):
        if self.held:
            self.held.check()

    def finish_saving(self, note):
        """Waits until the last save is on disk; one that failed is told and counted."""
        step, self.coming = self.coming, None
        if step is None:
            return
        with self._within_limit(f"writing the checkpoint of step {step}"):
            if self._try_to_save(self.checkpoints.wait, step, note):
                self.saved, self.failed_saves = step, 0

    def look_after_saving(self, note):
        """Tells of a save that failed meanwhile; of several hosts, which must do so together, `save` does."""
        if jax.process_count() == 1 and self.checkpoints.failed():
            self.finish_saving(note)

    def writing(self, step):
        """What is written down of a step, to a disk that may be gone, must be within the time of a save."""
        return self._within_limit(f"writing down step {step}")

    def _within_limit(self, what):
        return self.watchdog.within(self.program.config.train.deadline_save, what)

    def _try_to_save(self, action, step, note) -> bool:
        """Does a part of saving a step, as all hosts do; whether it went well on all of them."""
        fault = None
        try:
            action()
        except Exception as error:  # Orbax raises many kinds
            fault = error
        if hosts.everywhere(fault is None):
            return True
        self.failed_saves += 1
        limit = self.program.config.train.max_failed_saves
        fault = fault or OSError(errno.EIO, "another host could not write a checkpoint", str(self.workdir))
        told = errors.explain(fault)
        if self.failed_saves >= limit or told is None:  # a fault of ours does not pass
            raise fault
        words = f"a checkpoint could not be written: {told[0]}"
        note(f"{words}; training goes on, this was failure {self.failed_saves} of {limit} (train.max_failed_saves)")
        self.happened.add(events.SAVE_FAILED, step, words=words)
        return False

    def _on_saved(self, step):
        self.happened.add(events.SAVED, step)

    def is_last(self, stop, step) -> bool:
        """Whether a `Stop` says that `step` is the last; hosts that do not agree in time end the run."""
        try:
            return stop.is_last(step)
        except TimeoutError as error:
            self.watchdog.end(str(error))

    def _ended_by_another(self, words):
        self.happened.add(events.FAILED, self.saved, words=words)

    def _stalled(self, words):
        within(PATIENCE, lambda: self.happened.add(events.STALLED, self.saved, words=words))
        end_stalled(words)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step, and packs of each."""
        t = self.program.config.train
        return t.micro_batches, t.batch_size // t.micro_batches

    @functools.cached_property
    def local_packs(self) -> np.ndarray:
        """Numbers of this host's packs in a global batch."""
        return sharding.local_packs(self.program.mesh, self.program.config.rules, self.batch_shape)

    def host_batches(self, packs, first, end):
        """This host's part of the global batches number `first` to `end` - 1 of some packs."""
        data = self.program.config.data
        return batches(packs, self.local_packs, first, end, threads=data.threads, workers=data.workers)

    def held_out(self, packs, asked):
        """Global batches to validate with, each of which must come in time; none any more once `asked()` holds."""
        t = self.program.config.train
        batches = self.host_batches(packs, 0, t.eval_batches)
        for number in range(t.eval_batches):
            with self.watchdog.within(t.deadline_batch, f"waiting for batch {number} of a validation"):
                batch = next(batches)
            if asked():
                batches.close()
                return
            shapes = shapes_of(batch)
            limit = t.deadline_step if shapes in self.validated else t.deadline_compile
            with self.watchdog.within(limit, f"batch {number} of a validation"):
                yield self.to_global(batch)
            self.validated.add(shapes)

    def name_slow_hosts(self, step, meter, note):
        """Says which hosts hold the others up; all of them must ask."""
        if jax.process_count() > 1:
            *own, per_step = meter.seconds()
            for words in slow_hosts(hosts.spread(own), per_step):
                if self.main:
                    note(f"step {step}: {words}")
                self.happened.add(events.SLOW_HOST, step, words=words)

    def to_global(self, batch):
        """This host's part of a batch as a part of global arrays; what is for the host alone is left out."""
        arrays = {name: x for name, x in batch.items() if name not in HOST_ONLY}
        return sharding.to_global(
            arrays, self.local_packs, self.program.mesh, self.program.config.rules, self.batch_shape
        )
