"""What a run or a model takes in memory and on disk, and what is there: asked before anything is allocated."""

import dataclasses
import errno
import math
import os
import pathlib

import jax
from flax.traverse_util import flatten_dict

from lmm_jax import free_memory, storage
from lmm_jax.config import ConfigError
from lmm_jax.training import optimizer
from lmm_jax.training.state import abstract_params, abstract_state

GIB = 2**30
READER = 2**28  # bytes that a reader process takes for Python and its libraries alone


@dataclasses.dataclass(frozen=True)
class Memory:
    """What arrays take of the memory that they lie in, bytes.

    Attributes:
      parameters: number of parameters.
      state: bytes of the arrays that stay, over all devices.
      needed: bytes that this process needs at least: of a device, or of the host where devices are its processors.
      there: bytes that are free for them; None where it cannot be known.
      device: whether `needed` and `there` are of one device, not of the host.
      kind: of the devices, in JAX's words.
    """

    parameters: int
    state: int
    needed: int
    there: int | None
    device: bool
    kind: str

    def __str__(self):
        where = "a device" if self.device else "this host"
        there = "unknown" if self.there is None else f"{self.there / GIB:,.1f} GiB"
        return (
            f"{self.parameters:,} parameters, {self.state / GIB:,.2f} GiB of state; {where} ({self.kind}) needs at "
            f"least {self.needed / GIB:,.2f} GiB of the {there} that are free"
        )

    @property
    def fits(self) -> bool:
        """Whether as much is there as is needed at least, as far as is known."""
        return self.there is None or self.needed <= self.there


def of_training(program) -> Memory:
    """What the state of a run takes, and the gradients that come on top of it in each step.

    Activations and batches are not counted: `lmm compile` says what a step takes.

    Args:
      program: of the run, see `state.make_program`.
    """
    state = abstract_state(program)
    trainable, _ = optimizer.split(state.params, program.rates)
    return _memory(program, jax.tree.leaves(state), list(trainable.values()))


def of_params(program, dtype=None) -> Memory:
    """What the parameters of a model take that is only asked, of `dtype` or float32."""
    return _memory(program, jax.tree.leaves(abstract_params(program, dtype)), [])


def check_training(program):
    """The `Memory` of a run; ConfigError if it cannot fit, naming the fields that change it."""
    memory = of_training(program)
    if not memory.fits:
        config = program.config
        decoder, devices = config.model.decoder, math.prod(program.mesh.shape.values())
        raise ConfigError(
            f"this run cannot fit: {memory}. Set a smaller model (model.decoder.width={decoder.width}, "
            f"model.decoder.depth={decoder.depth}), freeze more of it (optimizer.groups, lora.rank), store "
            "less (optimizer.moments, optimizer.second_moment), or share it out over more devices (mesh.fsdp, "
            f"mesh.tensor; here are {devices}). `lmm compile` says what it takes on a TPU slice"
        )
    return memory


def check_params(program, dtype=None):
    """The `Memory` of a model's parameters; ValueError if they cannot fit."""
    memory = of_params(program, dtype)
    if not memory.fits:
        raise ValueError(
            f"this model cannot fit: {memory}. Load it where more devices are, or use a smaller one; `lmm compile "
            "--step decode` says what it takes on a TPU slice"
        )
    return memory


def check_batches(program, packs, state):
    """Raises ConfigError if this host cannot hold the batches that it reads ahead.

    Args:
      program: of the run.
      packs: its `data.pipeline.Packs`.
      state: the `Memory` of its state.
    """
    data, hosts = program.config.data, jax.process_count()
    ahead = 3 + 2 * data.threads * max(data.workers, 1)  # what the readers hold, two on their way, one in use
    size = packs.layout.bytes * -(-packs.per_step // hosts)
    readers = data.workers * READER
    free = free_memory.of_host()
    left = None if free is None else free - (0 if state.device else state.needed)
    if left is not None and readers > left:
        raise ConfigError(
            f"data.workers={data.workers}: as many reader processes need {readers / GIB:,.1f} GiB of the "
            f"{left / GIB:,.1f} GiB that this host has left; set at most {os.cpu_count()}, one for each processor"
        )
    if left is not None and ahead * size + readers > left:
        raise ConfigError(
            f"train.batch_size={packs.per_step} packs of {packs.layout.bytes / 2**20:,.1f} MiB: the {ahead} batches "
            f"that are read ahead need {ahead * size / GIB:,.1f} GiB of the {left / GIB:,.1f} GiB that this host has "
            "left; set a smaller train.batch_size, data.threads or data.workers"
        )


def check_disk(program, workdir, memory, left_out=(), goes_on=False):
    """Makes sure that the disk that a workdir lies on can hold the checkpoints of a run.

    A new one is written before the oldest is deleted, so that it takes one more than `train.keep`.

    Args:
      program: of the run.
      workdir: of the run.
      memory: the `Memory` of its state.
      left_out: paths of the parameters that they leave out, see `base.left_out`.
      goes_on: whether checkpoints of the run are there, so that it had room before.

    Raises:
      ConfigError: it cannot, so that the run should not begin.
      OSError: it cannot now, as something else has filled it.
    """
    if storage.is_remote(workdir):
        return
    train, size = program.config.train, memory.state
    if left_out:
        flat = flatten_dict(abstract_params(program), sep="/")
        size -= sum(math.prod(flat[path].shape) * flat[path].dtype.itemsize for path in left_out)
    count = min(train.keep + 1, -(-train.steps // train.save_every))
    free = storage.free_bytes(workdir, of=pathlib.Path(workdir) / "checkpoints")
    if count * size > free and goes_on:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir))
    if count * size > free:
        raise ConfigError(
            f"{workdir}: {count} checkpoints of {storage.amount(size)} do not fit the {storage.amount(free)} that "
            "are free on its disk; make room, choose another workdir, or a smaller train.keep"
        )


def _memory(program, stays, comes):
    """Of leaves that stay and of leaves that come on top of them, with shardings."""
    devices = [d for d in program.mesh.devices.flat if d.process_index == jax.process_index()]
    first = devices[0]
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in (*stays, *comes))
    on_host = first.platform == "cpu"
    return Memory(
        parameters=sum(x.size for x in jax.tree.leaves(program.boxed)),
        state=sum(math.prod(x.shape) * x.dtype.itemsize for x in stays),
        needed=held * len(devices) if on_host else held,
        there=free_memory.of_host() if on_host else free_memory.of_device(first),
        device=not on_host,
        kind=first.device_kind,
    )
