"""What planning needs to know of every row: counted by hand, and of stored rows."""

import numpy as np

from lmm_jax.data.conversation import IMAGE, Encoded
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepared import Prepared


def encoded(ids, supervised, ends):
    return Encoded(np.array(ids, np.int32), np.array(supervised, bool), np.array(ends, np.int64))


def test_each_answer_counts_what_stands_before_its_end():
    """Two pictures and two answers, a text with one, and a row without an answer."""
    index = Index()
    index.add(encoded([1, IMAGE, 5, 7, 2, IMAGE, 8, 9, 2], [0, 0, 0, 1, 1, 0, 0, 1, 1], [5, 9]), [(30, 20), (4, 5)])
    index.add(encoded([1, 6, 7, 2], [0, 0, 1, 1], [4]), [])
    index.add(encoded([1, IMAGE, 6], [0, 0, 0], []), [(9, 9)])
    found = index.arrays()
    assert found["turn_offsets"].tolist() == [0, 2, 3, 3]
    assert found["turn_tokens"].tolist() == [4, 7, 4]  # pictures not counted
    assert found["turn_supervised"].tolist() == [2, 4, 2]
    assert found["turn_images"].tolist() == [1, 2, 0]
    assert found["image_offsets"].tolist() == [0, 2, 2, 3]
    assert found["image_sizes"].tolist() == [[30, 20], [4, 5], [9, 9]]
    kinds = {name: array.dtype for name, array in found.items()}
    assert {name for name, kind in kinds.items() if kind == np.int64} == {"turn_offsets", "image_offsets"}
    assert set(kinds.values()) == {np.dtype(np.int64), np.dtype(np.int32)}


def test_without_rows_the_arrays_have_their_shapes():
    found = Index().arrays()
    assert found["turn_offsets"].tolist() == found["image_offsets"].tolist() == [0]
    assert found["image_sizes"].shape == (0, 2) and found["turn_tokens"].shape == (0,)


def test_the_index_counts_what_is_there(digits_folder):
    data = Prepared(digits_folder, "train")
    assert len(data) == 64 and (data.index["image_sizes"] == 24).all() and len(data.index["image_sizes"]) == 64
    assert data.about["splits"]["validation"] == {"rows": 32, "images": 32}
    ends = data.index["turn_offsets"][1:] - 1
    # Answers and end pieces: nine digits read, and five one-piece answers where there are other turns.
    assert set(data.index["turn_supervised"][ends]) <= {10, 20}
