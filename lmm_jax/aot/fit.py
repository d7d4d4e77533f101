"""The largest batch that a slice holds, and the remat policy to train it with, in few compilations."""

import math

import jax

from lmm_jax.aot import compile as tool
from lmm_jax.aot import topology as slices

MOST = 4096  # packs a device; nobody needs more


def fit_config(config, topology, progress=print) -> dict:
    """`fit` for a config on a slice, its train.micro_batches as they are.

    Returns:
      `compile.compile`'s dict of the last try that fits, with `packs` a device, `batch_size` for config.train and
      `remat` for config.model.decoder; packs 0 if not even one fits.
    """
    mesh = tool.slice_mesh(config, slices.find_slice(topology))
    shards = math.prod(mesh.shape[axis] for axis in jax.tree.leaves([config.rules.get("batch")]))

    def compile(packs, policy):
        tried = config.copy_and_resolve_references()
        with tried.unlocked():
            tried.train.batch_size = packs * shards * config.train.micro_batches
            tried.model.decoder.remat = policy
        return tool.compile(tried, topology)

    packs, policy, result = fit(compile, progress)
    return result | {"packs": packs, "batch_size": packs * shards * config.train.micro_batches, "remat": policy}


def fit(compile, progress=print) -> tuple[int, str, dict]:
    """Finds the most packs a device that fit with little kept for the backward pass, then the policy that keeps most.

    Little is "full", or "offload" if not even one pack fits with that. Memory is a line in the number of packs,
    nearly: two numbers that fit tell where it ends, and the numbers around that are tried.

    Args:
      compile: `(packs a device, policy)` to a dict as `compile.compile` returns.
      progress: called with a line for each try.

    Returns:
      Packs, policy and what `compile` said of them; packs 0 if not even one fits.
    """
    tried = {}

    def attempt(packs, policy):
        found = tried[packs, policy] = compile(packs, policy)
        peak, usable = found["peak_hbm_bytes"], found["hbm_bytes"]
        words = "fits" if found["fits"] else "does not fit"
        share = "" if peak is None else f", {peak / usable:.0%} of the memory"
        progress(f"{packs} packs a device, remat {policy}: {words}{share}")
        return found["fits"]

    policy = next((policy for policy in ("full", "offload") if attempt(1, policy)), None)
    if policy is None:
        return 0, "offload", tried[1, "offload"]
    fits, above = [1], MOST + 1
    while above - fits[-1] > 1:
        packs = min(max(_guess([(n, tried[n, policy]) for n in fits]), fits[-1] + 1), above - 1)
        if attempt(packs, policy):
            fits.append(packs)
        else:
            above = packs
    packs = fits[-1]
    if policy == "full":
        policy = next((policy for policy in ("none", "dots") if attempt(packs, policy)), "full")
    return packs, policy, tried[packs, policy]


def _guess(fits):
    """Packs where the line through the two largest numbers that fit reaches the memory."""
    if len(fits) < 2:
        return 2 * fits[-1][0]
    (a, small), (b, large) = fits[-2:]
    slope = (large["peak_hbm_bytes"] - small["peak_hbm_bytes"]) / (b - a)
    room = large["hbm_bytes"] - large["peak_hbm_bytes"]
    return b + int(room / slope) if slope > 0 else MOST
