"""Starting a run with what another one learned."""

import itertools
import re

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.config import ConfigError, read_config
from lmm_jax.hf.load import PARTS, check_part, load_part, report
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import abstract_params, make_program

RUN = re.compile(r"(.+)/blocks_(\d+)/(.+)")


def start(program, state, note=print):
    """The state of a new run with the parameters that `config.init` names, from a workdir or from others' folders.

    Args:
      program: of the run.
      state: fresh `TrainState`; its optimizer and step stay, and what no folder gives starts as it is there.
      note: called with lines that say where parameters come from.

    Raises:
      ConfigError: `init.from` beside folders of parts, or as for `start_from`.
      LoadError: see `hf.load.load_part`.
      FileNotFoundError, ValueError: nothing to read, or nothing sound.
    """
    init = program.config.init
    folders = {part: init[part] for part in PARTS if init[part]}
    if init["from"] and folders:
        raise ConfigError(f"init.from and init.{', init.'.join(folders)} are both set; a run starts from either")
    if init["from"]:
        return start_from(init["from"], program, state, note)
    params = flatten_dict(state.params, sep="/")
    for part, folder in folders.items():
        check_part(folder, part, program.config.model)
        abstract = abstract_params(program)
        read, table = load_part(folder, part, program.config.model, abstract, tuple(init.new), init.allow_pickle)
        params |= read
        if jax.process_index() == 0:
            note(f"init.{part}={folder}\n{report(table)}")
    return state.replace(params=unflatten_dict(params, sep="/"))


def start_from(workdir, program, state, note=print):
    """The state of a new run, its parameters those of the newest sound step of `workdir`.

    Args:
      workdir: of the previous stage.
      program: of this run.
      state: fresh `TrainState`; its optimizer and step stay.
      note: called with lines that say where parameters come from, and which steps are damaged.

    Raises:
      ConfigError: every parameter that has no counterpart of its shape there and is not under `config.init.new`, or a
        prefix there that no parameter lies under.
      FileNotFoundError, ValueError: no workdir, or no sound checkpoint.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"init.from: {workdir} is no workdir of `lmm train` (no config.json)")
    before = make_program(read_config(workdir / "config.json"), program.mesh)
    fresh = tuple(prefix.rstrip("/") for prefix in program.config.init.new)
    new = flatten_dict(state.params, sep="/")
    abstract = flatten_dict(abstract_params(before), sep="/")
    old = {path: x.shape for path, x in jax.eval_shape(lambda x: recut(x, new), abstract).items()}
    under = {prefix: {path for path in new if path == prefix or path.startswith(prefix + "/")} for prefix in fresh}
    begins = set().union(*under.values())
    nothing = [prefix for prefix, paths in under.items() if not paths]
    if nothing:
        raise ConfigError(f"init.new: no parameter lies under {', '.join(map(repr, nothing))}")
    faults = [
        f"{path} {x.shape}: " + (f"has shape {old[path]} there" if path in old else "is not there")
        for path, x in new.items()
        if path not in begins and old.get(path) != x.shape
    ]
    if faults:
        raise ConfigError(
            f"init.from={workdir} does not give {len(faults)} parameters; name those that shall start fresh in "
            "init.new\n  " + "\n  ".join(faults[:40])
        )
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
