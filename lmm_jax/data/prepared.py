"""Reading a prepared folder (see `lmm_jax.data.prepare.folder` for its layout)."""

import json

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from lmm_jax import storage
from lmm_jax.data.images import open_picture
from lmm_jax.data.tokenizer import load_tokenizer


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
        about = self.folder / "prepared.json"
        if not about.exists():
            raise FileNotFoundError(f"{self.folder} holds no prepared data (no prepared.json); run `lmm prepare`")
        self.about = json.loads(about.read_text())
        if split not in self.about["splits"]:
            raise ValueError(f"{self.folder} has no split '{split}'; it has {sorted(self.about['splits'])}")
        self.tokenizer = load_tokenizer(self.folder)
        if self.tokenizer.fingerprint != self.about["tokenizer"]:
            raise ValueError(f"the tokenizer of {self.folder} is not the one that prepared.json was written with")
        with (self.folder / f"index_{split}.npz").open("rb") as f:
            self.index = dict(np.load(f))
        records = storage.local_copy(self.folder / "records", f"{self.fingerprint}")
        builder = tfds.builder_from_directory(records / self.about["builder"])
        self._source = builder.as_data_source(split)

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
    """`(role, text)` pairs of a stored record; TFDS hands a sequence of dicts back as a dict of sequences."""
    turns = record["turns"]
    return [(role.decode(), text.decode()) for role, text in zip(turns["role"], turns["text"], strict=True)]


def as_pictures(record):
    """Opened RGB pictures of a stored record."""
    return [open_picture(data) for data in record["images"]]
