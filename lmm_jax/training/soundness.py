"""Whether a train state may be saved: its parameters are numbers, and what several devices hold alike is alike.

A device that computes wrongly now and then, or memory that loses a bit, changes one copy of a parameter and not the
others; nothing else in a run would notice.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lmm_jax.training.digest import device_digest, digest_of_host, named


class Corrupted(ArithmeticError):
    """Devices that must hold the same hold something else."""


def check_finite(state):
    """Raises FloatingPointError if a parameter of a `TrainState` is no number, or infinite; it names some."""
    flat = flatten_dict(state.params, sep="/")
    bad = [path for path, fine in jax.device_get(_finite(flat)).items() if not fine]
    if bad:
        raise FloatingPointError(
            f"{len(bad)} parameters are not finite after step {int(state.step)}, such as {bad[0]}; nothing is saved. "
            "The newest checkpoint is sound: lower optimizer.learning_rate, or set optimizer.clip, and start again"
        )


def check_replicas(state):
    """Compares what several devices hold of a `TrainState`; all hosts must ask.

    Raises:
      Corrupted: naming the first leaf of which devices hold something else than others, and those of this host.
    """
    flat = named(state)
    shared = {path: axes for path, x in flat.items() if (axes := _shared_axes(x.sharding))}
    if not shared:
        return
    compare = _comparison(tuple(sorted((path, flat[path].sharding, axes) for path, axes in shared.items())))
    alike = jax.device_get(compare({path: flat[path] for path in shared}))
    bad = sorted(path for path, fine in alike.items() if not fine)
    if bad:
        raise Corrupted(
            f"devices hold {bad[0]} and {len(bad) - 1} more leaves of the train state in different versions, after "
            f"step {int(state.step)}: {_versions(flat[bad[0]])}. A device or its memory is faulty; nothing is "
            "saved, and the same command continues from the newest checkpoint: leave that device out"
        )


@jax.jit
def _finite(flat):
    return {path: jnp.isfinite(x).all() for path, x in flat.items()}


def _shared_axes(sharding) -> tuple[str, ...]:
    """The mesh axes along which devices hold the same part of an array."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return ()
    used = {axis for part in sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)}
    return tuple(axis for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used)


_compiled = {}  # comparisons by the leaves that they compare: one for each program


def _comparison(leaves):
    """A compiled function from leaves by path to whether all devices hold the same of each."""
    key = tuple((path, sharding.spec, axes) for path, sharding, axes in leaves), leaves[0][1].mesh
    if key not in _compiled:
        _compiled[key] = jax.jit(lambda flat: {p: _alike(flat[p], sharding, axes) for p, sharding, axes in leaves})
    return _compiled[key]


def _alike(x, sharding, axes):
    """Whether what each device holds of an array is what those hold that differ from it along `axes` alone."""
    mesh, replicated = sharding.mesh, jax.sharding.PartitionSpec()

    def compare(part):
        own = device_digest(part)
        same = (jax.lax.pmax(own, axes) == jax.lax.pmin(own, axes)).all()
        return jax.lax.pmin(same.astype(jnp.int32), tuple(mesh.axis_names))

    return jax.shard_map(compare, mesh=mesh, in_specs=sharding.spec, out_specs=replicated, check_vma=False)(x)


def _versions(x) -> str:
    """Which devices of this host hold which version of an array."""
    found = {}
    for shard in x.addressable_shards:
        value = digest_of_host(np.asarray(shard.data))
        found.setdefault(str(shard.index), {}).setdefault(value, []).append(shard.device.id)
    differing = [list(versions.values()) for versions in found.values() if len(versions) > 1]
    if not differing:
        return f"those of host {jax.process_index()} agree with each other"
    return " against ".join(f"devices {', '.join(map(str, devices))}" for devices in differing[0])
