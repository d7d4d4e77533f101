"""Checkpoints: Orbax v1, one folder a step, which counts once its manifest is there and proves what it holds.

Orbax notices missing and truncated files, but loads flipped bits silently, and forces nothing to the disk. So a step
has a file of ours, written last: when all other files are on the disk, not only in the system's memory. It holds a
digest of every array (see `digest`), computed on the devices at save and compared after restore, the size of every
file, the number of the step, and what the run says of itself, and it is digested too. Whatever differs from it makes
a step unusable, which is named and passed over; a folder without it was never finished.
"""

import contextlib
import errno
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp

from lmm_jax import errors, storage
from lmm_jax.pods import hosts
from lmm_jax.training.digest import digest, digest_of_host, named
from lmm_jax.training.saved import (
    FORMAT,
    MANIFEST,
    Damaged,
    directory_of,
    of_before,
    read_manifest,
    reason,
    saved_steps,
    sizes_of,
    step_folders,
    write_manifest,
)

DELETED = ".deleted"  # ends the name of a step that is being deleted
TEMPORARY = ".orbax-checkpoint-tmp"  # stands in the name of one that Orbax still writes
CHUNK = 2**28  # bytes of an array that are read at a time, whatever part of it is wanted
SLICE = 2**20  # bytes that a device writes at least of an array that several hold alike
LOOKS, LOOK = 5, 0.2  # after a save that failed: looks for what it left, seconds apart
TRIES, PAUSE = 3, 2.0  # times that a step is read whose place cannot be reached, seconds apart
DAMAGED = "damaged"  # folder of a workdir that steps are moved to which cannot be used


class Checkpoints:
    """The checkpoints of one workdir: `params` and `train` (optimizer state and counters) of each step.

    Attributes:
      directory: that the steps lie in.
    """

    def __init__(self, workdir, keep=2, keep_every=0):
        """Args:
        workdir: of the run.
        keep: newest steps to preserve.
        keep_every: steps whose number it divides are preserved too; 0 for none.
        """
        self.directory, self._keep, self._keep_every = directory_of(workdir), keep, keep_every
        self._saving = None

    def check_room(self, state, base=None):
        """Raises OSError if the disk of this machine has no room for a `TrainState`; see `save`."""
        if jax.process_index() > 0 or storage.is_remote(self.directory):
            return
        needed = sum(x.nbytes for part in _saved_parts(state, base).values() for x in jax.tree.leaves(part))
        if storage.free_bytes(self.directory) < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory))

    def save(
        self,
        state,
        about,
        base=None,
        check_held=lambda: None,
        on_saved=lambda step: None,
        within=lambda what: contextlib.nullcontext(),
    ):
        """Starts saving `state` under its step; returns when the arrays are copied, writing goes on behind.

        Args:
          state: a `TrainState`.
          about: JSON dict that `restore` gives back: what identifies the run and its data.
          base: JSON dict about parameters that are not saved, as they lie elsewhere: "digests" by their paths, and
            whatever else finds them again; None to save all.
          check_held: called behind, on the first host, before anything that was there before changes; raises if the
            workdir is another process's by now, which then is left alone.
          on_saved: called behind, on the first host, with the step once it counts.
          within: of what is done behind, in words, a context that it is done in, such as a limit of time.

        Raises:
          OSError: this save, or the one before, cannot be written.
        """
        self.wait()
        step, parts = int(state.step), _saved_parts(state, base)
        content = self._content(step, parts, about, base)
        try:
            with _written_to(self.directory), _context():
                self.directory.mkdir(parents=True, exist_ok=True)
                saving = ocp.save_checkpointables_async(
                    self.directory / str(step), parts, overwrite=True, custom_metadata={"format": FORMAT}
                )
        except BaseException:
            self._remove_unfinished(looks=LOOKS)
            raise

        def finish():
            with within(f"writing the checkpoint of step {step}"):
                self._finish(saving, content, check_held, on_saved)

        self._saving = _Saving(finish)

    def _content(self, step, parts, about, base):
        digests = {name: digest(part) for name, part in parts.items()}
        return {"format": FORMAT, "step": step, "about": about, "base": base, "digests": digests}

    def _finish(self, saving, content, check_held, on_saved):
        """Waits until Orbax has written a step, and makes it count."""
        saving.result()
        if jax.process_index() > 0:
            return
        folder = self.directory / str(content["step"])
        storage.sync(folder)
        check_held()
        write_manifest(folder, content | {"files": sizes_of(folder)})
        storage.sync_entry(folder)
        on_saved(content["step"])
        check_held()
        try:
            self._forget(content["step"])
        except Exception as error:  # the step counts; what was not deleted will be after the next one
            if not errors.may_pass(error):
                raise

    def _forget(self, saved):
        """Deletes the steps that need not be kept, now that `saved` counts.

        Later ones are damaged, as the run went on from before them.
        """
        steps = self.steps()
        earlier = [step for step in steps if step <= saved]
        for step in [step for step in steps if step > saved] + earlier[self._keep :]:
            if step > saved or not self._keep_every or step % self._keep_every:
                _delete(self.directory / str(step))

    def failed(self) -> bool:
        """Whether the last save is over and went wrong, which `wait` then raises."""
        return self._saving is not None and self._saving.failed()

    def wait(self):
        """Waits until the last save is on disk; raises what went wrong, after which another one may be tried."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                with _written_to(self.directory):
                    saving.wait()
            except BaseException:
                self._remove_unfinished(looks=LOOKS)
                raise

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """Waits, but after an error on one of several hosts: to save takes all of them, and the others go on."""
        if error is None or jax.process_count() == 1:
            self.wait()

    def steps(self) -> list[int]:
        """Steps on disk, newest first."""
        return saved_steps(self.directory.parent)

    def clear_away(self, used=None, note=print):
        """Removes what an earlier process left unfinished, and moves steps that cannot be used out of the way.

        For the one process that writes to the workdir, while no save is under way.

        Args:
          used: the step that the run goes on from, beside which later ones are damaged; None if there is none.
          note: called with a line for each step that is moved.
        """
        if not self.directory.is_dir():
            return
        self._remove_unfinished()
        if storage.is_remote(self.directory):  # a folder cannot be renamed there; one that is saved replaces it
            return
        for step, folder in step_folders(self.directory):
            finished = (folder / MANIFEST).exists()
            if (finished and (used is None or step <= used)) or of_before(folder):
                continue
            place = self.directory.parent / DAMAGED / folder.name
            if place.exists():
                place.rmtree()
            place.parent.mkdir(exist_ok=True)
            shutil.move(folder, place)  # checkpoints may be a link to another disk
            why = "cannot be used" if finished else "was never finished"
            note(f"step {step} {why}; it lies in {place} now, to look at or to delete")

    def _remove_unfinished(self, looks=1):
        """Removes what was being written or deleted; on a disk that is full it is what takes the room.

        Args:
          looks: how often to look, `LOOK` seconds apart: after a save that failed, some of Orbax's threads may still
            write to their files.
        """
        if jax.process_index() > 0:
            return
        for number in range(looks):
            time.sleep(LOOK if number else 0)
            with contextlib.suppress(OSError):
                for path in self.directory.iterdir():
                    if TEMPORARY in path.name or path.name.endswith(DELETED):
                        path.rmtree() if path.is_dir() else path.unlink()

    def restore(self, abstract, note=print):
        """Restores the newest sound step into the shardings of `abstract`.

        Args:
          abstract: `TrainState` of `ShapeDtypeStruct`s with shardings; any mesh.
          note: called with a line for each step that is damaged.

        Returns:
          `(state, about)` as they were saved, or None if nothing was ever saved.

        Raises:
          ValueError: there are checkpoints and none is sound.
        """
        restored = self._newest_sound(_parts(abstract), note)
        if restored is None:
            return None
        step, parts, about = restored
        state = abstract.replace(step=jnp.asarray(step, jnp.int32), params=parts["params"], **parts["train"])
        return state.replace(step=jax.device_put(state.step, abstract.step.sharding)), about

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
            digests = read_manifest(folder)["digests"]["params"]
            stored = flatten_dict(ocp.checkpointables_metadata(folder).metadata["params"], sep="/")
        except Exception as error:  # Orbax raises many kinds; most mean that this step is unusable
            if errors.is_away(error):
                raise
            raise ValueError(
                f"checkpoint {folder} is damaged: what it holds cannot be read: {reason(error)}"
            ) from error
        for path, x in flatten_dict(abstract, sep="/").items():
            if path not in stored or tuple(stored[path].shape) != x.shape:
                raise ValueError(f"checkpoint {folder}: {path} {x.shape} is not there, or has another shape")
            host = np.broadcast_to(
                np.zeros((), stored[path].dtype), stored[path].shape
            )  # asks for one, takes no memory
            try:
                with context:
                    one = ocp.load(folder, unflatten_dict({path: host}, sep="/"), checkpointable_name="params")
            except Exception as error:  # Orbax raises many kinds; most mean that this step is unusable
                if errors.is_away(error):
                    raise
                raise ValueError(f"checkpoint {folder}: {path} cannot be read: {reason(error)}") from error
            one = flatten_dict(one, sep="/")[path]
            if digest_of_host(one) != digests.get(path):
                raise ValueError(f"checkpoint {folder} is damaged: {path} differs from what was saved")
            yield path, one
            del one

    def save_params(self, params, step=0):
        """Saves parameters alone, which a run can start from (`init.from`), in little more memory than they take.

        Returns when they are on disk.
        """
        parts = {"params": params}
        largest = max(x.nbytes for x in jax.tree.leaves(params))
        with _written_to(self.directory), _context(copied=1 + largest):
            self.directory.mkdir(parents=True, exist_ok=True)
            ocp.save_checkpointables(self.directory / str(step), parts, overwrite=True)
            folder = self.directory / str(step)
            storage.sync(folder)
            write_manifest(folder, self._content(step, parts, {}, None) | {"files": sizes_of(folder)})

    def _newest_sound(self, abstract, note, steps=None):
        steps = self.steps() if steps is None else steps
        passing = []  # what kept a step from being read, and may pass
        for step in steps:
            folder, found = self.directory / str(step), {}

            def check(folder=folder, found=found):
                found["content"] = _checked_manifest(folder)

            def load(folder=folder, found=found):
                with _context():
                    found["parts"] = ocp.load_checkpointables(folder, abstract)

            fault = _fault_of(check, passing) or _fault_of(load, passing)
            if fault:
                note(f"checkpoint {step} in {self.directory} cannot be read: {fault}")
                continue
            bad = _differing(found["parts"], found["content"])
            if not bad:
                return step, found["parts"], found["content"]["about"]
            bad = ", ".join(bad[:3])
            note(f"checkpoint {step} in {self.directory} is damaged: {bad} differ from what was saved")
        if passing:
            raise passing[0]
        if steps:
            raise ValueError(
                f"no sound checkpoint among steps {steps} in {self.directory}; "
                "move the folder away to start again, or restore it from a copy"
            )
        return None


def _fault_of(read, passing) -> str:
    """What is wrong with a step, here or on another host, all of which read their own part; "" if nothing.

    All hosts must ask, and then none goes on alone to what takes all of them.

    Args:
      read: reads of the step what this host needs.
      passing: list that an error is added to which may pass, such as one of memory; but it may be the step's, too.

    Raises:
      Exception: the step's place cannot be reached, from this host or another: of the step that says nothing, and an
        older one must not take its place.
    """
    for left in reversed(range(TRIES)):
        fault, away = "", None
        try:
            read()
        except Damaged as error:
            fault = str(error)
        except Exception as error:  # Orbax raises many kinds; all others mean that this step is unusable
            fault, away = reason(error), error if errors.is_away(error) else None
            if away is None and errors.may_pass(error):
                passing.append(error)
        faulty, unreached = hosts.anywhere([bool(fault), away is not None])
        if not faulty:
            return ""
        if not unreached:
            return fault or "another host cannot read it"
        time.sleep(PAUSE if left else 0)
    raise away or OSError(errno.ESTALE, "another host cannot reach a checkpoint")


def _checked_manifest(folder) -> dict:
    """The manifest of a step whose files are all there; Damaged names the first that is not."""
    content = read_manifest(folder)
    found = sizes_of(folder)
    for name, size in content["files"].items():
        if name not in found:
            raise Damaged(f"{folder / name} is missing")
        if found[name] != size:
            raise Damaged(f"{folder / name} has {found[name]} bytes, {size} were written")
    return content


def _differing(parts, content) -> list[str]:
    """Paths of what was restored and is not what was saved."""
    bad = [
        f"{name}/{path}"
        for name, part in parts.items()
        for path, value in digest(part).items()
        if content["digests"][name].get(path) != value
    ]
    if bad or "train" not in parts:
        return bad
    train = parts["train"]
    updates = content["step"] - int(train["skipped"])  # that were not skipped: what the optimizer counts
    counts = [(path, x) for path, x in named(train["opt_state"]).items() if path.split("/")[-1] == "count"]
    return [f"train/opt_state/{path}" for path, x in counts if int(x) != updates]


class _Saving:
    """A save that goes on in a thread of its own."""

    def __init__(self, finish):
        self._error = None
        self._thread = threading.Thread(target=self._run, args=(finish,), name="saving", daemon=True)
        self._thread.start()

    def _run(self, finish):
        try:
            finish()
        except BaseException as error:  # which `wait` raises where it can be acted on
            self._error = error

    def failed(self):
        return not self._thread.is_alive() and self._error is not None

    def wait(self):
        self._thread.join()
        if self._error is not None:
            raise self._error


def _context(copied=None):
    """How Orbax reads and writes; a save copies fewer than `copied` bytes of arrays at a time."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # of weights it saves little, and takes most of the time
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    # To cut an array up is a program for each shape and device, which small ones are not worth.
    context.array.saving.min_slice_bytes_for_replica_parallel = SLICE
    context.memory.transfer_concurrent_bytes = context.memory.write_concurrent_bytes = copied
    return context


def _delete(folder):
    """Deletes a step such that what is left of it, should that be interrupted, is no step."""
    if storage.is_remote(folder):
        (folder / MANIFEST).unlink()
        folder.rmtree()
        return
    gone = folder.parent / f"{folder.name}{DELETED}"
    os.replace(folder, gone)
    storage.sync_entry(gone)
    gone.rmtree()


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
        for one in errors.chain_of(error):
            if isinstance(one, OSError) and one.errno is not None and one.filename is None:
                raise OSError(one.errno, os.strerror(one.errno), str(directory)) from error
        raise


def _saved_parts(state, base):
    """The parts of a train state, without the parameters that are not saved, see `Checkpoints.save`."""
    parts = _parts(state)
    if base is not None:
        parts["params"] = leave_out(parts["params"], base["digests"])
    return parts


def _parts(state):
    """What is saved of a train state: its parameters, which can be read alone, and all else but its step."""
    train = {name: getattr(state, name) for name in ("opt_state", "skipped", "skipped_in_row", "recent")}
    return {"params": state.params, "train": train}
