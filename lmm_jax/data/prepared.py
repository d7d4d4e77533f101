"""Reading a prepared folder (see `lmm_jax.data.prepare.folder` for its layout)."""

import json
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from lmm_jax import storage
from lmm_jax.data.conversation import Turn, stored_template
from lmm_jax.data.images import open_picture
from lmm_jax.data.tokenizer import load_tokenizer

# Arrays of an index, see `lmm_jax.data.prepare.index`.
INDEX = ("turn_offsets", "turn_tokens", "turn_supervised", "turn_images", "image_offsets", "image_sizes")
OWN = "own"  # what the data of a user are called where a built-in data set has a name


def read_about(folder) -> dict:
    """Contents of a prepared folder's `prepared.json`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    path = epath.Path(folder) / "prepared.json"
    if (path.parent / "preparing.json").exists() and not path.exists():
        raise FileNotFoundError(
            f"{folder} is unfinished: `lmm prepare` still writes there, was stopped, or refused too many rows; wait "
            "until it has ended, or give its command again"
        )
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no prepared data (no prepared.json); run `lmm prepare`")
    try:
        about = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the folder again") from error
    if fault := _fault(about):
        raise ValueError(f"{path} is damaged: {fault}; prepare the folder again")
    return about | {"template": stored_template(about["template"], about)}


def _fault(about) -> str:
    """What is wrong with the contents of a `prepared.json`; "" if nothing is."""
    if not isinstance(about, dict):
        return "it is no object"
    texts = ("builder", "template", "tokenizer", "fingerprint")
    missing = [key for key in (*texts, "splits") if key not in about]
    if missing:
        return f"it lacks {', '.join(missing)}"
    wrong = [key for key in texts if not isinstance(about[key], str)]
    wrong += [] if isinstance(about.get("source", {}), dict) else ["source"]
    splits = about["splits"].values() if isinstance(about["splits"], dict) else [None]
    wrong += [] if all(isinstance(n, dict) and isinstance(n.get("rows"), int) for n in splits) else ["splits"]
    return f"{wrong[0]} is {str(about[wrong[0]])[:80]!r}" if wrong else ""


def data_set(folder) -> str:
    """What a prepared folder was made from: the name of a built-in data set, or `OWN` for rows of one's own.

    Raises:
      FileNotFoundError, ValueError: it is no prepared folder, or a damaged one.
    """
    return read_about(folder).get("source", {}).get("dataset", OWN)


def folders_of(data) -> list[str]:
    """The prepared folders that `config.data` names, each once."""
    return list(dict.fromkeys([str(data.path)] if data.path else [str(path) for path, _ in data.mixture]))


def trained_data_set(data) -> str:
    """The `data_set` that a run was trained on; "" if its folders are not there or not of one data set.

    Args:
      data: `config.data`.
    """
    try:
        (name,) = {data_set(folder) for folder in folders_of(data)}
    except (OSError, ValueError):  # no such folder, or not exactly one name
        return ""
    return name


class Prepared:
    """One split of a prepared folder: random access to its records, with the index in memory.

    Of a folder in a bucket, the records are copied to this machine: see `storage.local_copy`.

    Attributes:
      about: contents of `prepared.json`.
      tokenizer: the tokenizer it was prepared with.
      index: dict of the arrays of `lmm_jax.data.prepare.index`.
    """

    def __init__(self, folder, split):
        """Raises FileNotFoundError or ValueError, naming what is missing."""
        self.folder, self.split = epath.Path(folder), split
        self.about = read_about(self.folder)
        if split not in self.about["splits"]:
            raise ValueError(f"{self.folder} has no split '{split}'; it has {sorted(self.about['splits'])}")
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != self.about["tokenizer"]:
            raise ValueError(f"the tokenizer of {self.folder} is not the one that prepared.json was written with")
        index = self.folder / f"index_{split}.npz"
        try:
            with index.open("rb") as f:
                self.index = dict(np.load(f))
            lacking = [name for name in INDEX if name not in self.index]
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{index} is missing or damaged; prepare the folder again") from error
        if lacking:
            raise ValueError(f"{index} is damaged: it lacks {', '.join(lacking)}; prepare the folder again")
        records = storage.local_copy(self.folder / "records", f"{self.fingerprint}")
        try:
            builder = tfds.builder_from_directory(records / self.about["builder"])
            self._source = builder.as_data_source(split)
            stored = len(self._source)  # as its description says, whether the files are there or not
            absent = [path for path in builder.info.splits[split].filepaths if not epath.Path(path).stat().length]
        except Exception as error:  # TFDS and its readers raise many kinds; each means that records are not there
            raise ValueError(f"{self.folder}/records is missing or damaged; prepare the folder again") from error
        if absent:
            raise ValueError(f"{absent[0]} is empty; copy or prepare the folder again")
        rows = self.about["splits"][split]["rows"]
        if not stored == rows == len(self.index.get("turn_offsets", ())) - 1:
            raise ValueError(
                f"{self.folder} has {stored} records of split '{split}', prepared.json says {rows}; prepare it again"
            )

    @property
    def fingerprint(self) -> str:
        """Identifies records, order, tokenizer and template."""
        return self.about["fingerprint"]

    def __len__(self):
        return len(self._source)

    def __getitem__(self, record):
        """Record number `record` as stored: id, images (encoded bytes) and turns."""
        return self._source[record]


def as_turns(record):
    """The `Turn`s of a stored record; TFDS hands a sequence of dicts back as a dict of sequences."""
    turns = record["turns"]
    in_loss = turns.get(
        "in_loss", [True] * len(turns["role"])
    )  # folders of before lack it: all answers are trained on
    return [
        Turn(role.decode(), text.decode(), bool(trained))
        for role, text, trained in zip(turns["role"], turns["text"], in_loss, strict=True)
    ]


def as_pictures(record):
    """Opened RGB pictures of a stored record."""
    return [open_picture(data) for data in record["images"]]
