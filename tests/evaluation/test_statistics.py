"""Intervals, paired differences and calibration, on synthetic answers whose truth is known."""

import math
import types

import numpy as np
import pytest
from PIL import Image

from lmm_jax.evaluation import statistics


def test_an_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for repetition in range(300):
        _, low, high = statistics.mean_interval(rng.random(120) < 0.7, seed=repetition)
        held += low <= 0.7 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_with_groups_it_does_where_questions_about_a_picture_are_alike():
    rng = np.random.default_rng(1)
    held = {True: 0, False: 0}
    for repetition in range(200):
        groups = np.repeat(np.arange(60), 5)
        scores = np.repeat(rng.random(60) < 0.6, 5)  # five times the same
        for grouped in held:
            _, low, high = statistics.mean_interval(scores, groups if grouped else None, seed=repetition)
            held[grouped] += low <= 0.6 <= high
    assert held[True] / 200 >= 0.91
    assert held[False] / 200 < 0.8  # what happens to those who forget the groups


def test_an_interval_holds_its_mean_in_whatever_order_and_names_the_questions_come():
    rng = np.random.default_rng(2)
    for _ in range(50):
        n = int(rng.integers(1, 60))
        scores, groups = rng.choice([0, 0.3, 0.5, 1], n), rng.integers(0, max(1, n // 3), n)
        mean, low, high = statistics.mean_interval(scores, groups)
        assert low <= mean <= high and mean == pytest.approx(scores.mean())
        order = rng.permutation(n)
        assert statistics.mean_interval(scores[order], -groups[order]) == pytest.approx((mean, low, high))
    alone = np.arange(n)
    assert statistics.mean_interval(scores, alone) == statistics.mean_interval(scores)


def test_groups_of_unlike_size_count_by_their_questions():
    mean, low, high = statistics.mean_interval([1, 0, 0, 0], ["a", "b", "b", "b"])
    assert mean == 0.25 and (low, high) == (0, 1)


@pytest.mark.parametrize("count", [1, 5, 100])
def test_answers_that_are_all_alike_are_not_certain(count):
    absent = 0.025 ** (1 / count)  # the exact bound of Clopper and Pearson
    assert statistics.mean_interval([1] * count) == pytest.approx((1, absent, 1))
    assert statistics.mean_interval([0] * count) == pytest.approx((0, 0, 1 - absent))
    difference, low, high, p = statistics.paired_difference([0.5] * count, [0.5] * count)
    assert (difference, p) == (0, 1) and (low, high) == pytest.approx((absent - 1, 1 - absent))


def test_a_paired_test_is_mc_nemars_for_answers_that_are_right_or_wrong():
    # 8 wins and 2 losses of 40: two-sided binomial, 2 * sum of C(10, k) for k >= 8, over 2^10.
    first = np.array([0] * 8 + [1] * 2 + [1] * 30)
    second = np.array([1] * 8 + [0] * 2 + [1] * 30)
    exact = 2 * sum(math.comb(10, k) for k in (8, 9, 10)) / 2**10
    difference, low, high, p = statistics.paired_difference(first, second)
    assert difference == pytest.approx(6 / 40) and low < difference < high
    assert p == pytest.approx(exact, abs=0.02)
    turned = statistics.paired_difference(second, first)
    assert turned[0] == -difference and turned[3] == pytest.approx(p, abs=0.02)


def test_a_test_finds_nothing_where_nothing_is_and_what_is_there():
    rng = np.random.default_rng(3)
    found = 0
    for repetition in range(200):
        first, second = rng.random((2, 60)) < 0.5
        found += statistics.paired_difference(first, second, seed=repetition, draws=200)[3] <= 0.05
    assert found / 200 <= 0.09
    better = rng.random(400) < 0.6
    worse = better & (rng.random(400) < 0.85)
    difference, low, high, p = statistics.paired_difference(worse, better)
    assert 0 < low < difference < high and p < 0.001


def test_groups_make_a_test_as_careful_as_there_are_pictures():
    first, second = np.zeros(20), np.ones(20)
    assert statistics.paired_difference(first, second)[3] < 0.001
    assert statistics.paired_difference(first, second, np.repeat([0, 1], 10))[3] == pytest.approx(0.5, abs=0.02)


def test_holm_passes_the_smallest_until_one_fails():
    assert statistics.holm([0.03, 0.001, 0.02, 0.5]).tolist() == [False, True, False, False]
    assert statistics.holm([0.01, 0.001, 0.02]).tolist() == [True, True, True]
    assert statistics.holm([]).tolist() == []


def test_the_calibration_error_is_small_where_a_model_is_calibrated_and_the_distance_where_it_is_not():
    rng = np.random.default_rng(4)
    confidence = rng.random(20_000)
    right = rng.random(20_000) < confidence
    assert statistics.calibration_error(confidence, right) < 0.015
    assert statistics.calibration_error(confidence, confidence) == pytest.approx(0, abs=1e-12)
    assert statistics.calibration_error(np.full(100, 0.9), np.zeros(100)) == pytest.approx(0.9)
    assert statistics.calibration_error(confidence, np.clip(confidence - 0.2, 0, 1)) == pytest.approx(0.18, abs=0.005)


def test_bins_are_of_as_many_answers_and_keep_those_of_one_confidence_together():
    confidence = np.linspace(0, 1, 150)
    bins = statistics.reliability(confidence, confidence > 0.5)
    assert [b.count for b in bins] == [10] * 15
    assert all(b.low <= b.score <= b.high for b in bins)
    assert [b.confidence for b in bins] == sorted(b.confidence for b in bins)
    rng = np.random.default_rng(5)
    confidence, scores = rng.choice([0.2, 0.5, 0.9], 300), rng.random(300)
    bins = statistics.reliability(confidence, scores)
    assert [round(b.confidence, 6) for b in bins] == [0.2, 0.5, 0.9]
    order = rng.permutation(300)
    error = statistics.calibration_error(confidence[order], scores[order])
    assert error == pytest.approx(statistics.calibration_error(confidence, scores))
    assert len(statistics.reliability([0.1, 0.9], [0, 1])) == 2


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: statistics.mean_interval([]), "one score or more"),
        (lambda: statistics.mean_interval([0, math.nan]), "score number 1 is nan"),
        (lambda: statistics.mean_interval([0, 1], [1]), "a group for each of 2"),
        (lambda: statistics.paired_difference([0, 1], [1]), "got 2 and 1"),
        (lambda: statistics.calibration_error([0.5, 1.2], [0, 1]), "a confidence lies between 0 and 1"),
        (lambda: statistics.calibration_error([0.5], [0, 1]), "1 confidences, got 2"),
        (lambda: statistics.reliability([0.5], [1], bins=0), "1 bin or more"),
    ],
)
def test_what_cannot_be_used_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_questions_about_one_picture_are_found():
    opened = Image.new("RGB", (1, 1))
    shown = [("a.png",), (opened,), ("a.png",), (), (opened,), (), ("a.png", "b.png"), (b"x",)]
    examples = [types.SimpleNamespace(images=images, group="") for images in shown]
    assert statistics.of_one_picture(examples).tolist() == [0, 1, 0, 2, 1, 3, 4, 5]
    grouped = [
        types.SimpleNamespace(images=(name,), group=group) for name, group in (("a", "x"), ("b", "x"), ("a", ""))
    ]
    assert statistics.of_one_picture(grouped).tolist() == [0, 0, 1]


def test_answers_say_which_questions_are_about_one_picture_and_are_alone_where_they_do_not_know():
    records = [types.SimpleNamespace(picture=picture) for picture in (3, -1, 0, 3, -1)]
    assert statistics.of_records(records).tolist() == [3, 4, 0, 3, 5]
    assert statistics.of_records(records[1:2]).tolist() == [1]
