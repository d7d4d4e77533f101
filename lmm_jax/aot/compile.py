"""Compiles the real training, prefill or decode step for TPU slices on a machine without one: fit, traffic, cost."""

import contextlib
import dataclasses
import math
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax import sharding
from lmm_jax.aot import collectives
from lmm_jax.aot import topology as slices
from lmm_jax.aot.flops import executed_flops, inference_flops, step_flops
from lmm_jax.aot.hlo import Module
from lmm_jax.aot.savings import savings
from lmm_jax.config import choose, visual_layout
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.models.decoder import KVCache
from lmm_jax.training import optimizer
from lmm_jax.training.state import abstract_params, abstract_state, make_program
from lmm_jax.training.step import jit_train_step

NEW_TOKENS = 64  # room in a cache behind the prompt
QUESTIONS = 4  # for each view of a pack, that a router learns from: a guess, as the data decide it


def compile(config, topology, step="train", prompts=None) -> dict:
    """Compiles a step of `config` for a TPU slice, or several, without a TPU.

    The config's mesh is laid over the slice, and state and batch are abstract, so that a 7B model takes as little
    memory here as a tiny one. XLA and the kernels are those that a TPU VM would use. Several processes may compile
    at a time.

    Args:
      config: from `load_config`; data.rows, data.views and data.targets are those of a pack, where the data would
        decide them if they are open: one row, one picture, every position supervised.
      topology: name of a slice, by chips: "v5e-64"; "2xv5e-64" are two of them, with mesh.data over the slices.
      step: "train": one update. "prefill": reads prompts of data.length positions and fills a cache with room for
        `NEW_TOKENS` more; "decode": one more token of each over that cache; both with bfloat16 parameters.
      prompts: read or continued at a time, over all devices; as many as devices share out packs, if None.

    Returns:
      dict, bytes being those of one device and one step:
      fits: whether the program was compiled within the memory.
      peak_hbm_bytes: the most that is in use at a time, arguments included; None if the compiler does not say.
      hbm_bytes: what there is to use.
      state_bytes: parameters and optimizer.
      memory: arguments by name, `temporaries` (the rest of the peak), and `largest`, what is largest of them then,
        as `(bytes, number and type of arrays, source)`.
      flops, executed_flops: on all devices, see `flops.step_flops` and `flops.executed_flops`.
      collective_bytes: what a device receives and passes on, an all-reduce counting twice; see `collectives.traffic`.
      collectives: the same by link ("ici" or "dcn"), mesh axes and kind.
      savings: what options that store less would save of the state, see `savings.savings`; None if not training.
      minimum_bytes: of what moves parameters and gradients, see `collectives.minimum`; None if not training.
      parameter_bytes: the part of collective_bytes to compare with it: all but what stays on the tensor axis.
      roofline: see `roofline`.
      estimated_cycles: see `hlo.Module.estimated_cycles`; None if the compiler does not say.
      compile_seconds: time that compilation took here.
      devices, mesh, accelerator: of the slice; the last is the cloud's name of it.
      reason: the compiler's words if it does not fit, else "".
      Sums over the program are None if it did not get as far as to have one.

    Raises:
      ConfigError: no such slice or step, or a mesh or batch that does not divide over it.
      ImportError: no libtpu.
    """
    target = slices.find_slice(topology)
    lower = choose("step", step, {"train": _train, "prefill": _prefill, "decode": _decode})
    mesh = slice_mesh(config, target)
    program = make_program(config, mesh)
    lowered, arguments, (flops, executed) = lower(program, prompts)
    parts = {name: device_bytes(tree) for name, tree in arguments.items()}
    result = {
        "topology": topology,
        "step": step,
        "accelerator": target.accelerator,
        "devices": mesh.size,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "hbm_bytes": target.hbm_bytes,
        "state_bytes": sum(size for name, size in parts.items() if name not in ("batch", "cache")),
        "flops": flops,
        "executed_flops": executed,
        "minimum_bytes": collectives.minimum(program) if step == "train" else None,
        "savings": savings(config, mesh) if step == "train" else None,
    }
    peak, seconds, reason, module, live = _compile(lowered)
    moved = module and collectives.traffic(module, mesh)
    total = moved and sum(size for *_, size in _rows(moved))
    return result | {
        "fits": not reason,
        "peak_hbm_bytes": peak,
        "memory": parts | {"temporaries": peak and max(peak - sum(parts.values()), 0), "largest": live[:8]},
        "collective_bytes": total,
        "collectives": moved,
        "parameter_bytes": moved and sum(size for _, axes, _, size in _rows(moved) if axes != "tensor"),
        "roofline": moved and roofline(target, flops, executed, sum(parts.values()), moved),
        "estimated_cycles": module and (module.estimated_cycles() or None),
        "compile_seconds": seconds,
        "reason": reason,
    }


def _compile(lowered):
    """Compiles what `lowered()` returns.

    What lies in memory is in libtpu's own dump alone. So is the program if it needs too much memory, or if jaxlib
    cannot read it, as those for tpu7x; but the dump does not hold the expected cycles.

    Returns:
      Bytes needed at the peak, seconds, the compiler's words if that is too much (else ""), the `hlo.Module`, and
      what lies in memory at the peak, see `hlo.Module.live_at_peak`.
    """
    text = None
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        try:
            compiled = lowered().compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            peak, reason = needed_bytes(str(error)), str(error).splitlines()[0]
        else:
            peak, reason = compiled.memory_analysis().peak_memory_in_bytes, ""
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                text = compiled.as_text()
        seconds = time.monotonic() - begin
        dumped = {path.name.rpartition(".after_optimizations")[2]: path for path in pathlib.Path(folder).iterdir()}
        if ".txt" not in dumped:
            return peak, seconds, reason, text and Module(text), []
        module = Module(dumped[".txt"].read_text())
        live = module.live_at_peak(dumped["-live-range.txt"].read_text())
        return peak, seconds, reason, Module(text) if text else module, live


def slice_mesh(config, target):
    """The config's mesh over a `topology.Slice`; over several its data axis is theirs, if it was left at 1."""
    sizes = dict(config.mesh)
    if target.slices > 1 and sizes.get("data", 1) == 1:
        sizes["data"] = target.slices
    return sharding.make_mesh(sizes, slices.devices(target))


def _train(program, _):
    state, batch = abstract_state(program), abstract_batch(program.config, program.mesh)
    trained, frozen = optimizer.split(state.params, program.rates)
    parts = {"trained parameters": trained, "frozen parameters": frozen, "optimizer": state.opt_state, "batch": batch}

    def lowered():
        with program.use():
            return jit_train_step(program).lower(state, batch)

    return lowered, parts, (step_flops(program, batch), executed_flops(program, batch))


def _prefill(program, prompts):
    params, batch, size, scale = _inference(program, prompts)
    _, placed = _cache(program, len(batch["id"]), size)

    def prefill(params, batch):
        hidden, cache = program.model.apply({"params": params}, batch, size, (scale,), method="prefill")
        return program.model.apply({"params": params}, hidden, method="logits"), cache

    def lowered():
        with program.use():
            return jax.jit(prefill, out_shardings=(None, placed)).lower(params, batch)

    flops = inference_flops(prefill, params, batch)
    return lowered, {"parameters": params, "batch": batch}, (flops, flops)


def _decode(program, prompts):
    params, batch, size, _ = _inference(program, prompts)
    cache, placed = _cache(program, len(batch["id"]), size)
    tokens = jax.ShapeDtypeStruct(batch["id"].shape[:1], jnp.int32, sharding=cache.length.sharding)

    def decode(params, tokens, cache):
        hidden, cache = program.model.apply({"params": params}, tokens, cache, method="decode")
        return program.model.apply({"params": params}, hidden, method="logits"), cache

    def lowered():
        with program.use():
            return jax.jit(decode, donate_argnums=2, out_shardings=(None, placed)).lower(params, tokens, cache)

    flops = inference_flops(decode, params, tokens, cache)
    return lowered, {"parameters": params, "cache": cache}, (flops, flops)


def _inference(program, prompts):
    """Abstract bfloat16 parameters and a batch of `prompts`, the cache's positions, and the largest scale."""
    config, mesh = program.config, program.mesh
    prompts = prompts or math.prod(mesh.shape[axis] for axis in jax.tree.leaves([config.rules.get("batch")]))
    layout, scale = PackLayout.from_config(config, visual_layout(config)), max(config.model.scales)
    pack = dataclasses.replace(layout, scales=(scale,), rows=1, targets=0).assemble([], [])
    sharding.check_packs(mesh, config.rules, prompts, "prompts")
    placed = jax.NamedSharding(mesh, jax.P(*sharding.batch_sharding(mesh, config.rules).spec[1:]))
    batch = {name: jax.ShapeDtypeStruct((prompts, *x.shape), x.dtype, sharding=placed) for name, x in pack.items()}
    return abstract_params(program, jnp.bfloat16), batch, layout.length + NEW_TOKENS, scale


def _cache(program, prompts, size):
    """An abstract `KVCache`, rows over the batch axes and heads over theirs, and its shardings."""
    decoder = program.model.decoder
    shape = (decoder.depth, prompts, decoder.kv_heads, size, decoder.head_width)
    with program.use():
        spec = sharding.partition(shape, None, "batch", "kv_heads", None, None)
    placed, rows = jax.NamedSharding(program.mesh, spec), jax.NamedSharding(program.mesh, jax.P(spec[1]))
    one = sharding.replicated(program.mesh)
    filled = jax.ShapeDtypeStruct(shape, decoder.dtype, sharding=placed)
    end = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
    of_row = jax.ShapeDtypeStruct((prompts,), jnp.int32, sharding=rows)
    return KVCache(filled, filled, end, of_row, of_row), KVCache(placed, placed, one, rows, rows)


def abstract_batch(config, mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch `[micro-batches, packs, …]` of the config's shapes, with its sharding.

    Raises:
      ValueError: packs that do not divide over the mesh.
    """
    layout, train = PackLayout.from_config(config, visual_layout(config)), config.train
    targets = config.data.targets or layout.rows * layout.length
    questions = QUESTIONS * max(layout.views, 1) if config.model.router.width else 0
    pack = dataclasses.replace(layout, targets=targets, questions=questions).assemble([], [])
    shape = (train.micro_batches, train.batch_size // train.micro_batches)
    sharding.check_packs(mesh, config.rules, shape[1])
    placed = sharding.batch_sharding(mesh, config.rules)
    return {name: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype, sharding=placed) for name, x in pack.items()}


def roofline(target, flops, executed, argument_bytes, moved) -> dict:
    """The least time that a step can take on `target`, by the rates of `topology.CHIPS`.

    Arithmetic, memory and both networks are taken to run beside each other, each at its published rate: matrix
    products at the peak, with those that are computed again to save memory; memory that reads each argument once;
    links that all receive at a time, in a whole torus. A real step takes longer.

    Args:
      target: a `topology.Slice`.
      flops, executed: of the step on all devices, without and with what is computed again.
      argument_bytes: of a device.
      moved: what `collectives.traffic` returned.

    Returns:
      dict of `seconds` by part ("compute", "memory", "ici", "dcn"), their maximum `step_seconds`, the part that
      `limits` it, and `mfu`: flops that the step does in that time, as a share of the peak.
    """
    chip = target.chip
    chips = target.devices // chip.devices
    links = {link: sum(size for by_link, *_, size in _rows(moved) if by_link == link) for link in ("ici", "dcn")}
    seconds = {
        "compute": executed / chips / chip.flops,
        "memory": argument_bytes * chip.devices / chip.hbm_rate,
        "ici": links["ici"] * chip.devices / chip.ici_rate,
        "dcn": links["dcn"] * chip.devices / chip.dcn_rate,
    }
    limits = max(seconds, key=seconds.get)
    return {
        "seconds": seconds,
        "step_seconds": seconds[limits],
        "limits": limits,
        "mfu": flops / chips / chip.flops / seconds[limits],
    }


def needed_bytes(message) -> int | None:
    """Bytes that a RESOURCE_EXHAUSTED message says a program would need; None if it does not say."""
    found = re.search(r"(?:Used|required for[^(]*\() ?([\d.]+)([KMG])", message)
    return found and int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def device_bytes(tree) -> int:
    """Bytes that one device holds of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in leaves)


def _rows(moved):
    """`(link, axes, kind, bytes)` of what `collectives.traffic` returned."""
    return [
        (link, axes, kind, size)
        for link, by_axes in moved.items()
        for axes, by_kind in by_axes.items()
        for kind, size in by_kind.items()
    ]
