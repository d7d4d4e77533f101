"""What planning needs to know of every record, in a few flat arrays beside the records.

Records have different numbers of turns and pictures, so both are stored flat with offsets:

    turn_offsets     [records + 1]  the answers of record i that are trained on are entries turn_offsets[i] …
                                    turn_offsets[i + 1] - 1 of
    turn_tokens      [answers]      text tokens from the record's start to the end of this answer, without pictures
    turn_supervised  [answers]      supervised tokens up to there
    turn_images      [answers]      pictures up to there
    image_offsets    [records + 1]  the pictures of record i are entries image_offsets[i] … of
    image_sizes      [images, 2]    width and height, pixels, upright
"""

import array
import math
import zipfile

import numpy as np

from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.images import MAX_SIDE

OFFSETS = {"turn_offsets": "turn_tokens", "image_offsets": "image_sizes"}  # and the entries that they count
KINDS = {
    "turn_offsets": np.int64,
    "turn_tokens": np.int32,
    "turn_supervised": np.int32,
    "turn_images": np.int32,
    "image_offsets": np.int64,
    "image_sizes": np.int32,
}


def read(file) -> dict[str, np.ndarray]:
    """The arrays of the file of an index, which take no more memory than it has bytes.

    Args:
      file: `epath.Path` of what `np.savez` wrote, which compresses nothing.

    Raises:
      ValueError: it is missing or damaged; the message names it.
    """
    try:
        arrays = _arrays(file)
    except ValueError as error:
        raise ValueError(f"{file} is missing or damaged: {error}; prepare the folder again") from error
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{file} is missing or damaged; prepare the folder again") from error
    if wrong := fault(arrays):
        raise ValueError(f"{file} is damaged: {wrong}; prepare the folder again")
    return arrays


def _arrays(file):
    """Those of `KINDS` that a file has; ValueError if it says that it holds more than it does."""
    size = file.stat().length
    with file.open("rb") as f:
        with zipfile.ZipFile(f) as members:
            infos = members.infolist()
            if packed := [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]:
                raise ValueError(f"{packed[0]} is compressed, as `lmm prepare` never writes it")
            if sum(info.file_size for info in infos) > size:
                raise ValueError(f"it says that it holds more than the {size:,} bytes that it has")
            for info in (info for info in infos if info.filename.removesuffix(".npy") in KINDS):
                with members.open(info) as member:
                    _check_header(member, info)
        f.seek(0)
        with np.load(f) as found:  # which never unpickles
            return {name: found[name] for name in KINDS if name in found}


def _check_header(member, info):
    """Raises ValueError if a member is no array of the size that its header says: memory for that is taken first."""
    if np.lib.format.read_magic(member) != (1, 0):
        raise ValueError(f"{info.filename} is an array of another version than `lmm prepare` writes")
    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
        raise ValueError(
            f"{info.filename} is said to be an array {shape} of {dtype}, and has {info.file_size:,} bytes"
        )


def fault(arrays) -> str:
    """What is wrong with the arrays of an index, in a few words; "" if nothing is."""
    if lacking := [name for name in KINDS if name not in arrays]:
        return f"it lacks {', '.join(lacking)}"
    for name, kind in KINDS.items():
        shape = arrays[name].shape[1:]
        if arrays[name].dtype != kind or shape != ((2,) if name == "image_sizes" else ()) or not arrays[name].ndim:
            return f"{name} is an array of {arrays[name].dtype} {arrays[name].shape}"
        if arrays[name].size and arrays[name].min() < 0:
            return f"{name} holds {arrays[name].min()}"
    for name, entries in OFFSETS.items():
        offsets = arrays[name]
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(arrays[entries]) or (np.diff(offsets) < 0).any():
            return f"{name} does not count the {len(arrays[entries])} entries of {entries}"
    if len({len(arrays[name]) for name in KINDS if name.startswith("turn_") and name not in OFFSETS}) > 1:
        return "it has another number of turn_tokens than of turn_supervised or turn_images"
    if len({len(arrays[name]) for name in OFFSETS}) > 1:
        return "turn_offsets and image_offsets are of different numbers of records"
    if arrays["image_sizes"].size and not 1 <= arrays["image_sizes"].min() <= arrays["image_sizes"].max() <= MAX_SIDE:
        low, high = arrays["image_sizes"].min(), arrays["image_sizes"].max()
        return f"image_sizes are {low} to {high} pixels, and sides have 1 to {MAX_SIDE}"
    if (arrays["turn_supervised"] > arrays["turn_tokens"]).any():
        return "turn_supervised counts more than turn_tokens"
    pictures = np.repeat(
        np.diff(arrays["image_offsets"]), np.diff(arrays["turn_offsets"])
    )  # of the record of each turn
    if (arrays["turn_images"] > pictures).any():
        return "turn_images counts more pictures than a record has"
    return ""


class Index:
    """Collects the index of a split record by record, a few bytes each."""

    def __init__(self):
        self._turn_offsets, self._image_offsets = array.array("q", [0]), array.array("q", [0])
        self._tokens, self._supervised = array.array("i"), array.array("i")
        self._images, self._sizes = array.array("i"), array.array("i")

    def add(self, encoded, sizes):
        """Adds a record: its `conversation.Encoded` and the `(width, height)` of its pictures."""
        is_image = encoded.ids == IMAGE
        images, supervised = np.cumsum(is_image), np.cumsum(encoded.supervised)
        last = encoded.turn_ends - 1
        self._tokens.extend((encoded.turn_ends - images[last]).tolist())
        self._supervised.extend(supervised[last].tolist())
        self._images.extend(images[last].tolist())
        self._turn_offsets.append(len(self._tokens))
        self._sizes.extend(side for size in sizes for side in size)
        self._image_offsets.append(len(self._sizes) // 2)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the module's table."""
        held = {
            "turn_offsets": self._turn_offsets,
            "turn_tokens": self._tokens,
            "turn_supervised": self._supervised,
            "turn_images": self._images,
            "image_offsets": self._image_offsets,
            "image_sizes": self._sizes,
        }
        arrays = {name: np.array(held[name], kind) for name, kind in KINDS.items()}
        return arrays | {"image_sizes": arrays["image_sizes"].reshape(-1, 2)}
