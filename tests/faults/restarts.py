"""What a run would go on from: everything that `lmm train` does before its first step, in a fraction of a second.

The commands of a trial differ in their workdir alone. So the model is planned, and the data are opened, once for all
of them; every look at the workdir, the lock and the restoring are those of `loop.train`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import shutil

import jax
import numpy as np
import pytest

from lmm_jax import errors, sharding
from lmm_jax.training import loop, plan
from lmm_jax.training.state import make_program


@dataclasses.dataclass(frozen=True)
class Restart:
    """How a command began.

    Attributes:
      step: that it goes on from; None if it was refused, 0 if it begins anew.
      state: hash of all numbers of its state; "" if it was refused.
      said: what it printed, or was refused with.
    """

    step: int | None
    state: str
    said: str


class _Began(Exception):
    """In the place of the first step: the state before it."""


class Restarts:
    """Begins runs of one config, on one device.

    Args:
      config: of the runs; `train.steps` has to be more than any of them took.
    """

    def __init__(self, config):
        self._config = config
        self._program = make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        self._open = functools.cache(functools.partial(plan._open_packs, config))

    def __call__(self, workdir) -> Restart:
        """The beginning of `lmm train` in a workdir; raises what is no sentence for its user."""
        said = io.StringIO()

        def take_steps(run, state, *_):
            run.checkpoints.wait()
            raise _Began(state)

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), _silent():
            patch.setattr(plan, "make_program", lambda config: self._program)
            patch.setattr(plan, "_open_packs", lambda config, which, shuffle: self._open(which, shuffle))
            patch.setattr(loop, "_take_steps", take_steps)
            try:
                loop.train(self._config, workdir)
            except _Began as began:
                (state,) = began.args
                return Restart(int(state.step), hash_of(state), said.getvalue())
            except Exception as error:
                told = errors.explain(error)
                if told is None:  # a traceback for its user
                    raise
                return Restart(None, "", said.getvalue() + told[0])
        raise AssertionError("the run neither began nor was refused")


@contextlib.contextmanager
def _silent():
    """Without what libraries log of each damaged array, which would fill the report of a test."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def hash_of(state) -> str:
    """Hash of a `TrainState`: of every leaf, its path, shape and bits."""
    found = hashlib.sha256()
    for path, x in jax.tree.leaves_with_path(jax.device_get(state)):
        x = np.ascontiguousarray(x)
        found.update(f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}".encode() + x.tobytes())
    return found.hexdigest()


def check_begins_at(found, step, states):
    """Fails unless a restart goes on from a step with every bit as it was.

    Args:
      found: the `Restart`.
      step: that it has to go on from.
      states: hash of the state by step.
    """
    assert found.step == step, f"step {step} is there, and it begins at {found.step}\n{found.said}"
    assert found.state == states[step], f"step {step} is restored wrongly\n{found.said}"


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A run that ended, to be damaged in copies.

    Attributes:
      workdir: of the run, which is not to be touched.
      restart: begins a command in a workdir.
      states: hash of the state at each step that it kept, oldest first.
    """

    workdir: object
    restart: Restarts
    states: dict[int, str]

    @property
    def newest(self) -> int:
        """The last step."""
        return max(self.states)

    @contextlib.contextmanager
    def copy(self, folder):
        """A copy of the workdir to damage, which is removed afterwards."""
        shutil.copytree(self.workdir, folder, symlinks=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def check_never_wrong(self, found):
        """Fails if a restart goes on from anything but a step as it was saved; one that is refused is fine."""
        if found.step is None:
            assert found.said.strip()
            return
        assert found.step in self.states, f"begins at step {found.step}, which was never saved\n{found.said}"
        assert found.state == self.states[found.step], f"step {found.step} is restored wrongly\n{found.said}"
