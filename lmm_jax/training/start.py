"""Starting a run with what another one learned."""

import math

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.config import ConfigError, read_config
from lmm_jax.hf.load import PARTS, check_part, load_part, match_part, of_another_part, report
from lmm_jax.hf.peft import read_adapter
from lmm_jax.hf.read_config import is_model
from lmm_jax.hf.snapshot import download_hint, model_folder
from lmm_jax.training import adapters
from lmm_jax.training import base as base_lib
from lmm_jax.training.blocks import recut
from lmm_jax.training.saved import check_holds_step, saved_about, saved_steps
from lmm_jax.training.state import abstract_params, make_program


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
            raise ConfigError(f"init.{part}={folder}: there is no such folder{download_hint(folder)}")
        try:
            check_part(folder, part, program.config.model, program.config.data.length)
            abstract = adapters.without(abstract_params(program))
            match_part(folder, part, program.config.model, abstract, tuple(init.new), init.allow_pickle)
        except (ValueError, OSError) as error:
            raise ConfigError(f"init.{part}={folder}: {error}") from error
    if init.lora:
        _read_lora(program)


def start(program, state, note=print):
    """The state of a new run with the parameters that `config.init` names, see `begin`."""
    return begin(program, state, note)[0]


def begin(program, state, note=print):
    """The state of a new run with the parameters that `config.init` names, from a workdir or from others' folders.

    Args:
      program: of the run.
      state: fresh `TrainState`; its optimizer and step stay, and what no folder gives starts as it is there.
      note: called with lines that say where parameters come from.

    Returns:
      the state, and what its checkpoints leave out, see `base.describe`.

    Raises:
      ConfigError: as for `start_from`.
      LoadError: see `hf.load.load_part` and `hf.peft.read_adapter`.
      FileNotFoundError, ValueError: nothing to read, or nothing sound.
    """
    init = program.config.init
    step = None
    if init["from"]:
        state, step = _from_workdir(init["from"], program, state, note)
    params, folders = flatten_dict(state.params, sep="/"), _parts(init)
    for part, folder in folders.items():
        check_part(folder, part, program.config.model, program.config.data.length)
        abstract = adapters.without(abstract_params(program))
        read, table = load_part(folder, part, program.config.model, abstract, tuple(init.new), init.allow_pickle)
        params |= read
        # What is another part's, and read as that from the same folder, has its line there.
        elsewhere = {of_another_part(other) for other in folders if other != part and folders[other] == folder}
        if jax.process_index() == 0:
            note(f"init.{part}={folder}\n{report([entry for entry in table if entry.why not in elsewhere])}")
    if init.lora:
        read, placed = _read_lora(program), flatten_dict(program.shardings.params, sep="/")
        params |= {path: jax.device_put(x, placed[path]) for path, x in read.items()}
        if jax.process_index() == 0:
            note(f"init.lora={init.lora}: {len(adapters.layers(read))} adapters taken")
    state = state.replace(params=unflatten_dict(params, sep="/"))
    return state, base_lib.describe(program, state.params, step)


def _read_lora(program):
    """The adapters of `config.init.lora`, flat; ConfigError if they are not as `config.lora` says."""
    config, planned = program.config, flatten_dict(abstract_params(program), sep="/")
    folder, alpha = config.init.lora, adapters.alpha(config.lora)
    try:
        read = read_adapter(folder, config.model, planned)
    except (ValueError, OSError) as error:
        raise ConfigError(f"init.lora={folder}: {error}") from error
    theirs = config.lora.rank * float(next(x.flat[0] for path, x in read.items() if path.endswith(adapters.SCALE)))
    if not math.isclose(theirs, alpha, rel_tol=1e-6):
        raise ConfigError(
            f"init.lora={folder}: its adapters are scaled by {theirs:g} / {config.lora.rank}, those of this run by "
            f"{alpha:g} / {config.lora.rank}; set lora.alpha={theirs:g}"
        )
    return read


def _parts(init):
    """The folder of each part of `config.init`; ConfigError names the field of one that is not there."""
    folders = {}
    for part in PARTS:
        if init[part]:
            try:
                folders[part] = str(model_folder(init[part]))
            except (ValueError, OSError) as error:
                raise ConfigError(f"init.{part}={error}") from error
    return folders


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
    return _from_workdir(workdir, program, state, note)[0]


def _from_workdir(workdir, program, state, note):
    """As `start_from`, and the step that the parameters are of."""
    before, begins = _plan_from(workdir, program)
    new = flatten_dict(state.params, sep="/")
    restored, step = base_lib.restore_params(workdir, before, note)
    restored = recut(flatten_dict(restored, sep="/"), new)
    planned = flatten_dict(program.shardings.params, sep="/")
    params = {
        p: x if p in begins else jax.device_put(restored[p].astype(x.dtype), planned[p]) for p, x in new.items()
    }
    if jax.process_index() == 0:
        left = sorted({path.split("/")[0] for path in restored.keys() - new.keys()})
        note(
            f"starting from step {step} of {workdir}: {len(new) - len(begins)} parameters taken, "
            f"{len(begins)} fresh{f', not needed: {left}' if left else ''}"
        )
    return state.replace(params=unflatten_dict(params, sep="/")), step


def _plan_from(workdir, program):
    """The `Program` of `workdir`, its adapters merged, and the paths of the run's parameters that start fresh."""
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
    try:
        check_holds_step(workdir)
    except ValueError as error:
        raise ConfigError(f"init.from={error}") from error
    if all(saved_about(workdir, step) is None for step in steps):
        raise ConfigError(f"init.from={workdir} holds no sound checkpoint: steps {steps} cannot be read")
    before = make_program(adapters.plain_config(read_config(path)), program.mesh)
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
    return before, begins


def _fresh(program) -> set[str]:
    """The paths of the parameters that start fresh, as `config.init.new` says, and of the adapters.

    Raises:
      ConfigError: a prefix that no parameter lies under.
    """
    paths = flatten_dict(abstract_params(program), sep="/")
    fresh = [prefix.rstrip("/") for prefix in program.config.init.new]
    under = {prefix: {path for path in paths if path == prefix or path.startswith(prefix + "/")} for prefix in fresh}
    nothing = [prefix for prefix, found in under.items() if not found]
    if nothing:
        raise ConfigError(f"init.new: no parameter lies under {', '.join(map(repr, nothing))}")
    return set().union(*under.values(), filter(adapters.is_adapter, paths))


def _vocabularies(before, program):
    """What lies behind tables of another size: a field that is easier found by its name."""
    there, here = (p.config.model.decoder.vocab_size for p in (before, program))
    return "" if there == here else f" (model.decoder.vocab_size is {there} there, {here} here)"
