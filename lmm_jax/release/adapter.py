"""The adapters of a run alone, as a folder that PEFT loads beside the model that the run began with."""

import json
import sys

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import sharding
from lmm_jax.config import read_config
from lmm_jax.hf import peft, safetensors, write_config
from lmm_jax.training import adapters
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.saved import check_holds_step
from lmm_jax.training.state import abstract_params, make_program


def export_adapter(workdir, folder) -> list[str]:
    """Writes the adapters of the newest sound checkpoint of a workdir in PEFT's layout, in float32.

    Args:
      workdir: of `lmm train`, with `lora.rank`.
      folder: to write; it must not exist.

    Returns:
      names of the files.

    Raises:
      FileExistsError: the folder is there.
      ValueError: the run has no adapters, or trained what such a folder cannot hold; or no sound checkpoint.
    """
    workdir, folder = epath.Path(workdir), epath.Path(folder)
    config = read_config(workdir / "config.json")
    if not config.lora.rank:
        raise ValueError(f"{workdir} trained no adapters (lora.rank=0): export the whole model, without --adapter")
    program = make_program(config, sharding.make_mesh({"fsdp": -1}))
    whole = write_config.architecture(adapters.plain_config(config))
    planned = flatten_dict(abstract_params(program), sep="/")
    others = [path for path, rate in program.rates.items() if rate and not adapters.is_adapter(path)]
    if any(path.startswith("router/") for path in others):
        print(f"the router of {workdir} is left out: no layout of others has a place for it", file=sys.stderr)
    others = [path for path in others if not path.startswith("router/")]
    if others:
        raise ValueError(
            f"{workdir} trained {len(others)} parameters beside its adapters, such as {others[0]}, which a folder of "
            "adapters does not hold: export it merged, without --adapter"
        )
    check_holds_step(workdir)
    plain = {path: x.shape for path, x in planned.items() if not adapters.is_adapter(path)}
    layers = adapters.layers(planned)
    modules = peft.modules(config.model, whole, plain, layers)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; move it away, or name another folder")
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():  # of an export that was killed
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        _write(partial, Checkpoints(workdir), planned, modules, config.lora.rank)
        keys = peft.config_keys(config.lora, adapters.alpha(config.lora), [m[0] for m in modules], _base(config))
        (partial / peft.CONFIG).write_text(json.dumps(keys, indent=1) + "\n")
        partial.rename(folder)
    except BaseException:
        partial.rmtree()
        raise
    return sorted(path.name for path in folder.iterdir())


def _base(config):
    """The folder of the one model that a run began with; None where PEFT could not load it by that."""
    folders = {config.init[part] for part in ("vision", "language", "projector")}
    return folders.pop() if len(folders) == 1 else None


def _write(folder, checkpoints, planned, modules, rank):
    """Writes the tensors of the newest sound step."""
    shapes = {}
    for module, _, _, (outputs, inputs) in modules:
        shapes[peft.tensor_name(module, "A")] = (rank, inputs)
        shapes[peft.tensor_name(module, "B")] = (outputs, rank)
    damaged = []
    for step in checkpoints.steps():
        try:
            (name,) = safetensors.write(
                folder, shapes, "float32", _tensors(checkpoints, step, planned, modules, rank)
            )
        except ValueError as error:
            damaged.append(str(error))
            continue
        (folder / name).rename(folder / peft.WEIGHTS)
        return
    raise ValueError("\n".join(damaged))


def _tensors(checkpoints, step, planned, modules, rank):
    """The tensors of all modules, of which a layer's are read once."""
    before, arrays = None, ()
    for module, layer, number, (outputs, inputs) in modules:
        if layer != before:
            paths = {f"{layer}/{leaf}": planned[f"{layer}/{leaf}"] for leaf in (adapters.A, adapters.B)}
            found = dict(checkpoints.stream_params(step, unflatten_dict(paths, sep="/")))
            before, arrays = layer, [found[path] for path in paths]
        a, b = arrays if number is None else (x[number] for x in arrays)
        yield peft.tensor_name(module, "A"), np.ascontiguousarray(a.reshape(inputs, rank).T)
        yield peft.tensor_name(module, "B"), np.ascontiguousarray(b.reshape(rank, outputs).T)
