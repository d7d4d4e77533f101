"""Whole runs of one process: `loop.train` from beginning to end, on the first devices, with steps compiled once."""

import contextlib
import functools

import jax
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.training import loop, plan, run
from lmm_jax.training.metrics import read_metrics
from lmm_jax.training.state import make_program
from tests.runs import asked_to_stop


class Session:
    """Runs of a config, on the first so many devices.

    The program, the opened data and the compiled steps are shared between runs; all else is done anew by each.

    Attributes:
      records: what stood in each step that was read since it was last cleared: `{step: numbers of records}`.
    """

    def __init__(self, config, devices):
        self._config, self.records = config, {}
        self.program = make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
        self._open = functools.cache(functools.partial(plan._open_packs, config))
        self._train_step = loop.jit_train_step(self.program)

    def train(self, workdir, stop_at=None):
        """Begins or goes on with a run; stops after about `stop_at` steps, or at the end.

        Returns:
          the step that it ended with, which is saved.
        """
        with self._shared(), asked_to_stop(stop_at) if stop_at else contextlib.nullcontext():
            if not stop_at:
                return loop.train(self._config, workdir)["step"]
            with pytest.raises(loop.Preempted):
                loop.train(self._config, workdir)
            return max(losses(workdir))

    @contextlib.contextmanager
    def _shared(self):
        batches = run.batches

        def recording(packs, local, start, stop, **options):
            iterator = batches(packs, local, start, stop, **options)
            with contextlib.closing(iterator) if hasattr(iterator, "close") else contextlib.nullcontext():
                for step, batch in enumerate(iterator, start=start + 1):
                    self.records[step] = batch["record_index"].tolist()
                    yield batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "make_program", lambda config: self.program)
            patch.setattr(plan, "_open_packs", lambda config, which, shuffle: self._open(which, shuffle))
            patch.setattr(loop, "jit_train_step", lambda program: self._train_step)
            patch.setattr(run, "batches", recording)
            yield


def losses(workdir) -> dict[int, float]:
    """Loss by step; the last that was written of each."""
    return {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}


def difference(workdir, other) -> float:
    """Largest difference of loss over the same steps."""
    one, two = losses(workdir), losses(other)
    assert one.keys() == two.keys()
    return float(np.max([abs(one[step] - two[step]) for step in one]))
