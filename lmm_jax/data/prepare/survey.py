"""The first reading of the files of rows, before anything is written: each row's split, and how much there is.

Pictures are not opened. What is wrong with a file as a whole, its layout, its splits, no row of use, is said here.
"""

import collections
import dataclasses
import hashlib
import os
import sys

import numpy as np
from tqdm import tqdm

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.data.prepare.check import MAX_BYTES
from lmm_jax.data.prepare.layouts import open_rows, read_items
from lmm_jax.data.prepare.parse import parse_row
from lmm_jax.data.prepare.picture_names import file_name
from lmm_jax.data.prepare.refused import Refused
from lmm_jax.data.prepare.splits import SPLITS, TEST, TRAIN, UNUSABLE, VALIDATION, Keys, assign

TRAINING_TEXT = 8_000_000  # characters that it is trained on, from the first rows


@dataclasses.dataclass(frozen=True)
class RowsFile:
    """A file of rows.

    Attributes:
      flag: that named it.
      path: of it.
      images: folder that its pictures lie in.
      split: that its rows go to.
      may_name: splits that its rows may name for themselves.
    """

    flag: str
    path: str
    images: str
    split: str
    may_name: tuple[str, ...]

    def check_split(self, split, line):
        """ValueError if the file may not name a split, None if it names none."""
        if split is not None and split not in self.may_name:
            raise ValueError(
                f"{self.path}, line {line}: the file has a split '{split}', and {self.flag} can have "
                f"{', '.join(self.may_name)} here; rename it, give each split a file of its own, or leave out "
                "what says something else"
            )

    def about(self) -> dict:
        """What tells that it is the same file."""
        with open(self.path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        return {"data": os.path.basename(self.path), "bytes": os.path.getsize(self.path), "sha256": sha256}


def flag_of(split):
    """The argument that names the file of a split."""
    return "--data" if split == TRAIN else f"--{split}-data"


def find_files(paths, images, may_name):
    """A `RowsFile` for each split of `paths`; `may_name` are the splits that rows of the first may name.

    Raises:
      OSError: a file that is not there or cannot be read, or no folder of pictures.
    """
    files = []
    for split, path in paths.items():
        flag = flag_of(split)
        if os.path.isdir(path):
            raise IsADirectoryError(f"{flag} {path} is a folder; name the file of rows in it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(
                f"{flag} {path} is a pipe or a device, which cannot be read twice; write it to a file first"
            )
        if not os.path.isfile(path):
            url = "; download it first" if "://" in str(path) else ""
            link = " (a link that leads nowhere)" if os.path.islink(path) else ""
            raise FileNotFoundError(f"{flag}: no file {path}{link}{url}")
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{flag} {path} cannot be read: permission denied")
        folder = os.path.abspath(images or os.path.dirname(os.path.abspath(path)))
        if not os.path.isdir(folder):
            what = f"{folder} is a file, not the folder of the pictures"
            raise NotADirectoryError(
                f"--images: {what if os.path.exists(folder) else f'no folder of pictures {folder}'}"
            )
        files.append(RowsFile(flag, str(path), folder, split, may_name if split == TRAIN else (split,)))
    return files


@dataclasses.dataclass
class Survey:
    """What is known of a file before anything is written.

    Attributes:
      splits: of each row, see `splits.assign`.
      texts: lines of the first rows, as `(row, lines)`.
      bytes: of what will be stored, about.
    """

    splits: np.ndarray
    texts: list
    bytes: int


def survey_file(file, amounts) -> Survey:
    """Reads all rows of a file, without opening pictures.

    Raises:
      ValueError: none of them can be used, none is left to train on, or the file names splits that it may not.
    """
    keys, splits, texts, size, characters = Keys(file.images), bytearray(), [], 0, 0
    reasons, first = collections.Counter(), ""
    with open_rows(file.path) as f:
        items = tqdm(items_of(f, file.path), desc="reading", unit=" rows", disable=None)
        for number, (split, line, given) in enumerate(items, start=1):
            file.check_split(split, line)
            try:
                row = parse_row(given, number)
            except Refused as error:
                keys.add_unusable()
                splits.append(UNUSABLE)
                reasons[error.reason] += 1
                first = first or f"line {line}: {error}"
                continue
            file.check_split(row.split, line)
            if split and row.split and split != row.split:
                raise ValueError(
                    f"{file.path}, line {line}: a row of the list '{split}' has split '{row.split}'; leave one out"
                )
            splits.append(SPLITS.index(split or row.split or file.split))
            if amounts:
                keys.add(row.id, row.images)
            size += sum(len(turn.text) for turn in row.turns) + sum(_size(file.images, image) for image in row.images)
            if characters < TRAINING_TEXT:
                said = [turn.text.replace(IMAGE_TAG, "").splitlines() for turn in row.turns]
                lines = [line for turn in said for line in turn if line.strip()]
                texts.append((number - 1, lines))
                characters += sum(map(len, lines))
    splits = np.array(splits, np.uint8)
    if (splits == UNUSABLE).all():
        problem = f"{most_of(reasons)}; the first is {first}" if reasons else "it has none"
        raise ValueError(f"{file.path}: no row can be used: {problem}")
    if not (splits == SPLITS.index(file.split)).any():
        raise ValueError(f"{file.path}: no row is of split '{file.split}', of which there must be some")
    if amounts:
        splits = assign(keys, amounts.get(VALIDATION), amounts.get(TEST), file.path)
        for split, amount in amounts.items():
            found = int((splits == SPLITS.index(split)).sum())
            if isinstance(amount, int) and found < amount:
                print(
                    f"--{split} {amount}: {found} rows, as rows that share a picture stay together", file=sys.stderr
                )
    return Survey(splits, texts, size)


def _size(folder, image) -> int:
    """Bytes of a picture, 0 if it is not there or too large: why it cannot be used is said later."""
    if isinstance(image, bytes):
        return len(image)
    try:
        size = os.path.getsize(os.path.join(folder, file_name(image)))
    except (OSError, ValueError):
        return 0
    return size if size <= MAX_BYTES else 0


def items_of(f, path):
    """`(split, line, row)` of each row; what ends them early is an error of the run, with the name of the file."""
    try:
        yield from read_items(f)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error


def most_of(reasons) -> str:
    """The most frequent of counted reasons, in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
