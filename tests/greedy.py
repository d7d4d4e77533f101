"""Greedy ids after the prompts of a batch, by the model alone."""

import functools

import jax
import numpy as np


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _prefill(model, params, batch, scale, count):
    size = batch["id"].shape[-1] + count
    hidden, cache = model.apply({"params": params}, batch, size, (scale,), method="prefill")
    return _most_probable(model, params, hidden), cache


@functools.partial(jax.jit, static_argnums=0)
def _decode(model, params, ids, cache):
    hidden, cache = model.apply({"params": params}, ids, cache, method="decode")
    return _most_probable(model, params, hidden), cache


def _most_probable(model, params, hidden):
    return model.apply({"params": params}, hidden, method="logits").argmax(axis=-1)


def greedy_ids(model, params, batch, scale, count):
    """`[G, count]` ids after prompts of `[G, 1, T]` that begin their rows, at the bank's only scale; no id ends."""
    ids, cache = _prefill(model, params, batch, scale, count)
    found = [ids]
    for _ in range(count - 1):
        ids, cache = _decode(model, params, ids, cache)
        found.append(ids)
    return np.stack(found, axis=1)
