"""Which records stand at which position, and how much a pack should hold."""

from concurrent import futures

import numpy as np
import pytest

from lmm_jax.data.packing import Capacity, Needs, fits
from lmm_jax.data.stream import Mixture, Stream, choose_capacity, scales_at
from tests.data.needs import random_needs, single


def stream_of(seed=0, **kwargs):
    datasets = [random_needs(700), random_needs(300, seed=1)]
    return Stream(datasets, kwargs.pop("weights", (3.0, 1.0)), Capacity(2, 256, 12, 400), seed, **kwargs)


def test_the_stream_depends_on_seed_and_position_alone():
    a, b, other = stream_of(), stream_of(), stream_of(seed=1)
    late = [b[p] for p in (900, 13, 400, 0)]  # asked in another order
    for position, found in zip((900, 13, 400, 0), late, strict=True):
        np.testing.assert_array_equal(a[position].members, found.members)
        np.testing.assert_array_equal(a[position].rows, found.rows)
    assert any(not np.array_equal(a[p].members, other[p].members) for p in range(10))


def test_threads_that_ask_at_once_see_the_same_stream():
    """Reader threads plan rounds while the loop asks for the epoch: a round that two of them added stood twice."""
    alone = stream_of()
    ends = [alone._end(number) for number in range(8)]
    for _ in range(3):
        together = stream_of()
        with futures.ThreadPoolExecutor(8) as pool:
            epochs = list(pool.map(together.epoch, [*ends, *ends]))
        assert epochs == [*range(1, 9), *range(1, 9)]
        assert together._ends == [0, *ends, alone._end(8)]


def test_an_epoch_is_a_round():
    stream = stream_of()
    end = stream._end(0)
    assert stream.epoch(0) == 0 and stream.epoch(end) == 1 and stream.epoch(end // 2) == (end // 2) / end


def test_a_mixture_draws_by_weight_and_goes_through_every_record():
    mixture = stream_of().mixture
    drawn = np.concatenate([mixture.drawn(n) for n in range(6)])
    assert abs((drawn[:, 0] == 0).mean() - 0.75) < 1e-3
    rare = drawn[drawn[:, 0] == 1, 1]
    np.testing.assert_array_equal(np.bincount(rare, minlength=300), 5)
    assert list(rare[:250]) != list(rare[250:500])
    # The datasets are mixed within a round, not one after the other.
    assert 0.5 < (mixture.drawn(0)[:100, 0] == 0).mean() < 1


def test_one_dataset_goes_through_its_records_once_a_round():
    stream = Stream([random_needs(500)], [1.0], Capacity(2, 256, 12, 400), 0)
    assert (stream.mixture.drawn(0) != stream.mixture.drawn(1)).any()  # each time in another order
    for number in range(3):
        packs = [stream[p] for p in range(stream._end(number - 1) if number else 0, stream._end(number))]
        assert sorted(np.concatenate([pack.members for pack in packs])[:, 1]) == list(range(500))


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="weights must be positive"):
        stream_of(weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="no usable record"):
        Stream([random_needs(0)], [1.0], Capacity(1, 256, 12, 400), 0)


def test_the_planner_leaves_little_unused():
    needs = random_needs(4000, copies=1)
    capacity = choose_capacity([needs], [1.0], 256, 0)
    positions, pictures = Stream([needs], [1.0], capacity, 0).usage()
    assert positions > 0.95 and pictures > 0.9, (capacity, positions, pictures)
    with pytest.raises(ValueError, match=r"raise data\.length"):
        choose_capacity([single([300, 20])], [1.0], 256, 0)


def test_short_texts_beside_pictures_fill_rows_and_slots():
    """576 tokens a picture and lognormal text of median 80; 6 % of the records are text alone, of median 300."""
    rng, n = np.random.default_rng(0), 6000
    alone = rng.random(n) < 0.06
    text = np.where(alone, rng.lognormal(np.log(300), 0.9, n), 10 + rng.lognormal(np.log(70), 0.8, n)).astype(int)
    needs = single((text + 576 * ~alone).clip(20, 2048), (~alone).astype(int))
    capacity = choose_capacity([needs], [1.0], 2048, 0)
    positions, pictures = Stream([needs], [1.0], capacity, 0).usage()
    assert positions >= 0.95 and pictures >= 0.9, (capacity, positions, pictures)


def test_views_come_in_whole_pictures():
    needs = random_needs(2000, copies=1)
    five = Needs(needs.copies, needs.views * 5, needs.targets)
    capacity = choose_capacity([five], [1.0], 256, 0, views_step=5)
    assert capacity.views % 5 == 0 and fits(five, capacity).all()
    positions, views = Stream([five], [1.0], capacity, 0).usage()
    assert positions > 0.93 and views > 0.85, (capacity, positions, views)


@pytest.mark.parametrize(("scales", "per_step"), [((1, 4, 9, 36), 2), ((1, 9, 36, 144, 576), 2), ((1, 4, 9), 3)])
def test_rotation_trains_every_scale_equally_often(scales, per_step):
    chosen = [scales_at(step, scales, per_step) for step in range(len(scales))]
    assert all(len(set(c)) == per_step for c in chosen)
    flat = [s for c in chosen for s in c]
    assert all(flat.count(s) == per_step for s in scales)


def test_without_shuffling_datasets_are_read_as_they_lie():
    mixture = Mixture([random_needs(4), random_needs(2, seed=1)], (1.0, 1.0), seed=0, shuffle=False)
    assert mixture.drawn(0).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 0]]
    assert mixture.drawn(1).tolist() == [[0, 3], [0, 0], [0, 1], [1, 1], [1, 0], [1, 1]]


def test_needs_of_drawn_records_are_those_of_their_datasets():
    one, three = random_needs(20, copies=1), random_needs(30, copies=3, seed=1)
    needs = Mixture([one, three], (1.0, 1.0), seed=0).needs_of(np.array([[1, 4], [0, 7], [1, 0]]))
    np.testing.assert_array_equal(needs.copies, [three.copies[4], [one.copies[7, 0], 0, 0], three.copies[0]])
    np.testing.assert_array_equal(needs.views, [three.views[4], one.views[7], three.views[0]])
    np.testing.assert_array_equal(needs.targets, [three.targets[4], one.targets[7], three.targets[0]])


def test_packs_hold_records_of_their_own_round_alone():
    stream = stream_of()
    first = [member for p in range(stream._end(0)) for member in map(tuple, stream[p].members.tolist())]
    assert sorted(first) == sorted(map(tuple, stream.mixture.drawn(0).tolist()))


def test_orders_are_what_they_were_when_runs_began():
    """A run resumes after an update of this package: an order is fixed by its seed for good."""
    mixture = Mixture([random_needs(5), random_needs(3, seed=1)], (5.0, 3.0), seed=7)
    assert mixture.drawn(0).tolist() == [[0, 0], [1, 2], [0, 2], [0, 4], [1, 0], [1, 1], [0, 1], [0, 3]]


def test_steps_of_several_canvases_have_one_each_and_their_order_is_the_position_s_alone():
    needs = random_needs(500)
    bucket = np.arange(500) % 3
    needs = Needs(needs.copies, needs.views, needs.targets, bucket)

    def stream():
        return Stream([needs], [1.0], Capacity(2, 256, 12, 400), 0, per_step=4)

    a, b = stream(), stream()
    end = a._end(1)
    assert end % 4 == 0
    orders = []
    for first in range(0, end, 4):
        step = [a[position] for position in range(first, first + 4)]
        assert len({pack.bucket for pack in step}) == 1
        assert all((bucket[pack.members[:, 1]] == pack.bucket).all() for pack in step)
        orders.append(step[0].bucket)
    assert orders != sorted(orders)  # canvases alternate
    for number in range(2):
        members = np.concatenate([pack.members[:, 1] for pack in a.round(number)])
        np.testing.assert_array_equal(np.sort(members), np.arange(500))
    for position in (end - 1, 3, 17):
        np.testing.assert_array_equal(a[position].members, b[position].members)
    # As many packs without records as fill up the last step of each canvas, no more.
    assert sum(len(pack.members) == 0 for pack in a.round(0)) <= 3 * 3
