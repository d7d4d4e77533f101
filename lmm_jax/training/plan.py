"""Everything that can be known of a run before it begins. Nothing is written or allocated here, only refused.

What `make_plan` returns can be acted on; where it raises, every file is as it was.
"""

import dataclasses
import json
import math
import os

from etils import epath

from lmm_jax import lock, sharding, storage
from lmm_jax.config import ConfigError, base, check, flatten, read_config, visual_layout
from lmm_jax.data.conversation import check_template
from lmm_jax.data.pipeline import Packs
from lmm_jax.data.prepared import folders_of, read_about
from lmm_jax.hf.read_config import is_model
from lmm_jax.training import base as base_lib
from lmm_jax.training import events, memory, metrics, start
from lmm_jax.training.saved import check_not_of_before, newest_sound, saved_about, saved_base, saved_steps
from lmm_jax.training.state import Program, make_program

# Fields that may differ between the runs of one workdir; any other change would make it another run.
MAY_CHANGE = ("train.steps", "train.log_every", "train.eval_", "train.save_every", "train.keep", "train.max_skipped")
MAY_CHANGE += ("train.max_failed_saves", "train.skip_spikes", "train.compare_every", "train.deadline_")
MAY_CHANGE += ("train.micro_batches", "data.path", "data.mixture", "data.threads", "data.workers", "data.max_bad_")
MAY_CHANGE += ("data.max_left_out", "mesh.", "rules.", "log.")
FILES = (
    "config.json",
    metrics.NAME,
    events.NAME,
    "bad_records.jsonl",
    lock.NAME,
)  # that a run writes beside its checkpoints

MOST_EPOCHS = 100  # in one step


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that can begin, or continue.

    Attributes:
      workdir: of the run.
      program: see `state.make_program`.
      packs: of the training split.
      validation: packs of the validation split, or None if the data has none or it is never asked.
      stream: what identifies the order of the packs, saved with each checkpoint.
      step: the newest step of the workdir whose manifest is sound, 0 if none: then it is no run yet.
      restart: whether it begins at step 0 though a run was there, whose checkpoints are gone.
      memory: what the state takes.
    """

    workdir: epath.Path
    program: Program
    packs: Packs
    validation: Packs | None
    stream: dict
    step: int
    restart: bool
    memory: memory.Memory


def make_plan(config, workdir, restart=False) -> Plan:
    """Checks config, data, workdir, what the run starts with, devices, memory and disk.

    Args:
      config: of the run.
      workdir: of the run.
      restart: whether a workdir may begin at step 0 again whose checkpoints are gone.

    Raises:
      ConfigError: the config contradicts itself, the data, the devices, the memory, or the run that is there.
      FileNotFoundError, OSError: no prepared data, or a workdir that cannot be written to.
      ImportError: an extra that `config.log` asks for is not installed.
      ValueError: data that is damaged, or of which too much cannot be used.
    """
    check(config)
    check_data_is_named(config)
    workdir = epath.Path(workdir)
    _check_writable(workdir)
    metrics.check_extras(config.log)
    packs = _open_packs(config, "train", shuffle=True)
    _check_vocabulary(config, packs)
    check_template(packs.tokenizer, config.data.template)
    validation = _open_validation(config, packs)
    _check_stacks(config.model.decoder)
    _check_batch(config, packs)
    step = newest_sound(workdir)
    if step:
        _check_config(workdir, config)
    _check_steps(workdir, step, restart)
    program = make_program(config)
    train = config.train
    sharding.check_packs(program.mesh, config.rules, train.batch_size // train.micro_batches)
    if not any(program.rates.values()):
        raise ConfigError(
            "optimizer.learning_rate and optimizer.groups freeze every parameter: nothing would train; give some a "
            "rate above 0"
        )
    stream, saved_elsewhere = packs.state(), ()
    if step:
        about, left = saved_about(workdir, step), saved_base(workdir)
        if about:
            check_saved(workdir, about, config, stream, left)
        if left is not None:
            base_lib.find(config, left, workdir)
            saved_elsewhere = left["digests"]
    else:
        start.check(program)
        saved_elsewhere = base_lib.left_out(program)
    taken = memory.check_training(program)
    memory.check_batches(program, packs, taken)
    memory.check_disk(program, workdir, taken, saved_elsewhere, goes_on=bool(step))
    return Plan(workdir, program, packs, validation, stream, step, restart, taken)


def _check_steps(workdir, step, restart):
    """Raises ConfigError for a workdir that says it holds more than is there to go on from.

    Args:
      workdir: of the run.
      step: that it would go on from, 0 for none.
      restart: see `make_plan`.
    """
    if restart and step:
        raise ConfigError(
            f"{workdir} holds step {step}, from which the same command without --restart goes on; to begin again, "
            "choose another workdir, or move its folder checkpoints away"
        )
    if step:
        return
    broken = saved_steps(workdir)
    if broken == [0] and saved_about(workdir, 0) is not None:
        raise ConfigError(
            f"{workdir} holds a model, not a run: choose another workdir, and start from the model by "
            f"--config.init.from={workdir}"
        )
    if broken:
        raise ConfigError(
            f"no sound checkpoint among steps {broken} in {workdir}/checkpoints; restore it from a copy, or move the "
            "folder away and give --restart to begin again at step 0"
        )
    check_not_of_before(workdir)
    said = events.saved_step(workdir)
    if said and not restart:
        raise ConfigError(
            f"{workdir} says that step {said} was saved ({events.NAME}), and no checkpoint is there: put its folder "
            "checkpoints back, choose another workdir, or give --restart to begin again at step 0"
        )


def check_data_is_named(config):
    """Raises ConfigError if a config names no data."""
    if not config.data.path and not config.data.mixture:
        raise ConfigError("config field 'data.path' is not set; name the folder that `lmm prepare` wrote")


def _open_packs(config, which, shuffle):
    """The packs of the split that `config.data.train` or `config.data.validation` names."""
    field, split = "data.mixture" if config.data.mixture else "data.path", config.data[which]
    try:
        for folder in folders_of(config.data):
            if split not in (there := read_about(folder)["splits"]):
                raise ConfigError(f"data.{which}={split}: {folder} has no split '{split}'; it has {sorted(there)}")
        return Packs(config, visual_layout(config), split, config.train.batch_size, shuffle)
    except ConfigError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{field}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from error


def _open_validation(config, packs):
    """The packs to validate with; None where it is not asked for, or the data has no split of the default's name."""
    split = config.data.validation
    if not config.train.eval_every:
        return None
    if split == config.data.train:
        raise ConfigError(
            f"data.validation={split} is data.train: the loss would be of what is trained on; name another split, or "
            "set train.eval_every=0"
        )
    if split == base().data.validation and not all(split in d.about["splits"] for d in packs.data):
        return None
    packs = _open_packs(config, "validation", shuffle=False)
    batches, records = config.train.eval_batches, sum(map(len, packs.data)) - len(packs.left_out)
    times = batches * packs.records_per_step / records
    if times > MOST_EPOCHS and batches > base().train.eval_batches:
        raise ConfigError(
            f"train.eval_batches={batches}: a validation would read each of the {records:,} records {times:,.0f} "
            f"times; set {math.ceil(batches / times)} to read each once"
        )
    return packs


def _check_writable(workdir):
    """Raises an OSError if a folder of this machine cannot be made or written to."""
    if storage.is_remote(workdir):
        return
    storage.check_place(workdir, "--workdir")
    for name in FILES:
        file = os.path.join(workdir, name)
        if os.path.isdir(file) or (os.path.lexists(file) and not os.access(file, os.W_OK)):
            raise PermissionError(f"--workdir {workdir}: {file} is no file that can be written to; move it away")
    if not saved_steps(workdir) and is_model(workdir):
        raise ConfigError(f"--workdir {workdir} is the folder of a model; choose another workdir")


def _check_vocabulary(config, packs):
    pieces, wanted = packs.tokenizer.vocab_size, config.model.decoder.vocab_size
    if pieces > wanted:
        raise ConfigError(
            f"the tokenizer of {packs.data[0].folder} has {pieces} pieces, model.decoder.vocab_size is {wanted}; set "
            "it to as many, or prepare the data with the tokenizer that the decoder was made for"
        )


def _check_stacks(decoder):
    """Raises ConfigError for a stack that would be added to no layer, as a published model may have it."""
    beyond = [layer for layer in decoder.inject_layers if layer >= decoder.depth]
    if beyond:
        raise ConfigError(
            f"model.decoder.inject_layers={tuple(decoder.inject_layers)}: {beyond} are none of the layers 0 to "
            f"{decoder.depth - 1} of model.decoder.depth={decoder.depth}, so that their stacks would train nothing"
        )


def _check_batch(config, packs):
    """Raises ConfigError for a step that reads the data over and over: its packs are meant to be others."""
    records = sum(map(len, packs.data)) - len(packs.left_out)
    times = packs.records_per_step / records
    if times > MOST_EPOCHS:
        raise ConfigError(
            f"train.batch_size={packs.per_step}: a step would read each of the {records:,} records {times:,.0f} "
            f"times; set {max(int(packs.per_step / times), 1)} or less to read each once at most"
        )


def _check_config(workdir, config):
    """Raises ConfigError naming what differs from the config of the run that a workdir holds."""
    try:
        old = flatten(read_config(workdir / "config.json"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{workdir} holds checkpoints, but the config that they were made with cannot be read: {error}; restore "
            "it from a copy, or choose another workdir"
        ) from error
    new = flatten(config)
    changed = [
        f"{name}: was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another config; choose another workdir\n  " + "\n  ".join(changed)
        )


def about_run(config, stream) -> dict:
    """What a checkpoint says of its run: what identifies the data, and the fields that must stay as they are."""
    kept = {name: value for name, value in flatten(config).items() if not name.startswith(MAY_CHANGE)}
    return {"data": stream, "config": json.loads(json.dumps(kept, default=str))}


def check_saved(workdir, about, config, stream, base=None):
    """Raises ConfigError naming what differs between what a checkpoint says of its run and one that goes on from it.

    Args:
      workdir: of the run.
      about: as `about_run` gave it when the step was saved; fields that one of the two does not know do not count.
      config: of the run that goes on.
      stream: of its data.
      base: what its checkpoints leave out, see `base.describe`: where that lies may change, its digests tell it.
    """
    now = about_run(config, stream)
    moves = {f"init.{name}" for name in base["init"]} if base else set()
    changed = [
        f"{name}: was {old!r}, now {now['config'][name]!r}"
        for name, old in about["config"].items()
        if name in now["config"] and now["config"][name] != old and name not in moves
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{workdir} holds checkpoints of another config than its config.json; nothing is continued\n  {listed}"
        )
    check_stream(workdir, about["data"], stream)


def check_stream(workdir, saved, now):
    """Raises ConfigError naming what differs from the stream that a run was trained on."""
    # Fields of visual layouts that are newer than the run are as now; "arrangement" is what they were called first.
    layout = saved.get("visual_layout", saved.get("arrangement", {}))
    saved = {name: x for name, x in saved.items() if name != "arrangement"}
    saved |= {"visual_layout": now["visual_layout"] | layout}
    changed = [
        f"{name}: was {saved.get(name)}, now {now.get(name)}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(f"{workdir} was trained on another stream of data; nothing is continued\n  {listed}")
