"""Losses and parameters of chosen steps that are wrong, as a device or a batch may make them."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.training import loop
from lmm_jax.training import run as run_lib
from lmm_jax.training import step as step_lib


@contextlib.contextmanager
def poisoned(values, first=1):
    """While it lasts, the loss of each step in `values` has that much added, and so has its gradient if not finite.

    Args:
      values: what is added, by step.
      first: the first step that is taken.
    """
    numbers = itertools.count(first)
    to_global, loss_and_grads = run_lib.Run.to_global, step_lib.loss_and_grads

    def with_poison(run, batch):
        value = values.get(next(numbers), 0.0)
        return to_global(run, batch | {"poison": np.full(len(batch["segment"]), value, np.float32)})

    def of_poison(model, trainable, frozen, batch, *args):
        poison = batch["poison"].max()
        batch = {name: x for name, x in batch.items() if name != "poison"}
        loss, grads, *more = loss_and_grads(model, trainable, frozen, batch, *args)
        grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(poison), g, g + poison.astype(g.dtype)), grads)
        return loss + poison, grads, *more

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lib.Run, "to_global", with_poison)
        patch.setattr(step_lib, "loss_and_grads", of_poison)
        yield


@contextlib.contextmanager
def changed_after(when, change):
    """While it lasts, `change` gets the list of parameters that step `when` gives, and may replace some in it."""
    real = loop.jit_train_step

    def changing(program):
        step = real(program)

        def run(state, batch):
            state, metrics = step(state, batch)
            if int(state.step) == when:
                leaves, tree = jax.tree.flatten(state.params)
                change(leaves)
                state = state.replace(params=jax.tree.unflatten(tree, leaves))
            return state, metrics

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_train_step", changing)
        yield
