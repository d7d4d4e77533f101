"""Starting a run with what another one learned."""

import itertools
import re

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.config import ConfigError, read_config
from lmm_jax.hf.load import PARTS, check_part, load_part, match_part, of_another_part, report
from lmm_jax.hf.read_config import is_model
from lmm_jax.training.checkpoint import Checkpoints, saved_steps, saved_stream
from lmm_jax.training.state import abstract_params, make_program

RUN = re.compile(r"(.+)/blocks_(\d+)/(.+)")


def check(program):
    """Raises what `start` would raise, as far as it can be known before anything is allocated or read.

    Args:
      program: of the run.

    Raises:
      ConfigError: a folder that is not there or cannot be read, or parameters that it does not give; each names the
        field.
    """
    init = program.config.init
    _fresh(program)
    if init["from"]:
        _plan_from(init["from"], program)
    for part, folder in _parts(init).items():
        if not epath.Path(folder).is_dir():
            raise ConfigError(f"init.{part}={folder}: there is no such folder")
        try:
            check_part(folder, part, program.config.model)
            match_part(
                folder, part, program.config.model, abstract_params(program), tuple(init.new), init.allow_pickle
            )
        except (ValueError, OSError) as error:
            raise ConfigError(f"init.{part}={folder}: {error}") from error


def start(program, state, note=print):
    """The state of a new run with the parameters that `config.init` names, from a workdir or from others' folders.

    Args:
      program: of the run.
      state: fresh `TrainState`; its optimizer and step stay, and what no folder gives starts as it is there.
      note: called with lines that say where parameters come from.

    Raises:
      ConfigError: as for `start_from`.
      LoadError: see `hf.load.load_part`.
      FileNotFoundError, ValueError: nothing to read, or nothing sound.
    """
    init = program.config.init
    if init["from"]:
        return start_from(init["from"], program, state, note)
    params, folders = flatten_dict(state.params, sep="/"), _parts(init)
    for part, folder in folders.items():
        check_part(folder, part, program.config.model)
        abstract = abstract_params(program)
        read, table = load_part(folder, part, program.config.model, abstract, tuple(init.new), init.allow_pickle)
        params |= read
        # What is another part's, and read as that from the same folder, has its line there.
        elsewhere = {of_another_part(other) for other in folders if other != part and folders[other] == folder}
        if jax.process_index() == 0:
            note(f"init.{part}={folder}\n{report([entry for entry in table if entry.why not in elsewhere])}")
    return state.replace(params=unflatten_dict(params, sep="/"))


def _parts(init):
    return {part: init[part] for part in PARTS if init[part]}


def start_from(workdir, program, state, note=print):
    """The state of a new run, its parameters those of the newest sound step of `workdir`.

    Args:
      workdir: of the previous stage.
      program: of this run.
      state: fresh `TrainState`; its optimizer and step stay.
      note: called with lines that say where parameters come from, and which steps are damaged.

    Raises:
      ConfigError: no workdir; or every parameter that has no counterpart of its shape there and is not under
        `config.init.new`, or a prefix there that no parameter lies under.
      ValueError: no sound checkpoint.
    """
    abstract, begins = _plan_from(workdir, program)
    new = flatten_dict(state.params, sep="/")
    restored, step = Checkpoints(workdir).restore_params(unflatten_dict(abstract, sep="/"), note)
    restored = recut(flatten_dict(restored, sep="/"), new)
    planned = flatten_dict(program.shardings.params, sep="/")
    params = {p: x if p in begins else jax.device_put(restored[p], planned[p]) for p, x in new.items()}
    if jax.process_index() == 0:
        left = sorted({path.split("/")[0] for path in restored.keys() - new.keys()})
        note(
            f"starting from step {step} of {workdir}: {len(new) - len(begins)} parameters taken, "
            f"{len(begins)} fresh{f', not needed: {left}' if left else ''}"
        )
    return state.replace(params=unflatten_dict(params, sep="/"))


def _plan_from(workdir, program):
    """The parameters of `workdir`, flat and abstract, and the paths of those of the run that start fresh."""
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"init.from={workdir} is no workdir of `lmm train` (no config.json)")
    if is_model(workdir):
        raise ConfigError(
            f"init.from={workdir} is the folder of a model, not a workdir of `lmm train`; name it in init.vision, "
            f"init.language and init.projector, or make a workdir of it: lmm.load({str(workdir)!r}).save(DIR)"
        )
    steps = saved_steps(workdir)
    if not steps:
        raise ConfigError(f"init.from={workdir} holds no checkpoint; did its run save a step?")
    if all(saved_stream(workdir, step) is None for step in steps):
        raise ConfigError(f"init.from={workdir} holds no sound checkpoint: steps {steps} cannot be read")
    before = make_program(read_config(path), program.mesh)
    new = flatten_dict(abstract_params(program), sep="/")
    abstract = flatten_dict(abstract_params(before), sep="/")
    old = {path: x.shape for path, x in jax.eval_shape(lambda x: recut(x, new), abstract).items()}
    begins = _fresh(program)
    faults = [
        f"{path} {x.shape}: " + (f"has shape {old[path]} there" if path in old else "is not there")
        for path, x in new.items()
        if path not in begins and old.get(path) != x.shape
    ]
    if faults:
        raise ConfigError(
            f"init.from={workdir} does not give {len(faults)} parameters{_vocabularies(before, program)}; name those "
            "that shall start fresh in init.new\n  " + "\n  ".join(faults[:40])
        )
    return abstract, begins


def _fresh(program) -> set[str]:
    """The paths of the parameters that start fresh, as `config.init.new` says; ConfigError for a prefix of none."""
    paths = flatten_dict(abstract_params(program), sep="/")
    fresh = [prefix.rstrip("/") for prefix in program.config.init.new]
    under = {prefix: {path for path in paths if path == prefix or path.startswith(prefix + "/")} for prefix in fresh}
    nothing = [prefix for prefix, found in under.items() if not found]
    if nothing:
        raise ConfigError(f"init.new: no parameter lies under {', '.join(map(repr, nothing))}")
    return set().union(*under.values())


def _vocabularies(before, program):
    """What lies behind tables of another size: a field that is easier found by its name."""
    there, here = (p.config.model.decoder.vocab_size for p in (before, program))
    return "" if there == here else f" (model.decoder.vocab_size is {there} there, {here} here)"


def recut(old, new):
    """Flat parameters `old`, the runs of an encoder's blocks cut as in `new`: see `models.vit.ViT.runs`.

    Where levels are wanted, or tiles enter, runs end; between recipes that differ in this the blocks are the same.
    """
    out, runs = {}, {}
    for path, x in old.items():
        cut = RUN.fullmatch(path)
        if cut:
            runs.setdefault((cut[1], cut[3]), []).append((int(cut[2]), x))
        else:
            out[path] = x
    for (encoder, leaf), parts in runs.items():
        whole = jnp.concatenate([x for _, x in sorted(parts, key=lambda part: part[0])])
        starts = sorted(
            int(cut[2]) for path in new if (cut := RUN.fullmatch(path)) and (cut[1], cut[3]) == (encoder, leaf)
        )
        for start, end in itertools.pairwise([*starts, len(whole)]):
            out[f"{encoder}/blocks_{start}/{leaf}"] = whole[start:end]
    return out
