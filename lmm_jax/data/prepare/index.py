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

import numpy as np

from lmm_jax.data.conversation import IMAGE

OFFSETS = {"turn_offsets": "turn_tokens", "image_offsets": "image_sizes"}  # and the entries that they count
KINDS = {
    "turn_offsets": np.int64,
    "turn_tokens": np.int32,
    "turn_supervised": np.int32,
    "turn_images": np.int32,
    "image_offsets": np.int64,
    "image_sizes": np.int32,
}


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
