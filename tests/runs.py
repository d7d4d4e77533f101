"""Runs of this process: one before its first step, and one that is asked to stop."""

import contextlib
import signal

import pytest

from lmm_jax.generation.model import Model
from lmm_jax.training.metrics import MetricWriter
from lmm_jax.training.plan import make_plan
from lmm_jax.training.state import init_state


def begin(config, workdir):
    """Writes the workdir of a run that took no step yet, for tests of what is read from there; returns its plan."""
    plan = make_plan(config, workdir)
    Model(plan.program, init_state(plan.program).params, plan.packs.tokenizer).save(workdir)
    return plan


@contextlib.contextmanager
def asked_to_stop(step):
    """Ctrl-C while a run that logs each step takes `step`, after which it saves and ends with `loop.Preempted`."""
    write = MetricWriter.write

    def asking(writer, done, values):
        write(writer, done, values)
        if done == step - 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricWriter, "write", asking)
        yield
