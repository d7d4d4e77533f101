"""Starting a run with what another one learned."""

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.config import ConfigError, read_config
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import abstract_params, make_program


def start_from(workdir, program, state, note=print):
    """The state of a new run, its parameters those of the newest sound step of `workdir`.

    Args:
      workdir: of the previous stage.
      program: of this run.
      state: fresh `TrainState`; its optimizer and step stay.
      note: called with lines that say where parameters come from.

    Raises:
      ConfigError: every parameter that has no counterpart of its shape there and is not under `config.init.new`.
      FileNotFoundError, ValueError: no workdir, or no sound checkpoint.
    """
    workdir = epath.Path(workdir)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"init.from: {workdir} is no workdir of `lmm train` (no config.json)")
    before = make_program(read_config(workdir / "config.json"), program.mesh)
    fresh = tuple(prefix.rstrip("/") for prefix in program.config.init.new)
    old = {path: x.shape for path, x in flatten_dict(abstract_params(before), sep="/").items()}
    new = flatten_dict(state.params, sep="/")
    begins = {path for path in new if any(path == f or path.startswith(f + "/") for f in fresh)}
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
    restored, step = Checkpoints(workdir).restore_params(abstract_params(before))
    restored = flatten_dict(restored, sep="/")
    planned = flatten_dict(program.shardings.params, sep="/")
    params = {p: x if p in begins else jax.device_put(restored[p], planned[p]) for p, x in new.items()}
    if jax.process_index() == 0:
        left = sorted({path.split("/")[0] for path in restored.keys() - new.keys()})
        note(
            f"starting from step {step} of {workdir}: {len(new) - len(begins)} parameters taken, "
            f"{len(begins)} fresh{f', not needed: {left}' if left else ''}"
        )
    return state.replace(params=unflatten_dict(params, sep="/"))
