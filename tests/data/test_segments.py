"""Index arithmetic of copies, targets and rows."""

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.pack_layout import bank_slots
from lmm_jax.data.packing import assign_rows
from lmm_jax.data.segments import DoesNotFit, lay_out, pack
from lmm_jax.data.stream import scales_at

IDS = np.array([1, IMAGE, 5, 6, 7, 2], np.int32)
SUPERVISED = np.array([0, 0, 0, 0, 1, 1], bool)


def test_pictures_open_into_slots_and_targets_shift():
    segment = lay_out(IDS, SUPERVISED, [np.array([30, 31, 32])], group=4)
    np.testing.assert_array_equal(segment.id, [1, 0, 0, 0, 5, 6, 7, 2])
    np.testing.assert_array_equal(segment.slot, [-1, 30, 31, 32, -1, -1, -1, -1])
    np.testing.assert_array_equal(segment.target, [-1, -1, -1, -1, -1, 7, 2, -1])


def test_several_pictures_and_a_mismatch():
    ids = np.array([IMAGE, 5, IMAGE], np.int32)
    segment = lay_out(ids, np.zeros(3, bool), [np.array([3]), np.array([8, 9])])
    np.testing.assert_array_equal(segment.slot, [3, -1, 8, 9])
    with pytest.raises(ValueError, match="2 <image> tags in the text, 1 pictures"):
        lay_out(ids, np.zeros(3, bool), [np.array([3])])


def test_rows_fill_and_positions_restart():
    a = lay_out(IDS, SUPERVISED, [np.arange(3)], group=1)
    b = lay_out(IDS, SUPERVISED, [np.arange(3, 4)], group=2)
    out = pack([a, b], [0, 0], rows=2, length=15, targets=5)
    assert (out["segment"][0] > 0).sum() == 14 and (out["segment"][1] == 0).all()
    np.testing.assert_array_equal(out["position"][0, :14], [*range(8), *range(6)])
    np.testing.assert_array_equal(out["segment"][0], [1] * 8 + [2] * 6 + [0])
    np.testing.assert_array_equal(out["target_at"], [5, 6, 11, 12, 0])
    np.testing.assert_array_equal(out["target"], [7, 2, 7, 2, 0])
    np.testing.assert_array_equal(out["group"], [1, 1, 2, 2, 0])
    assert (out["slot"][1] == -1).all()


def test_what_does_not_fit_says_what_is_needed():
    a = lay_out(IDS, SUPERVISED, [np.arange(3)])
    with pytest.raises(DoesNotFit, match=r"\[8, 8\] positions do not fit into 1 rows of 15"):
        assign_rows([8, 8], rows=1, length=15)
    with pytest.raises(DoesNotFit, match=r"4 supervised tokens, room for 3; raise data.targets"):
        pack([a, a], [0, 1], rows=2, length=15, targets=3)


def test_each_segment_goes_where_it_leaves_the_least_room():
    assert assign_rows([5, 3, 7, 2], rows=2, length=10) == [0, 0, 1, 0]


def test_bank_slots_are_disjoint_and_complete():
    tokens, units = (1, 9, 36), 4
    pictures = [(0, 1), (1, 2), (3, 1)]  # first unit, units
    slots = [bank_slots(np.arange(u * tokens[s]), first, s, tokens, units) for s in range(3) for first, u in pictures]
    np.testing.assert_array_equal(np.sort(np.concatenate(slots)), np.arange(4 * 46))
    for number in range(3):  # the newline stands behind all of them
        with_newline = bank_slots(np.array([2, -1, 0]), 1, number, tokens, units)
        assert with_newline[1] == 4 * 46 and with_newline[0] - with_newline[2] == 2


@pytest.mark.parametrize(("scales", "per_step"), [((1, 4, 9, 36), 2), ((1, 9, 36, 144, 576), 2), ((1, 4, 9), 3)])
def test_rotation_trains_every_scale_equally_often(scales, per_step):
    chosen = [scales_at(step, scales, per_step) for step in range(len(scales))]
    assert all(len(set(c)) == per_step for c in chosen)
    flat = [s for c in chosen for s in c]
    assert all(flat.count(s) == per_step for s in scales)
