"""What passes through the collectives of a compiled program, by link and mesh axes, and the least that FSDP needs."""

import collections
import math

import flax.linen as nn
import jax
import numpy as np


def traffic(module, mesh) -> dict[str, dict[str, dict[str, int]]]:
    """Bytes that a device receives in a step, by link, mesh axes and kind; see `hlo.Collective.traffic`.

    Args:
      module: `hlo.Module`, compiled for `mesh`.
      mesh: the mesh; devices of several slices have a `slice_index`.

    Returns:
      {"ici" or "dcn": {axes that its groups run along, such as "fsdp" or "fsdp+tensor": {kind: bytes}}}; "dcn" is
      the data-center network between slices, which stand behind each other in "data".
    """
    slices = max(getattr(device, "slice_index", 0) for device in mesh.devices.flat) + 1
    total = {"ici": {}, "dcn": {}}
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    for collective in module.collectives(mesh.size // slices, slices):
        along = np.zeros(len(mesh.axis_names), bool)
        for group in collective.groups:
            along |= (places[list(group)] != places[group[0]]).any(axis=0)
        axes = "data" if collective.slices else "+".join(np.array(mesh.axis_names)[along])
        if axes:
            kinds = total["dcn" if collective.slices else "ici"].setdefault(axes, collections.Counter())
            kinds[collective.kind] += collective.traffic
    return {link: {axes: dict(kinds) for axes, kinds in by_axes.items()} for link, by_axes in total.items()}


def minimum(program) -> int:
    """Bytes that a device must receive in a step of fully sharded data parallelism, counted as `traffic` does.

    In bfloat16, each trained parameter is gathered for the forward and for the backward pass and its gradient
    reduced and scattered once, and each frozen one is gathered once. What other axes than tensor do not shard has its
    gradient all-reduced over them, shard by shard. Micro-batches, which repeat all this, are left out.

    Args:
      program: `state.Program`.
    """
    sizes, total = program.mesh.shape, 0
    tokens = set(jax.tree.leaves([program.config.rules.get(name) for name in ("batch", "length")]))
    shardings = jax.tree.leaves_with_path(program.shardings.params)
    for (path, placed), x in zip(shardings, jax.tree.leaves(nn.unbox(program.boxed)), strict=True):
        used = set(jax.tree.leaves(tuple(placed.spec)))
        gathered = 2 * x.size // math.prod(sizes[axis] for axis in used - tokens)
        over = math.prod(sizes[axis] for axis in used & tokens)
        trained = program.rates[jax.tree_util.keystr(path, simple=True, separator="/")] > 0
        copies = math.prod(sizes[axis] for axis in tokens - used)
        total += gathered * (over - 1) // over * (3 if trained else 1)
        total += 2 * gathered // over * (copies - 1) // copies * trained
    return total
