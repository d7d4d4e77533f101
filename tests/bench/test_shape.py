"""Shapes and their synthetic batches."""

import json

import numpy as np
import pytest

from lmm_jax.bench import shape as bench_shapes
from tests.bench.tiny import SCALES, TINY


def test_rows_of_a_pack():
    assert bench_shapes.fewest_positions([3, 9, 4, 5], 2) == ([0, 0, 1, 1], 12)
    batch = bench_shapes.synthetic_batch(TINY, SCALES, rows=2)
    assert batch["id"].shape == (1, 2, 2, 29) and batch["target"].shape == (1, 2, 18)  # 28 | 16 + 13
    assert (np.sort(batch["slot"][0, 0][batch["slot"][0, 0] >= 0]) == np.arange(21)).all()
    assert (batch["group"] == batch["group"][:1]).all() and set(batch["group"].flat) == {1, 2, 4}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (TINY | {"text": {"width": 1, "mlp": 1, "layers": 1, "heads": 1}}, "text lacks vocab_size"),
        (TINY | {"text": 3}, "text is 3, an object with"),
        (TINY | {"batch": 0}, "batch=0, a whole number"),
        (TINY | {"vision": TINY["vision"] | {"heads": "a"}}, "vision has heads='a'"),
        (TINY | {"vision": TINY["vision"] | {"image": -1}}, "vision has image=-1"),
        (TINY | {"scales": []}, r"scales=\[\], expected"),
        (TINY | {"scales": 9}, "scales=9, expected"),
        ([1], r"the shape is \[1\]"),
        ({}, "the shape lacks batch"),
        ("{", "is no JSON"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_shape_that_cannot_be_meant_is_named(tmp_path, content, words):
    (tmp_path / "bad.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"--shape .*bad.json:? .*{words}"):
        bench_shapes.load_shape(tmp_path / "bad.json")
