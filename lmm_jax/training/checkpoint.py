"""Checkpoints: Orbax v1, one folder a step, verified by a digest of every leaf before it is used.

Orbax notices missing and truncated files, but loads flipped bits silently; a digest is computed on the device at
save, stored with the step and compared after restore. It is a sum of integers, so it does not depend on the mesh.
"""

import contextlib
import math
import os
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from lmm_jax import storage
from lmm_jax.errors import chain_of
from lmm_jax.pods import hosts

PIECE, BLOCK = 2**25, 2**18  # numbers of an array on the host that are digested by a thread, and in one go
CHUNK = 2**28  # bytes of an array that are read at a time, whatever part of it is wanted
SLICE = 2**20  # bytes that a device writes at least of an array that several hold alike


def saved_steps(workdir) -> list[int]:
    """The steps whose checkpoints lie in a workdir, newest first; nothing there is changed, or opened."""
    directory = storage.absolute(workdir) / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def saved_stream(workdir, step) -> dict | None:
    """What identified the data stream when a step was saved, see `Checkpoints.save`; nothing is changed.

    None if the step is damaged: it will be named, and passed over, when it is restored.
    """
    path = storage.absolute(workdir) / "checkpoints" / str(step)
    try:
        return ocp.checkpointables_metadata(path).custom_metadata["data"]
    except Exception:  # Orbax raises many kinds; each means that this step is unusable
        return None


def saved_base(workdir) -> dict | None:
    """What the checkpoints of a workdir leave out, see `Checkpoints.save`; None if they leave out nothing.

    It is the same for all steps of a run: that of the newest one that can be read.
    """
    for step in saved_steps(workdir):
        path = storage.absolute(workdir) / "checkpoints" / str(step)
        try:
            return ocp.checkpointables_metadata(path).custom_metadata.get("base")
        except Exception:  # Orbax raises many kinds; each means that this step is unusable
            continue
    return None


class Checkpoints:
    """The checkpoints of one workdir: `params` and `train` (optimizer state and counters) of each step."""

    def __init__(self, workdir, keep=2):
        """`keep`: newest steps to preserve."""
        self.directory, self._keep = storage.absolute(workdir) / "checkpoints", keep
        self._orbax = self._open()

    def _open(self, copied=None):
        """Orbax's checkpointer, which a save lets copy fewer than `copied` bytes of arrays at a time."""
        context = ocp.Context()
        context.array.saving.use_compression = False  # of weights it saves little, and takes most of the time
        context.array.saving.storage_options.chunk_byte_size = CHUNK
        # To cut an array up is a program for each shape and device, which small ones are not worth.
        context.array.saving.min_slice_bytes_for_replica_parallel = SLICE
        context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = copied
        with context:
            return ocp.training.Checkpointer(
                self.directory,
                # The default policy skips a save silently while another one runs.
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )

    def save(self, state, data, base=None):
        """Starts saving `state` under its step; returns when the arrays are copied, writing goes on behind.

        Args:
          state: a `TrainState`.
          data: JSON dict that identifies the data stream.
          base: JSON dict about parameters that are not saved, as they lie elsewhere: "digests" by their paths, and
            whatever else finds them again; None to save all.

        Raises:
          RuntimeError: Orbax refused the step.
          OSError: this save, or the one before, cannot be written.
        """
        step = int(state.step)
        parts = _parts(state)
        if base is not None:
            parts["params"] = leave_out(parts["params"], base["digests"])
        about = {"data": data, "digests": {name: digest(part) for name, part in parts.items()}}
        about |= {} if base is None else {"base": base}
        # Forced, as a later step may be there that is damaged, and Orbax by itself saves none before the last.
        options = {"force": True, "overwrite": True}
        with _written_to(self.directory):
            saving = self._orbax.save_checkpointables_async(step, parts, custom_metadata=about, **options)
        if saving is None:
            raise RuntimeError(f"Orbax refused to save step {step} in {self.directory}")

    def wait(self):
        """Waits until the last save is on disk; raises what went wrong."""
        with _written_to(self.directory):
            self._orbax.wait()

    def close(self):
        """Waits and releases Orbax's threads."""
        with _written_to(self.directory):
            self._orbax.close()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """Closes, but after an error on one of several hosts: to save takes all of them, and the others go on."""
        if error is None or jax.process_count() == 1:
            self.close()

    def steps(self) -> list[int]:
        """Steps on disk, newest first."""
        return sorted((c.step for c in self._orbax.checkpoints), reverse=True)

    def restore(self, abstract, note=print):
        """Restores the newest sound step into the shardings of `abstract`.

        Args:
          abstract: `TrainState` of `ShapeDtypeStruct`s with shardings; any mesh.
          note: called with a line for each step that is damaged.

        Returns:
          `(state, data)` as they were saved, or None if nothing was ever saved.

        Raises:
          ValueError: there are checkpoints and none is sound.
        """
        restored = self._newest_sound(_parts(abstract), note)
        if restored is None:
            return None
        step, parts, about = restored
        state = abstract.replace(step=jnp.asarray(step, jnp.int32), params=parts["params"], **parts["train"])
        return state.replace(step=jax.device_put(state.step, abstract.step.sharding)), about["data"]

    def restore_params(self, abstract, note=print, step=None):
        """Restores only the parameters of the newest sound step, or of `step` alone; returns `(params, step)`.

        Raises:
          ValueError: none is sound, or there is none.
        """
        restored = self._newest_sound({"params": abstract}, note, None if step is None else [step])
        if restored is None:
            raise ValueError(f"{self.directory} holds no checkpoint; was `lmm train` run there?")
        step, parts, _ = restored
        return parts["params"], step

    def stream_params(self, step, abstract):
        """Reads the parameters of a step one by one into memory of this host, never more than one at a time.

        Args:
          step: of `steps`.
          abstract: nested dict of arrays or `ShapeDtypeStruct`s.

        Yields:
          `(path, numpy array)`, in the order of `flatten_dict(abstract)`. Drop the array before you take the next.

        Raises:
          ValueError: a parameter that cannot be read or differs from what was saved.
        """
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        folder = self.directory / str(step)
        try:
            about = self._orbax.checkpointables_metadata(step)
            digests = about.custom_metadata["digests"]["params"]
            stored = flatten_dict(about.metadata["params"], sep="/")
        except Exception as error:  # Orbax raises many kinds; each means that this step is unusable
            raise ValueError(f"checkpoint {folder} is damaged: what it holds cannot be read") from error
        for path, x in flatten_dict(abstract, sep="/").items():
            if path not in stored or tuple(stored[path].shape) != x.shape:
                raise ValueError(f"checkpoint {folder}: {path} {x.shape} is not there, or has another shape")
            host = np.broadcast_to(
                np.zeros((), stored[path].dtype), stored[path].shape
            )  # asks for one, takes no memory
            try:
                with context:
                    one = ocp.load(folder, unflatten_dict({path: host}, sep="/"), checkpointable_name="params")
            except Exception as error:  # Orbax raises many kinds; each means that this step is unusable
                raise ValueError(f"checkpoint {folder}: {path} cannot be read: {_reason(error)}") from error
            one = flatten_dict(one, sep="/")[path]
            if digest_of_host(one) != digests.get(path):
                raise ValueError(f"checkpoint {folder} is damaged: {path} differs from what was saved")
            yield path, one
            del one

    def save_params(self, params, step=0):
        """Saves parameters alone, which a run can start from (`init.from`), in little more memory than they take.

        Returns when they are on disk.
        """
        about = {"data": {}, "digests": {"params": digest(params)}}
        checkpointer = self._open(copied=1 + max(x.nbytes for x in jax.tree.leaves(params)))
        checkpointer.save_checkpointables(step, {"params": params}, custom_metadata=about, overwrite=True)
        checkpointer.close()
        self._orbax.reload()

    def _newest_sound(self, abstract, note, steps=None):
        steps = self.steps() if steps is None else steps
        for step in steps:
            fault = ""
            try:
                parts = self._orbax.load_checkpointables(step, abstract)
                about = self._orbax.checkpointables_metadata(step).custom_metadata
            except Exception as error:  # Orbax raises many kinds; each means that this step is unusable
                fault = _reason(error)
            if not hosts.everywhere(not fault):  # each reads its own part
                note(f"checkpoint {step} in {self.directory} cannot be read: {fault or 'by another host'}")
                continue
            bad = [
                f"{name}/{path}"
                for name, part in parts.items()
                for path, value in digest(part).items()
                if about["digests"][name].get(path) != value
            ]
            if not bad:
                return step, parts, about
            note(f"checkpoint {step} in {self.directory} is damaged: {', '.join(bad[:3])} differ from what was saved")
        if steps:
            raise ValueError(
                f"no sound checkpoint among steps {steps} in {self.directory}; "
                "move the folder away to start again, or restore it from a copy"
            )
        return None


def leave_out(params, paths):
    """Nested parameters without those at `paths`."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: x for path, x in flat.items() if path not in paths}, sep="/")


@contextlib.contextmanager
def _written_to(directory):
    """Names the folder in errors of its disk, which come without one from behind Orbax's threads."""
    try:
        yield
    except Exception as error:  # of whatever kind Orbax wraps an error of the disk in
        for one in chain_of(error):
            if isinstance(one, OSError) and one.errno is not None and one.filename is None:
                raise OSError(one.errno, os.strerror(one.errno), str(directory)) from error
        raise


def digest(tree) -> dict[str, int]:
    """A number per leaf that any flipped bit changes; the same on every mesh."""
    flat = {jax.tree_util.keystr(k, simple=True, separator="/"): x for k, x in jax.tree.leaves_with_path(tree)}
    return {path: int(value) for path, value in jax.device_get(_digests(flat)).items()}


def digest_of_host(x) -> int:
    """The digest of a numpy array, of which little is copied to a device at a time."""
    flat = x.reshape(-1)

    def add(start):
        piece = flat[start : start + PIECE]
        rest = (1 << (piece.size - 1).bit_length()) - piece.size  # zeros count nothing, and few sizes are compiled
        piece = np.concatenate([piece, np.zeros(rest, piece.dtype)]) if rest else piece
        return int(_sum_of_blocks(piece, np.uint32(start % 2**32)))

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(add, range(0, flat.size, PIECE))) % 2**32


@jax.jit
def _sum_of_blocks(x, first):
    """`_sum` of a flat array, a block that stays in the cache at a time."""
    blocks = x.reshape(-1, min(x.size, BLOCK))

    def add(i, total):
        block = jax.lax.dynamic_index_in_dim(blocks, i, keepdims=False)
        return total + _sum(block, first + jnp.asarray(i, jnp.uint32) * jnp.uint32(BLOCK))

    return jax.lax.fori_loop(0, len(blocks), add, jnp.uint32(0))


@jax.jit
def _digests(flat):
    return {path: _digest(x) for path, x in flat.items()}


@jax.jit
def _digest(x):
    """Of one leaf; compiled into `_digests`, but traced once for all leaves of a shape."""
    if x.ndim < 3:
        return _sum(x, jnp.uint32(0))
    each = jnp.uint32(math.prod(x.shape[1:]))

    def add(i, total):
        # A layer at a time, as the compiler for CPUs stores every term of a sum; behind the barrier, as it would
        # convert all layers at once before the loop.
        layers = jax.lax.optimization_barrier((x, i))[0]
        return total + _sum(
            jax.lax.dynamic_index_in_dim(layers, i, keepdims=False), jnp.asarray(i, jnp.uint32) * each
        )

    return jax.lax.fori_loop(0, len(x), add, jnp.uint32(0))


def _sum(x, first):
    """Of the bits of `x`, weighted by their places, counted from `first`."""
    bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # An odd weight a position, mod 2^32: swapped values change the sum too.
    return (bits * ((first + index) * jnp.uint32(2654435762) + jnp.uint32(1))).sum(dtype=jnp.uint32)


def _parts(state):
    train = {"opt_state": state.opt_state, "skipped": state.skipped, "skipped_in_row": state.skipped_in_row}
    return {"params": state.params, "train": train}


def _reason(error):
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
