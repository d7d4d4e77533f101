"""What it costs a run to be watched: every guard of the training loop, as shares of a training step."""

import itertools
import tempfile
import time

import jax
import numpy as np

from lmm_jax import sharding
from lmm_jax.bench.measure import Measurement, time_steps
from lmm_jax.bench.shape import load_shape, side, synthetic_batch
from lmm_jax.bench.train import program_of
from lmm_jax.training.digest import digest
from lmm_jax.training.events import Events
from lmm_jax.training.outcomes import Outcomes
from lmm_jax.training.reader import Reader
from lmm_jax.training.soundness import check_finite, check_replicas
from lmm_jax.training.state import init_state
from lmm_jax.training.step import jit_train_step
from lmm_jax.watchdog import Watchdog

REPEATS = 200  # of what the host does in a step
SAVE_EVERY = 500  # steps between two saves, the default of `train.save_every`


def bench_guards(name, dtype, steps=5) -> list[Measurement]:
    """Times the guards of a training run on one device: those in the step, on the host, and before a save.

    Args:
      name: of a shape, or its file.
      dtype: of the computation.
      steps: timed steps.

    Returns:
      a row for each place, whose ratio is its share of a step, and one for all together.
    """
    shape = load_shape(name)
    program = program_of(shape, dtype, (side(shape) ** 2,))
    batch = synthetic_batch(shape, (side(shape) ** 2,))
    without, watched = _Step(program, batch, None, False), _Step(program, batch, 10, True)
    pairs = []
    for _ in range(steps):  # in turn, as what else a machine does changes from minute to minute
        pairs.append([time_steps(one, 1, f"a step {one.what} guards", warmup=0) for one in (without, watched)])
    plain = float(np.median([a for a, _ in pairs]))
    in_step = float(np.median([b / a for a, b in pairs]) - 1) * plain
    state, metrics = watched.state, watched.metrics
    on_host = _time_host(batch, metrics)

    def inspect():
        check_finite(state)
        check_replicas(state)
        digest(state.params)
        digest(state.opt_state)
        return ()

    before_save = time_steps(inspect, steps, "digests of a state, and whether its parameters are numbers")
    shares = {
        "in the step": (in_step, "a step"),
        "on the host, each step": (on_host, "a step"),
        f"before a save, every {SAVE_EVERY} steps": (
            before_save / SAVE_EVERY,
            f"a step, of {before_save:.3g} s a save",
        ),
    }
    rows = [Measurement("a step without guards", plain, "s")]
    rows += [
        Measurement(f"guards {where}", seconds, "s", seconds / plain, of) for where, (seconds, of) in shares.items()
    ]
    total = sum(seconds for seconds, _ in shares.values())
    return [*rows, Measurement("all guards", total, "s", total / plain, "a step")]


class _Step:
    """A compiled step that goes on from its own state; a call of it returns what is to be waited for."""

    def __init__(self, program, batch, max_skipped, skip_spikes):
        self.what = "without" if max_skipped is None else "with"
        program.config.train.max_skipped, program.config.train.skip_spikes = max_skipped, skip_spikes
        with program.use():
            self.state = init_state(program)
            self._batch = jax.device_put(batch, sharding.batch_sharding(program.mesh, program.config.rules))
            self._step = jit_train_step(program).lower(self.state, self._batch).compile()
        jax.block_until_ready(self())  # warm

    def __call__(self):
        self.state, self.metrics = self._step(self.state, self._batch)
        return self.metrics


class _Repeated:
    """An iterator that gives the same batch for ever."""

    def __init__(self, batch):
        self._batches = itertools.repeat(batch)

    def __next__(self):
        return next(self._batches)

    def close(self):
        """There is nothing to close."""


def _time_host(batch, metrics):
    """Seconds that the loop's guards take on the host for a step whose outcome is known."""
    records, reader = np.zeros((1, 1), np.int64), Reader(_Repeated(batch))
    watchdog = Watchdog(lambda words: None)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Outcomes(10, Events(folder), print, lambda step: watchdog.within(600, f"step {step}"))
        begin = time.perf_counter()
        for step in range(REPEATS):
            with watchdog.within(600, "waiting for the batch"):
                reader.take()
            with watchdog.within(600, "writing down a step"):
                pass
            with watchdog.within(600, "a step"):
                pass
            outcomes.add(step, records, metrics)
            outcomes.take()
        seconds = (time.perf_counter() - begin) / REPEATS
    reader.close()
    watchdog.close()
    return seconds
