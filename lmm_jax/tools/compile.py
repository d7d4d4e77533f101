"""Compiles the real training step for a TPU slice on a machine without one: does it fit, and what will it cost."""

import dataclasses
import importlib.util
import math
import os
import re
import time

import jax
import numpy as np
from jax.experimental import topologies

from lmm_jax import sharding
from lmm_jax.config import choose
from lmm_jax.data.layout import Layout
from lmm_jax.tools.hlo import Module
from lmm_jax.training.flops import step_flops
from lmm_jax.training.state import abstract_state, make_program
from lmm_jax.training.step import jit_train_step

GRIDS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
GRIDS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
      grids: its slices, number of chips to grid.
      hbm: GiB that a program may use of a device's memory, as libtpu 0.0.51 says when one needs more.
      cloud: name of its slices in Google Cloud, before the number.
      cores: of a chip that the cloud's number counts.
    """

    grids: dict[int, str]
    hbm: float
    cloud: str
    cores: int


CHIPS = {
    "v5e": Chip(GRIDS_2D, 15.75, "v5litepod", 1),
    "v6e": Chip(GRIDS_2D, 31.24, "v6e", 1),
    "v5p": Chip(GRIDS_3D, 95.73, "v5p", 2),
    "tpu7x": Chip(GRIDS_3D, 94.74, "tpu7x", 2),  # two devices a chip
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice: `grid` as libtpu names it, `accelerator` as the cloud does, `hbm_bytes` usable of a device."""

    grid: str
    accelerator: str
    hbm_bytes: int


def find_slice(topology) -> Slice:
    """The slice of a name that counts chips, such as "v5e-64".

    Raises:
      ConfigError: no such name; the message lists them.
    """
    names = {f"{kind}-{chips}": (kind, chips) for kind, chip in CHIPS.items() for chips in chip.grids}
    kind, chips = choose("topology", topology, names)
    chip = CHIPS[kind]
    return Slice(f"{kind}:{chip.grids[chips]}", f"{chip.cloud}-{chips * chip.cores}", int(chip.hbm * 2**30))


def compile(config, topology) -> dict:
    """Compiles the training step of `config` for a TPU slice, without a TPU.

    The config's mesh is laid over the slice, and the state and a batch of the config's shapes are abstract, so that
    a 7B model takes as little memory here as a tiny one. XLA and the kernels are those that a TPU VM would use.

    Args:
      config: from `load_config`; data.rows, data.views and data.targets are those of a pack, where the data would
        decide them if they are open: one row, one picture, every position supervised.
      topology: name of a slice, by chips: "v5e-64".

    Returns:
      dict, bytes being those of one device:
      fits: whether the program was compiled within the memory.
      peak_hbm_bytes: the most that is in use at a time, arguments included; None if the compiler does not say.
      hbm_bytes: what there is to use.
      state_bytes: parameters and optimizer.
      flops: of one step on all devices, see `flops.step_flops`.
      collective_bytes: what passes through collectives in one step, see `hlo.Module.collective_bytes`.
      collectives: the same by kind.
      estimated_cycles: of one step, see `hlo.Module.estimated_cycles`.
      compile_seconds: time that compilation took here.
      devices, mesh, accelerator: of the slice; the last is the cloud's name of it.
      reason: the compiler's words if it does not fit, else "".
      Where it does not fit, sums over the program are None.

    Raises:
      ConfigError: no such slice, or a mesh or batch that does not divide over it.
      ImportError: no libtpu.
    """
    target = find_slice(topology)
    mesh = sharding.make_mesh(config.mesh, _devices(target))
    program = make_program(config, mesh)
    state, batch = abstract_state(program), abstract_batch(config, mesh)
    result = {
        "topology": topology,
        "accelerator": target.accelerator,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "hbm_bytes": target.hbm_bytes,
        "state_bytes": _device_bytes(state),
        "flops": step_flops(program, batch),
    }
    begin = time.monotonic()
    try:
        with program.use():
            compiled = jit_train_step(program).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        peak, module, reason = needed_bytes(str(error)), None, str(error).splitlines()[0]
    else:
        peak, module, reason = compiled.memory_analysis().peak_memory_in_bytes, Module(compiled.as_text()), ""
    collectives = module and module.collective_bytes()
    return result | {
        "fits": module is not None,
        "peak_hbm_bytes": peak,
        "collective_bytes": module and sum(collectives.values()),
        "collectives": collectives,
        "estimated_cycles": module and module.estimated_cycles(),
        "compile_seconds": time.monotonic() - begin,
        "reason": reason,
    }


def abstract_batch(config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch `[micro-batches, packs, …]` of the config's shapes, with its sharding.

    Raises:
      ValueError: packs that do not divide over the mesh.
    """
    layout, train = Layout.from_config(config), config.train
    targets = config.data.targets or layout.rows * layout.length
    pack = dataclasses.replace(layout, targets=targets).assemble([], [])
    shape = (train.micro_batches, train.batch_size // train.micro_batches)
    sharding.check_packs(mesh, config.rules, shape[1])
    placed = sharding.batch_sharding(mesh, config.rules)
    return {name: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype, sharding=placed) for name, x in pack.items()}


def needed_bytes(message) -> int | None:
    """Bytes that a RESOURCE_EXHAUSTED message says a program would need; None if it does not say."""
    found = re.search(r"(?:Used|required for[^(]*\() ?([\d.]+)([KMG])", message)
    return found and int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def report(result) -> str:
    """`compile`'s result in lines for a reader."""
    peak = "more" if result["peak_hbm_bytes"] is None else _size(result["peak_hbm_bytes"])
    mesh = ", ".join(f"{axis} {size}" for axis, size in result["mesh"].items()) or "one device"
    lines = [
        f"{result['topology']} ({result['accelerator']} in Google Cloud): {result['devices']} devices, {mesh}",
        f"{'fits' if result['fits'] else 'does NOT fit'}: needs {peak} a device, parameters and optimizer "
        f"{_size(result['state_bytes'])} of it, {_size(result['hbm_bytes'])} are usable",
        f"{result['flops'] / 1e12:,.3g} TFLOP a step",
    ]
    if result["fits"]:
        kinds = ", ".join(f"{kind} {_size(size)}" for kind, size in result["collectives"].items())
        lines.append(f"{_size(result['collective_bytes'])} a device through collectives: {kinds or 'none'}")
        lines.append(f"{result['estimated_cycles'] / 1e6:,.1f} million cycles, without collectives and own kernels")
    else:
        lines.append(result["reason"])
    return "\n".join([*lines, f"compiled in {result['compile_seconds']:.0f} s"])


def _size(count):
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _devices(target):
    """The devices of a slice that is not there, in the order in which they are neighbours.

    Raises:
      ImportError: no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("compiling for a TPU needs its compiler: pip install 'lmm_jax[compile]' (libtpu)")
    # Without these, libtpu asks for the metadata of a TPU VM for a minute, and lets one process in at a time.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "true")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", target.accelerator)
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    return topologies.get_topology_desc(platform="tpu", topology_name=target.grid).devices


def _device_bytes(tree):
    """Bytes that one device holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)
