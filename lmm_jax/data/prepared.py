"""Reading a prepared folder (see `lmm_jax.data.prepare.folder` for its layout)."""

import functools
import re
import sys

import numpy as np
from etils import epath

from lmm_jax import storage, strict_json
from lmm_jax.data import digests
from lmm_jax.data.conversation import Turn, stored_template
from lmm_jax.data.images import open_picture
from lmm_jax.data.prepare import index
from lmm_jax.data.prepare.records import BUILDER, DESCRIPTION, Records, check_inside, find_files
from lmm_jax.data.tokenizer import load_tokenizer

NAME = re.compile(r"[\w-]{1,128}")  # of a split, which files are called by, and a fingerprint
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
        about = strict_json.read_object(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the folder again") from error
    if fault := _fault(about):
        raise ValueError(f"{path} is damaged: {fault}; prepare the folder again")
    return about | {"template": stored_template(about["template"], about)}


def _fault(about) -> str:
    """What is wrong with the contents of a `prepared.json`; "" if nothing is."""
    texts = ("builder", "template", "tokenizer", "fingerprint")
    missing = [key for key in (*texts, "splits") if key not in about]
    if missing:
        return f"it lacks {', '.join(missing)}"
    wrong = [key for key in texts if not isinstance(about[key], str)]
    source = about.get("source", {})
    sound = isinstance(source, dict) and isinstance(source.get("dataset", ""), str)
    wrong += [] if sound else ["source"]
    splits = about["splits"].values() if isinstance(about["splits"], dict) else [None]
    wrong += [] if all(isinstance(n, dict) and _is_count(n.get("rows")) for n in splits) else ["splits"]
    if not wrong:
        forms = {"builder": BUILDER, "fingerprint": NAME}  # of what paths are made of
        wrong = [key for key, form in forms.items() if not form.fullmatch(about[key])]
        wrong += ["splits" for split in about["splits"] if not NAME.fullmatch(split)]
    return f"{wrong[0]} is {strict_json.shown(about[wrong[0]])}" if wrong else ""


def _is_count(value):
    return type(value) is int and 0 < value < 2**40


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
        if fault := digests.fault(self.about):
            raise ValueError(f"{self.folder / 'prepared.json'} is damaged: {fault}; {digests.AGAIN}")
        file = self.folder / f"index_{split}.npz"
        self.index = _read_index(file)
        records = storage.local_copy(self.folder / "records", self.fingerprint)
        path, copied = records / self.about["builder"], storage.is_remote(self.folder)
        try:
            read = [path / name for name in DESCRIPTION] + find_files(path, path.parent.name, split)
            files = {f"records/{file.relative_to(records).as_posix()}": file for file in read}
            if copied and digests.FILES in self.about:
                self._verify_copies(files)
            self._records = Records(records, self.about["builder"], split)
        except digests.Damaged:
            raise
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{self.folder}/records is missing or damaged: {error}; copy or prepare the folder again"
            ) from error
        stored, rows = len(self._records), self.about["splits"][split]["rows"]
        if not stored == rows == len(self.index["turn_offsets"]) - 1:
            raise ValueError(
                f"{self.folder} has {stored} records of split '{split}', prepared.json says {rows}; prepare it again"
            )
        if digests.FILES not in self.about:
            _say_without_digests(str(self.folder))
            return
        digests.verify(self.folder, self.about, {file.name: file} | ({} if copied else files))

    def _verify_copies(self, files):
        """Deletes the copy of a file in a bucket that is damaged, so that the next command copies it anew."""
        try:
            digests.verify(self.folder, self.about, files)
        except digests.Damaged as error:
            error.file.unlink(missing_ok=True)
            raise digests.Damaged(
                f"{error}. That was its copy {error.file}, which is deleted: the same command copies it anew, and if "
                "it says this again, the file in the bucket is damaged",
                error.file,
            ) from error

    @property
    def fingerprint(self) -> str:
        """Identifies records, order, tokenizer and template."""
        return self.about["fingerprint"]

    def __len__(self):
        return len(self._records)

    def __getitem__(self, record):
        """Record number `record` as stored: id, images (encoded bytes) and turns."""
        return self._records[record]


def _read_index(file) -> dict[str, np.ndarray]:
    """The arrays of an index; ValueError if it is missing or damaged, or leads out of its folder."""
    if not storage.is_remote(file):
        try:
            check_inside(file.parent, file)
        except ValueError as error:
            raise ValueError(f"{file} is missing or damaged: {error}; prepare the folder again") from error
    return index.read(file)


@functools.cache
def _say_without_digests(folder):
    print(
        f"{folder} was prepared by an earlier version, without digests of its files: damage in them may be seen late "
        "or never; prepared again it has them",
        file=sys.stderr,
    )


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
