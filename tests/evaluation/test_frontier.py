"""Curves of accuracy against tokens: hulls, areas, gaps, and the frontier against one by brute force."""

import itertools

import numpy as np
import pytest

from lmm_jax.evaluation import frontier, oracle

FIXED = [(1, 0.5), (4, 0.7), (9, 0.8), (36, 0.75)]


def random_points(rng):
    count = int(rng.integers(1, 9))
    return np.stack([rng.choice([1, 2, 4, 5, 9, 16, 36, 50], count), rng.random(count)], axis=1)


def test_a_hull_is_concave_lies_above_all_points_and_is_made_of_them():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = random_points(rng)
        hull = frontier.hull(points)
        slopes = np.diff(hull[:, 1]) / np.diff(hull[:, 0])
        assert (np.diff(slopes) < 0).all() and (np.diff(hull[:, 0]) > 0).all()
        assert (frontier.value(hull, points[:, 0]) >= points[:, 1] - 1e-12).all()
        assert {tuple(p) for p in hull.tolist()} <= {tuple(p) for p in points.tolist()}
        assert hull[0, 0] == points[:, 0].min() and hull[-1, 0] == points[:, 0].max()
        np.testing.assert_array_equal(frontier.hull(hull), hull)


@pytest.mark.parametrize("log", [True, False])
def test_an_area_is_the_integral(log):
    rng = np.random.default_rng(1)
    for _ in range(20):
        low, high = random_points(rng), random_points(rng)
        low[0, 0] = high[0, 0] = 1
        x = np.linspace(1, 40, 200_001)
        gap = frontier.value(high, x) - frontier.value(low, x)
        expected = np.trapezoid(gap, np.log(x) if log else x)
        assert frontier.area_between(low, high, 1, 40, log) == pytest.approx(expected, abs=1e-6)
        assert frontier.area_between(high, low, 1, 40, log) == pytest.approx(-expected, abs=1e-6)
        parts = frontier.area_between(low, high, 1, 7, log) + frontier.area_between(low, high, 7, 40, log)
        assert parts == pytest.approx(expected, abs=1e-6)


def test_the_gap_is_closed_by_the_oracle_and_not_by_fixed_budgets():
    best = [(1, 0.5), (2, 0.8), (4, 0.9)]
    assert frontier.gap_closed(FIXED, FIXED, best) == 0
    assert frontier.gap_closed(FIXED, best, best) == pytest.approx(1)
    halfway = [(x, (frontier.value(FIXED, x) + frontier.value(best, x)) / 2) for x in (1, 2, 4, 9, 36)]
    assert frontier.gap_closed(FIXED, halfway, best) == pytest.approx(0.5)
    worse = [(x, y - 0.1) for x, y in FIXED]
    assert frontier.gap_closed(FIXED, worse, best) < 0
    assert np.isnan(frontier.gap_closed(FIXED, worse, FIXED))


def test_a_way_that_begins_late_closes_nothing_before():
    best = [(1, 0.5), (2, 0.8), (4, 0.9)]
    late = [(4, 0.9)]
    expected = frontier.area_between(FIXED, best, 4, 36) / frontier.area_between(FIXED, best, 1, 36)
    assert frontier.gap_closed(FIXED, late, best) == pytest.approx(expected)
    assert frontier.gap_closed(FIXED, [(36, 0.9)], best) == frontier.gap_closed(FIXED, [(50, 0.9)], best) == 0


def test_the_fewest_tokens_for_an_accuracy():
    assert frontier.tokens_for(FIXED, 0.4) == 1
    assert frontier.tokens_for(FIXED, 0.6) == pytest.approx(2.5)
    assert frontier.tokens_for(FIXED, 0.8) == 9
    assert frontier.tokens_for(FIXED, 0.81) == float("inf")


def by_brute_force(scores, tokens):
    """All that any choice of a budget for each question gives: (mean tokens, mean score)."""
    S, n = scores.shape
    for choice in itertools.product(range(S), repeat=n):
        yield tokens[choice, range(n)].mean(), scores[choice, range(n)].mean()


def test_the_frontier_is_the_hull_of_every_choice_that_can_be_made():
    rng = np.random.default_rng(2)
    for _ in range(40):
        S, n = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        scores = rng.choice([0, 0.5, 1], (S, n)) if rng.random() < 0.5 else rng.random((S, n))
        tokens = np.cumsum(rng.integers(1, 9, (S, n)), axis=0).astype(float)
        hull = frontier.hull(list(by_brute_force(scores, tokens)))
        rising = np.concatenate([[True], np.diff(hull[:, 1]) > 1e-9])
        found = frontier.oracle_frontier(scores, tokens)
        np.testing.assert_allclose(found[-1], hull[rising][-1], atol=1e-9)
        np.testing.assert_allclose(found[0], hull[0], atol=1e-9)
        np.testing.assert_allclose(frontier.value(found, hull[rising][:, 0]), hull[rising][:, 1], atol=1e-9)
        np.testing.assert_allclose(frontier.value(hull, found[:, 0]), found[:, 1], atol=1e-9)


def test_the_frontier_ends_at_the_oracle_of_m3_and_goes_through_every_price():
    rng = np.random.default_rng(3)
    scores, scales = rng.choice([0, 0.3, 1], (4, 500)), np.array([1, 4, 9, 36])
    found = frontier.oracle_frontier(scores, scales)
    best = scores.argmax(0)
    np.testing.assert_allclose(found[-1], (scales[best].mean(), scores.max(0).mean()))
    for price in (0.3, 0.1, 0.05, 0.01, 0.003, 0.0001):
        choice = (scores - price * scales[:, None]).argmax(0)
        point = scales[choice].mean(), scores[choice, range(500)].mean()
        assert frontier.value(found, point[0]) == pytest.approx(point[1], abs=1e-9)
    m3 = oracle._oracle(scales.tolist(), scores, np.ones_like(scores) * scales[:, None])
    assert (frontier.value(found, [tokens for tokens, _ in m3.curve]) >= [a - 1e-9 for _, a in m3.curve]).all()


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: frontier.hull([]), "one pair or more"),
        (lambda: frontier.hull([(0, 1)]), "tokens positive"),
        (lambda: frontier.hull([(1, float("nan"))]), "finite"),
        (lambda: frontier.area_between(FIXED, [(2, 1)], 1, 4), "begins at 2 tokens"),
        (lambda: frontier.area_between(FIXED, FIXED, 4, 4), "first < last"),
        (lambda: frontier.gap_closed([(1, 1)], FIXED, FIXED), "two fixed budgets"),
        (lambda: frontier.oracle_frontier(np.zeros((2, 0)), [1, 4]), "expected scores"),
        (lambda: frontier.oracle_frontier(np.zeros((2, 3)), [1, 4, 9]), "expected tokens"),
        (lambda: frontier.oracle_frontier(np.full((1, 1), np.nan), [1]), "no finite number"),
    ],
)
def test_what_cannot_be_used_is_said(call, says):
    with pytest.raises(ValueError, match=says):
        call()
