"""Packing and order from lengths alone."""

import numpy as np
import pytest

from lmm_jax.data.counts import count_rows, needs_of
from lmm_jax.data.packing import FULL, fill_rows, place_copies
from lmm_jax.data.stream import Capacity, Needs, Stream, choose_capacity, fits, plan_packs, scales_at
from lmm_jax.data.visual_layout import VisualLayout


def single(lengths, pictures=None):
    lengths = np.asarray(lengths)
    pictures = np.zeros_like(lengths) if pictures is None else np.asarray(pictures)
    return Needs(lengths[:, None], pictures, lengths // 4)


def random_needs(n, copies=3, seed=0):
    rng = np.random.default_rng(seed)
    text, pictures = rng.integers(10, 60, n), rng.integers(0, 3, n)
    lengths = text[:, None] + pictures[:, None] * np.array([16, 4, 1])[:copies]
    lengths[pictures == 0, 1:] = 0
    return Needs(lengths, pictures, text // 3 * (lengths > 0).sum(axis=1))


def assert_packed(needs, packs, capacity):
    assert sorted(int(row) for pack in packs for row in pack.members) == list(range(len(needs)))
    for pack in packs:
        some, used = needs.take(pack.members), np.zeros(capacity.rows, int)
        assert some.views.sum() <= capacity.views and some.targets.sum() <= capacity.targets
        copies = some.copies[some.copies > 0]  # member by member, as `where`
        np.add.at(used, pack.where, copies)
        assert len(copies) == len(pack.where) and used.max() <= capacity.length


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_every_row_stands_in_one_pack_that_holds_it(rows, copies):
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
    after, left, rows = place_copies([60, 60, 41], free)
    np.testing.assert_array_equal(rows[:, 1], [0, 1, 1])
    np.testing.assert_array_equal(left, [FULL, 0, FULL])
    np.testing.assert_array_equal(after[1], [0, 0])


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


def stream_of(seed=0, **kwargs):
    sources = [random_needs(700), random_needs(300, seed=1)]
    return Stream(sources, kwargs.pop("weights", (3.0, 1.0)), Capacity(2, 256, 12, 400), seed, **kwargs)


def test_the_stream_depends_on_seed_and_position_alone():
    a, b, other = stream_of(), stream_of(), stream_of(seed=1)
    late = [b[p] for p in (900, 13, 400, 0)]  # asked in another order
    for position, found in zip((900, 13, 400, 0), late, strict=True):
        np.testing.assert_array_equal(a[position].members, found.members)
        assert a[position].where == found.where
    assert any(not np.array_equal(a[p].members, other[p].members) for p in range(10))


def test_a_mixture_draws_by_weight_and_goes_through_every_row():
    stream = stream_of()
    drawn = np.concatenate([stream.rows(n) for n in range(6)])
    assert abs((drawn[:, 0] == 0).mean() - 0.75) < 1e-3
    rare = drawn[drawn[:, 0] == 1, 1]
    np.testing.assert_array_equal(np.bincount(rare, minlength=300), 5)
    assert list(rare[:250]) != list(rare[250:500])
    # The sources are mixed within a round, not one after the other.
    assert 0.5 < (stream.rows(0)[:100, 0] == 0).mean() < 1


def test_one_source_goes_through_its_rows_once_a_round():
    stream = Stream([random_needs(500)], [1.0], Capacity(2, 256, 12, 400), 0)
    assert (stream.rows(0) != stream.rows(1)).any()  # each time in another order
    for number in range(3):
        packs = [stream[p] for p in range(stream._end(number - 1) if number else 0, stream._end(number))]
        assert sorted(np.concatenate([pack.members for pack in packs])[:, 1]) == list(range(500))


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="weights must be positive"):
        stream_of(weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="no usable row"):
        Stream([random_needs(0)], [1.0], Capacity(1, 256, 12, 400), 0)


def test_the_planner_leaves_little_unused():
    needs = random_needs(4000, copies=1)
    capacity = choose_capacity([needs], [1.0], 256, 0)
    positions, pictures = Stream([needs], [1.0], capacity, 0).usage()
    assert positions > 0.95 and pictures > 0.9, (capacity, positions, pictures)
    with pytest.raises(ValueError, match=r"raise data\.length"):
        choose_capacity([single([300, 20])], [1.0], 256, 0)


def test_short_texts_beside_pictures_fill_rows_and_slots():
    """576 tokens a picture and lognormal text of median 80; 6 % of the rows are text alone, of median 300."""
    rng, n = np.random.default_rng(0), 6000
    alone = rng.random(n) < 0.06
    text = np.where(alone, rng.lognormal(np.log(300), 0.9, n), 10 + rng.lognormal(np.log(70), 0.8, n)).astype(int)
    needs = single((text + 576 * ~alone).clip(20, 2048), (~alone).astype(int))
    capacity = choose_capacity([needs], [1.0], 2048, 0)
    positions, pictures = Stream([needs], [1.0], capacity, 0).usage()
    assert positions >= 0.95 and pictures >= 0.9, (capacity, positions, pictures)


INDEX = {
    "turn_offsets": np.array([0, 2, 3, 3, 5]),
    "turn_tokens": np.array([10, 30, 20, 15, 80]),
    "turn_supervised": np.array([3, 9, 5, 2, 40]),
    "turn_images": np.array([1, 2, 0, 1, 1]),
    "image_offsets": np.array([0, 2, 2, 2, 3]),
    "image_sizes": np.array([[30, 20], [20, 30], [30, 20]]),
}


PLAIN = VisualLayout(size=24, cell=4, canvas=(24, 24))


def test_needs_come_from_the_answers_that_fit():
    scales = (1, 9)

    def counted(length, cut):
        counts = count_rows(INDEX, PLAIN, scales, length, cut)
        return needs_of(counts, scales, [scales]), counts.usable

    needs, usable = counted(48, cut=True)
    np.testing.assert_array_equal(usable, [True, True, False, True])
    np.testing.assert_array_equal(needs.copies, [[48, 32], [20, 0], [0, 0], [24, 16]])
    np.testing.assert_array_equal(needs.views, [2, 0, 0, 1])
    np.testing.assert_array_equal(needs.targets, [18, 5, 0, 4])
    needs, usable = counted(47, cut=True)
    np.testing.assert_array_equal(needs.copies[0], [19, 11])
    _, usable = counted(47, cut=False)
    np.testing.assert_array_equal(usable, [False, True, False, False])


def test_needs_hold_for_every_phase_of_a_rotation():
    scales = (1, 4, 9, 36)
    phases = [scales_at(i, scales, 2) for i in range(4)]
    needs = needs_of(count_rows(INDEX, PLAIN, scales, 200, cut=False), scales, phases)
    np.testing.assert_array_equal(needs.copies[0], [30 + 2 * 36, 30 + 2 * 4])


def test_a_split_without_answers_or_pictures_is_counted():
    index = {name: np.zeros(0, x.dtype) for name, x in INDEX.items()}
    index |= {
        "turn_offsets": np.zeros(3, int),
        "image_offsets": np.zeros(3, int),
        "image_sizes": np.zeros((0, 2), int),
    }
    counts = count_rows(index, PLAIN, (9,), 100, cut=True)
    assert not counts.usable.any() and not counts.positions.any() and counts.positions.shape == (2, 1)


def test_views_come_in_whole_pictures():
    needs = random_needs(2000, copies=1)
    five = Needs(needs.copies, needs.views * 5, needs.targets)
    capacity = choose_capacity([five], [1.0], 256, 0, views_step=5)
    assert capacity.views % 5 == 0 and fits(five, capacity).all()
    positions, views = Stream([five], [1.0], capacity, 0).usage()
    assert positions > 0.93 and views > 0.85, (capacity, positions, views)
