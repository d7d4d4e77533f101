"""Losses of chosen steps that are no numbers, or far too large, as a device or a batch may give them."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
