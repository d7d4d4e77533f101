"""Conversations opened into positions, and rows filled with them."""

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.segments import DoesNotFit, blank, lay_out, pack, positions

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


def test_too_many_targets_say_what_is_needed():
    a = lay_out(IDS, SUPERVISED, [np.arange(3)])
    with pytest.raises(DoesNotFit, match=r"4 supervised tokens, room for 3; raise data.targets"):
        pack([a, a], [0, 1], rows=2, length=15, targets=3)


def test_what_is_blank_takes_its_place_and_trains_nothing():
    a = lay_out(IDS, SUPERVISED, [np.arange(3)])
    whole, gap = (pack([first, a], [0, 0], rows=1, length=16, targets=4) for first in (a, blank(len(a))))
    for name in ("position", "segment"):
        np.testing.assert_array_equal(gap[name], whole[name])
    assert not gap["id"][0, :8].any() and (gap["slot"][0, :8] == -1).all()
    np.testing.assert_array_equal(gap["id"][0, 8:], whole["id"][0, 8:])
    np.testing.assert_array_equal(gap["target_at"], [13, 14, 0, 0])


def test_positions_of_three_axes_run_over_a_picture_and_go_on_behind_its_longer_side():
    slot = np.array([-1, -1, 0, 1, 2, 3, 4, 5, -1, 6, 7, 8, -1])
    found = positions(slot, [(2, 3), (3, 1)])
    text = [[0] * 3, [1] * 3]
    first = [[2, 2 + row, 2 + column] for row in range(2) for column in range(3)]
    second = [[6, 6 + row, 6] for row in range(3)]
    assert found.tolist() == [*text, *first, [5] * 3, *second, [9] * 3]
    np.testing.assert_array_equal(positions(slot), np.arange(13))


def test_pictures_side_by_side_and_text_in_their_blocks_are_numbered_alike():
    slot = np.array([0, 1, 2, 3, -1])
    assert positions(slot, [(1, 2), (2, 1)]).tolist() == [
        [0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 3, 2], [4, 4, 4],
    ]  # fmt: skip
    assert positions(np.full(3, -1), []).tolist() == [[0] * 3, [1] * 3, [2] * 3]


def test_a_pack_of_three_axes_holds_text_and_padding_too():
    ids, supervised = np.array([1, 5, 2]), np.array([False, False, True])
    shown = lay_out(np.array([1, IMAGE, 2]), supervised, [np.array([4, 5])], shapes=[(1, 2)])
    text = lay_out(ids, supervised, [], shapes=[])
    out = pack([shown, text, blank(2)], [0, 0, 0], 1, 12, 4, axes=(3,))
    want = [[0, 0, 0], [1, 1, 1], [1, 1, 2], [3, 3, 3], *([n] * 3 for n in (0, 1, 2, 0, 1)), *[[0] * 3] * 3]
    assert out["position"].shape == (1, 12, 3) and out["position"][0].tolist() == want
