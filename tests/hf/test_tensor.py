"""A tensor in the published layout and in ours: single numbers, whose places are worked out by hand."""

import numpy as np
import pytest

from lmm_jax.families.kinds import DEPTHWISE, FLAT, FROM_HEADS, HALVING, LINEAR, PATCHES, SAME
from lmm_jax.hf import tensor
from lmm_jax.hf.tensor import Tensor, their_shape

# layout, the shape of ours, that of theirs, an index into theirs and the same number's in ours
CASES = {
    "matrix": (LINEAR, (3, 5), (5, 3), (4, 1), (1, 4)),  # output first, as `torch.nn.Linear` has it
    "matrix to heads": (LINEAR, (3, 4, 8), (32, 3), (2 * 8 + 1, 2), (2, 2, 1)),
    "matrix from heads": (FROM_HEADS, (4, 8, 3), (3, 32), (2, 3 * 8 + 7), (3, 7, 2)),
    "bias of heads": (FLAT, (4, 8), (32,), (3 * 8 + 5,), (3, 5)),
    "table": (SAME, (7, 3), (7, 3), (6, 2), (6, 2)),
    "patches": (PATCHES, (4 * 4 * 3, 6), (6, 3, 4, 4), (5, 1, 2, 3), ((2 * 4 + 3) * 3 + 1, 5)),
    "halving": (HALVING, (2 * 2 * 3, 6), (6, 3, 2, 2), (5, 2, 1, 0), ((1 * 2 + 0) * 3 + 2, 5)),
    "depthwise": (DEPTHWISE, (7, 7, 1, 5), (5, 1, 7, 7), (4, 0, 2, 6), (2, 6, 0, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_number_goes_to_its_place_and_back(name):
    layout, shape, theirs, at, ours_at = CASES[name]
    assert their_shape(layout, shape, {"patch_size": 4}) == theirs
    one = Tensor(name, theirs, "path", None, layout.order)
    ours = np.arange(np.prod(shape)).reshape(shape)
    found = one.to_theirs(ours)
    assert found.shape == theirs and found.flags.c_contiguous and found[at] == ours[ours_at]
    back = np.zeros_like(ours)
    one.to_ours(found, back)
    np.testing.assert_array_equal(back, ours)


def test_large_matrices_are_whole():
    """They are transposed in strips, whose last one is shorter."""
    shape = (2 * tensor.STRIP + 5, tensor.STRIP + 1)
    ours = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    one = Tensor("large", shape[::-1], "path", None, LINEAR.order)
    np.testing.assert_array_equal(one.to_theirs(ours), ours.T)
    back = np.zeros_like(ours)
    one.to_ours(ours.T, back)
    np.testing.assert_array_equal(back, ours)
