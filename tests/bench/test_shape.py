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


def test_a_shape_that_lacks_a_field(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(TINY | {"text": {"width": 1, "mlp": 1, "layers": 1, "heads": 1}}))
    with pytest.raises(ValueError, match=r"bad.json: text lacks vocab_size"):
        bench_shapes.load_shape(tmp_path / "bad.json")
