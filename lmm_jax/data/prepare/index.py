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
        return {
            "turn_offsets": np.array(self._turn_offsets, np.int64),
            "turn_tokens": np.array(self._tokens, np.int32),
            "turn_supervised": np.array(self._supervised, np.int32),
            "turn_images": np.array(self._images, np.int32),
            "image_offsets": np.array(self._image_offsets, np.int64),
            "image_sizes": np.array(self._sizes, np.int32).reshape(-1, 2),
        }
