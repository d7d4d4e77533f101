"""Checkpoints of adapters: what they leave out lies where the run began, and is read from there again.

A run with adapters (`config.lora`) saves what trains, not the frozen parameters that `config.init` gave it. With each
step it saves where those lie and a digest of each, so that a base that was changed is refused, never used. Everything
is saved where a base could not be told to be the same to the bit: a run that began with random parameters, or with a
workdir that has adapters itself, which are merged when they are read.
"""

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import sharding, storage
from lmm_jax.config import ConfigError, read_config
from lmm_jax.hf.load import PARTS, check_part, load_part, part_reader
from lmm_jax.training import adapters
from lmm_jax.training.blocks import recut, runs_of
from lmm_jax.training.checkpoint import Checkpoints, leave_out
from lmm_jax.training.digest import digest, digest_of_host
from lmm_jax.training.saved import saved_base
from lmm_jax.training.state import abstract_params, abstract_state, make_program


def left_out(program) -> set[str]:
    """Paths of the parameters that checkpoints of a run leave out, known before it begins."""
    workdir = program.config.init["from"]
    if workdir and program.config.lora.rank and read_config(epath.Path(workdir) / "config.json").lora.rank:
        return set()
    return taken(program)


def taken(program) -> set[str]:
    """Paths of the frozen parameters that a run with adapters takes from what `config.init` names."""
    config = program.config
    init = config.init
    if not config.lora.rank:
        return set()
    flat = flatten_dict(abstract_params(program), sep="/")
    given = set(flat) if init["from"] else {name for part in PARTS if init[part] for name in PARTS[part]}
    new = [prefix.rstrip("/") for prefix in init.new]
    return {
        path
        for path in flat
        if program.rates[path] == 0
        and not adapters.is_adapter(path)
        and (path in given or path.split("/")[0] in given)
        and not any(path == prefix or path.startswith(prefix + "/") for prefix in new)
    }


def describe(program, params, step) -> dict | None:
    """What is saved of the parameters that checkpoints leave out, see `Checkpoints.save`; None if there are none.

    Args:
      program: of the run.
      params: those that it begins with.
      step: of the workdir that they come from; None from others' folders.
    """
    paths = left_out(program)
    if not paths:
        return None
    flat = flatten_dict(params, sep="/")
    init = program.config.init
    folders = {name: str(storage.absolute(init[name])) for name in ("from", *PARTS) if init[name]}
    return {"init": folders, "step": step, "digests": digest({path: flat[path] for path in paths})}


def find(config, base, workdir) -> dict:
    """The folders of a base by field of `config.init`: as the config names them, or where they lay at first.

    Raises:
      ConfigError: one is not there.
    """
    out = {}
    for name, recorded in base["init"].items():
        named = config.init[name]
        there = next((folder for folder in (named, recorded) if folder and epath.Path(folder).is_dir()), None)
        if there is None:
            raise ConfigError(
                f"{workdir} holds adapters and what else it trained; the rest of its parameters lie in init.{name}="
                f"{named}, which is not there (it was {recorded}): put it back, or write into {workdir}/config.json "
                "where it lies now"
            )
        out[name] = there
    return out


def restore(checkpoints, program, workdir, note=print):
    """`(state, about, base)` of the newest sound step of a run, base as `describe` gave it; None if there is none.

    Raises:
      ConfigError: the base is not there, cannot be read, or is another.
      ValueError: there are steps and none is sound.
    """
    base, abstract = saved_base(workdir), abstract_state(program)
    if base is not None:
        abstract = abstract.replace(params=leave_out(abstract.params, base["digests"]))
    restored = checkpoints.restore(abstract, note)
    if restored is None:
        return None
    state, about = restored
    return state.replace(params=_with_base(program, state.params, base, workdir, note)), about, base


def restore_params(workdir, plain, note=print):
    """The parameters of the newest sound step of a workdir, adapters merged in float32, and that step.

    Args:
      workdir: of `lmm train`.
      plain: `Program` of its config without adapters, see `adapters.plain_config`.
      note: called with a line for each step that is damaged.

    Raises:
      ConfigError: see `restore`.
      ValueError: no sound step.
    """
    config = read_config(epath.Path(workdir) / "config.json")
    if not config.lora.rank and config.optimizer.frozen_dtype == "float32":
        return Checkpoints(workdir).restore_params(abstract_params(plain), note)
    program = make_program(config, plain.mesh)
    base, abstract = saved_base(workdir), abstract_params(program)
    if base is not None:
        abstract = leave_out(abstract, base["digests"])
    params, step = Checkpoints(workdir).restore_params(abstract, note)
    params = _with_base(program, params, base, workdir, note)
    return adapters.merge(params, plain.shardings.params), step


def _with_base(program, params, base, workdir, note):
    """Parameters with those that a checkpoint left out."""
    if base is None:
        return params
    flat = flatten_dict(params, sep="/") | _read(program, base, workdir, note)
    return unflatten_dict(flat, sep="/")


def _read(program, base, workdir, note):
    """The parameters of a base, flat, each where it is planned to be."""
    config, folders = program.config, find(program.config, base, workdir)
    planned = flatten_dict(abstract_params(program), sep="/")
    try:
        if "from" in folders:
            old = make_program(read_config(epath.Path(folders["from"]) / "config.json"), program.mesh)
            found, _ = Checkpoints(folders["from"]).restore_params(abstract_params(old), note, base["step"])
            found = recut(flatten_dict(found, sep="/"), planned)
        else:
            found, plain = {}, adapters.without(abstract_params(program))
            for part, folder in folders.items():
                check_part(folder, part, config.model)
                options = (tuple(config.init.new), config.init.allow_pickle)
                found |= load_part(folder, part, config.model, plain, *options)[0]
    except (ValueError, OSError) as error:
        raise _unreadable(workdir, folders, base, error) from error
    missing = [path for path in base["digests"] if path not in found or found[path].shape != planned[path].shape]
    if missing:
        raise _another(workdir, folders, missing)
    out = {}
    for path in base["digests"]:
        x = planned[path]
        out[path] = jax.device_put(found.pop(path).astype(x.dtype), x.sharding)
    wrong = [path for path, value in digest(out).items() if value != base["digests"][path]]
    if wrong:
        raise _another(workdir, folders, wrong)
    return out


def _unreadable(workdir, folders, base, error):
    of_step = "" if base["step"] is None else f", of which step {base['step']} is needed"
    return ConfigError(
        f"{workdir} holds adapters and what else it trained; the rest of its parameters lie in {_names(folders)}"
        f"{of_step}, and cannot be read: {error}"
    )


def _another(workdir, folders, paths):
    return ConfigError(
        f"{_names(folders)} is not what {workdir} was trained on: {len(paths)} parameters there are others, such as "
        f"{paths[0]}; its adapters mean nothing beside them, so restore it from a copy"
    )


def _names(folders):
    return " and ".join(dict.fromkeys(map(str, folders.values())))


def stream_params(checkpoints, step, abstract, config, workdir):
    """As `Checkpoints.stream_params`, but a run's adapters are merged in float32, and its base is read as needed.

    Args:
      checkpoints: of the workdir.
      step: of them.
      abstract: nested, without adapters.
      config: that the workdir was trained with.
      workdir: of the run.

    Raises:
      ConfigError: see `restore`.
      ValueError: see `Checkpoints.stream_params`.
    """
    if not config.lora.rank:
        yield from checkpoints.stream_params(step, abstract)
        return
    program = make_program(config, sharding.make_mesh({"fsdp": -1}))
    planned, base = flatten_dict(abstract_params(program), sep="/"), saved_base(workdir)
    read_base = None if base is None else _host_reader(program, base, workdir)

    def saved(path):
        return next(checkpoints.stream_params(step, unflatten_dict({path: planned[path]}, sep="/")))[1]

    for path in flatten_dict(abstract, sep="/"):
        array = read_base(path) if base is not None and path in base["digests"] else saved(path)
        layer, _, leaf = path.rpartition("/")
        if leaf == "kernel" and f"{layer}/{adapters.A}" in planned:
            parts = [saved(f"{layer}/{name}") for name in adapters.LEAVES]
            array = adapters.merge_on_host(array, *parts)
        yield path, array
        del array


def _host_reader(program, base, workdir):
    """A function from the path of a parameter of a base to its array in memory of this host, checked."""
    config, folders = program.config, find(program.config, base, workdir)
    planned = flatten_dict(abstract_params(program), sep="/")
    if "from" in folders:
        raw = _reader_of_workdir(folders["from"], base["step"], program, planned)
    else:
        plain, options = (
            adapters.without(abstract_params(program)),
            (tuple(config.init.new), config.init.allow_pickle),
        )
        readers = {
            name: part_reader(folder, part, config.model, plain, *options)
            for part, folder in folders.items()
            for name in PARTS[part]
        }

        def raw(path):
            return readers[path.split("/")[0]](path)

    def read(path):
        try:
            array = np.asarray(raw(path)).astype(planned[path].dtype, copy=False)
        except (ValueError, OSError) as error:
            raise _unreadable(workdir, folders, base, error) from error
        if array.shape != planned[path].shape or digest_of_host(array) != base["digests"][path]:
            raise _another(workdir, folders, [path])
        return array

    return read


def _reader_of_workdir(folder, step, program, planned):
    old = make_program(read_config(epath.Path(folder) / "config.json"), program.mesh)
    abstract, source = flatten_dict(abstract_params(old), sep="/"), Checkpoints(folder)

    def one(path):
        return next(source.stream_params(step, unflatten_dict({path: abstract[path]}, sep="/")))[1]

    def read(path):
        if path in abstract and abstract[path].shape == planned[path].shape:
            return one(path)
        cut = {name: one(name) for name in runs_of(path, abstract)}
        return recut(cut, {name: planned[name] for name in runs_of(path, planned)})[path]

    return read
