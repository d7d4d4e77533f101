"""Which records share a pack, from lengths alone."""

import numpy as np
import pytest

from lmm_jax.data.packing import (
    NO_PLACE,
    NO_ROW,
    Capacity,
    Needs,
    assign_rows,
    fill_rows,
    fits,
    place_copies,
    plan_packs,
    usage,
)
from lmm_jax.data.segments import DoesNotFit
from tests.data.needs import random_needs, single


def test_the_drawn_pack_is_the_one_that_is_planned():
    """The drawing of the module's docstring."""
    needs = Needs(np.array([[8, 3], [6, 2], [4, 0]]), np.array([1, 1, 0]), np.zeros(3, int))
    (pack,) = plan_packs(needs, Capacity(rows=2, length=12, views=2, targets=0))
    assert pack.members.tolist() == [0, 1, 2]
    assert pack.rows.tolist() == [[0, 0], [1, 1], [1, NO_ROW]]
    assert usage(needs, [pack], Capacity(2, 12, 2, 0)) == (23 / 24, 1.0)


def assert_packed(needs, packs, capacity):
    assert sorted(int(record) for pack in packs for record in pack.members) == list(range(len(needs)))
    for pack in packs:
        some, used = needs.take(pack.members), np.zeros(capacity.rows, int)
        assert some.views.sum() <= capacity.views and some.targets.sum() <= capacity.targets
        np.testing.assert_array_equal(pack.rows == NO_ROW, some.copies == 0)
        np.add.at(used, pack.rows[some.copies > 0], some.copies[some.copies > 0])
        assert used.max() <= capacity.length


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_every_record_stands_in_one_pack_that_holds_it(rows, copies):
    needs = random_needs(3000, copies)
    per_row = needs.views.sum() / needs.copies.sum() * 256
    capacity = Capacity(rows, 256, round(per_row * rows) + 2, 200 * rows)
    assert fits(needs, capacity).all()
    packs = plan_packs(needs, capacity)
    assert_packed(needs, packs, capacity)
    taken = needs.copies.sum() / (len(packs) * rows * 256)
    assert taken > 0.8, taken


@pytest.mark.parametrize("capacity", [Capacity(2, 256, 3, 1000), Capacity(2, 256, 1000, 40)])
def test_pictures_and_targets_limit_a_pack(capacity):
    needs = random_needs(300, copies=1)
    packs = plan_packs(needs, capacity)
    assert_packed(needs, packs, capacity)


def test_what_fits_no_pack_is_known_before():
    capacity = Capacity(2, 100, 3, 50)
    needs = Needs(
        np.array([[100, 100, 0], [101, 1, 1], [60, 60, 40], [60, 60, 41], [10, 0, 0], [10, 0, 0]]),
        np.array([0, 0, 0, 0, 4, 3]),
        np.array([0, 0, 0, 0, 0, 51]),
    )
    np.testing.assert_array_equal(fits(needs, capacity), [True, False, True, False, False, False])
    free = np.array([[100, 100], [60, 101], [160, 0]])
    placement = place_copies([60, 60, 41], free)
    np.testing.assert_array_equal(placement.rows[1], [0, 1, 1])
    np.testing.assert_array_equal(placement.fits, [False, True, False])
    np.testing.assert_array_equal(placement.left, [NO_PLACE, 0, NO_PLACE])
    np.testing.assert_array_equal(placement.free[1], [0, 0])


def test_packs_of_one_row_reach_what_lengths_allow():
    """Pairs that fill a row exactly are found."""
    rng = np.random.default_rng(0)
    half = rng.integers(200, 500, 500)
    needs = single(rng.permutation(np.concatenate([half, 1000 - half])))
    packs = plan_packs(needs, Capacity(1, 1000, 0, 1000))
    assert len(packs) == 500


def test_lengths_near_a_third_of_a_row_leave_little():
    """Pictures of 576 tokens with short texts, three to a row of 2,048: longest first would put two in most rows."""
    rng = np.random.default_rng(0)
    lengths = 576 + rng.lognormal(np.log(90), 0.8, 4000).astype(int).clip(10, 1400)
    rows = fill_rows(lengths, 2048)
    assert sorted(i for row in rows for i in row) == list(range(4000))
    assert all(lengths[row].sum() <= 2048 for row in rows)
    assert lengths.sum() / (len(rows) * 2048) > 0.95


def test_each_segment_goes_where_it_leaves_the_least_room():
    assert assign_rows([5, 3, 7, 2], rows=2, length=10) == [0, 0, 1, 0]


def test_segments_that_fit_nowhere_say_what_is_needed():
    with pytest.raises(DoesNotFit, match=r"\[8, 8\] positions do not fit into 1 rows of 15"):
        assign_rows([8, 8], rows=1, length=15)


def test_views_are_spread_evenly_over_packs_of_filled_rows():
    """Rows with two pictures and rows of text alone: each pack has room for the views of one of the former."""
    needs = single([100] * 8, pictures=[2, 0, 2, 0, 2, 0, 2, 0])
    packs = plan_packs(needs, Capacity(rows=2, length=100, views=2, targets=1000))
    assert [int(needs.views[pack.members].sum()) for pack in packs] == [2] * 4
    assert [pack.rows.ravel().tolist() for pack in packs] == [[0, 1]] * 4


def test_a_row_with_too_many_views_for_a_pack_is_split():
    needs = single([25] * 4, pictures=[2, 2, 2, 2])
    packs = plan_packs(needs, Capacity(rows=1, length=100, views=4, targets=1000))
    assert [len(pack.members) for pack in packs] == [2, 2]


def test_rows_that_are_not_full_wait_for_the_next_window():
    """The first window has only records of 60 of 100 positions, the second those of 40 that complete them."""
    needs = single([60] * 1024 + [40] * 1024)
    packs = plan_packs(needs, Capacity(rows=1, length=100, views=0, targets=1000))
    assert len(packs) == 1024 and all(needs.copies[pack.members].sum() == 100 for pack in packs)


def test_packs_of_several_copies_stay_open_for_the_next_window():
    """64 packs with most room stay open: of 1,024 records that fill packs of their own in part, 64 get company."""
    needs = Needs(np.array([[50, 10]] * 1024 + [[30, 10]] * 64), np.zeros(1088, int), np.zeros(1088, int))
    packs = plan_packs(needs, Capacity(rows=1, length=100, views=0, targets=0))
    assert len(packs) == 1024 and sum(len(pack.members) == 2 for pack in packs) == 64
