"""What prepared data, and the folder of a model, say of a run: for config files that take both as arguments."""

import dataclasses
import math
import sys

import numpy as np

from lmm_jax import config as c
from lmm_jax.data.counts import NO_LENGTH, count_records
from lmm_jax.data.prepared import Prepared
from lmm_jax.hf.chat_templates import find_differences
from lmm_jax.hf.read_config import is_model, read_model_config, read_stored_dtype
from lmm_jax.hf.snapshot import download_hint, model_folder

FILLED = 0.9  # of the positions of a row, when several conversations share it
ROUND = 64  # a row has a multiple of so many positions, so that it divides over devices
LEAST_STEPS, LEAST_PACKS = 20, 8  # an epoch with fewer steps makes a step smaller, down to so many packs
MOST_VALIDATION = 8  # batches of a validation loss


@dataclasses.dataclass(frozen=True)
class Batch:
    """How much of the data a step takes.

    Attributes:
      length: positions of a row.
      packs: of a step, one row each.
      steps: of the run.
      validation: batches of as many packs that hold the validation split; at least one.
    """

    length: int
    packs: int
    steps: int
    validation: int


def use_data(config, folder):
    """Gives a config a prepared folder: its template, and a vocabulary of the size of its tokenizer.

    A config that has a model already keeps its vocabulary.

    Raises:
      ConfigError: no prepared folder, or a damaged one.
    """
    data = open_data(folder)
    config.data.path, config.data.template = str(folder), data.about["template"]
    config.model.decoder.vocab_size = data.tokenizer.vocab_size


def use_model(config, folder, data):
    """Gives a config the model of a folder, every size of it, and lets the run start with its parameters.

    Args:
      config: whose `model`, `data` and `init` are set.
      folder: a workdir of `lmm train`, or a model that `lmm.load` reads.
      data: prepared folder to train on; its tokenizer and template must be those of the model.

    Raises:
      ConfigError: neither a model nor a workdir, or data that were prepared for another model.
    """
    try:
        path = model_folder(folder)
    except (ValueError, OSError) as error:
        raise c.ConfigError(f"model={error}") from error
    if not (path / "config.json").exists():
        raise c.ConfigError(
            f"model={folder} is neither a workdir of `lmm train` nor a model (no config.json){download_hint(path)}"
        )
    try:
        found = read_model_config(path) if is_model(path) else c.read_config(path / "config.json")
    except (ValueError, OSError) as error:
        raise c.ConfigError(f"model={folder}: {error}") from error
    if is_model(path) and (differences := find_differences(path, found.data.template)):
        print(differences, file=sys.stderr)
    found = found.copy_and_resolve_references().unlock()
    config.model = found.model
    if is_model(path) and read_stored_dtype(path) == "float16":
        # Parameters are float32 all the same; the step is computed in the type that other runs are trained in.
        config.model.dtype = "bfloat16"
    for field in (*c.OF_MODEL, "length"):
        config.data[field] = found.data[field]
    parts = dict.fromkeys(("vision", "language", "projector"), str(folder))
    config.init.update(parts if is_model(path) else {"from": str(folder)})
    config.data.path = str(data)
    about = open_data(data).about
    if about["template"] != config.data.template:
        raise c.ConfigError(
            f"data={data} was prepared with template '{about['template']}', model={folder} was trained with "
            f"'{config.data.template}': lmm prepare … --template {config.data.template} --tokenizer {folder}"
        )


def open_data(folder, split="train") -> Prepared:
    """A split of a prepared folder; ConfigError if it is none."""
    try:
        return Prepared(folder, split)
    except (ValueError, OSError) as error:
        raise c.ConfigError(f"data={folder}: {error}") from error


def rows_of(model) -> int | None:
    """`data.rows` of a model: one, or None for as few as leave little unused where a conversation has several copies.

    A pack holds a copy at each scale, and the longest, cut to a row each, need as many rows.
    """
    return 1 if len(model.scales) == 1 else None


def fit_batch(config, epochs, packs, length=0, most=2048) -> Batch:
    """How long a row must be for the data of a config, and how many packs of one row make a step.

    Args:
      config: with data and model.
      epochs: how often the run reads all records.
      packs: of a step at most; fewer if an epoch would have too few steps.
      length: positions of a row; 0 for what holds 99 % of the records up to their first answer.
      most: positions of a row at most, if it is not given.

    Raises:
      ConfigError: no record can be used.
    """
    if not epochs > 0:
        raise c.ConfigError(f"epochs={epochs}: expected a number above 0")
    data, scales = open_data(config.data.path), tuple(config.model.scales)
    visual = c.visual_layout(config).with_marks(data.tokenizer)
    counts = count_records(data.index, visual, scales, NO_LENGTH - 1, cut=False)
    needed = np.sort(counts.needed[(counts.needed != NO_LENGTH) & ~counts.thin])
    if not len(needed):
        raise c.ConfigError(f"data={config.data.path}: no record has an answer to train on")
    if not length:
        length = int(needed[math.ceil(0.99 * len(needed)) - 1])
        length = min(max(-(-length // ROUND) * ROUND, ROUND), most)
    of_record = np.minimum(needed, length).mean() * len(scales) / (FILLED * length)  # rows that it fills
    rows = len(needed) * of_record
    while packs > LEAST_PACKS and rows / packs < LEAST_STEPS:
        packs //= 2
    held_out = data.about["splits"].get(config.data.validation, {"rows": 0})["rows"]
    validation = min(max(round(held_out * of_record / packs), 1), MOST_VALIDATION)
    return Batch(length, packs, max(round(epochs * rows / packs), 1), validation)
