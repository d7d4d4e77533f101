"""The oracle against one by brute force, and what falls."""

import dataclasses

import numpy as np
import pytest

from lmm_jax.evaluation import oracle
from tests.evaluation.made import runs

SCALES = (1, 4, 9, 36)


def by_brute_force(scores, scales):
    """Score and budget of each question, as the definition says."""
    found = []
    for of_question in zip(*scores, strict=True):
        best = max(of_question)
        found.append((best, next(scale for scale, s in zip(scales, of_question, strict=True) if s == best)))
    return found


@pytest.mark.parametrize("graded", [False, True])
def test_the_oracle_is_that_of_the_definition(graded):
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = rng.choice([0, 0.3, 1] if graded else [0, 1], (4, int(rng.integers(1, 40)))).astype(float)
        found, expected = oracle.find_oracle(runs(scores)), by_brute_force(scores, SCALES)
        assert found.accuracy == pytest.approx(np.mean([score for score, _ in expected]))
        assert found.tokens == found.visual_tokens == pytest.approx(np.mean([scale for _, scale in expected]))
        assert found.smallest.tolist() == [scale for _, scale in expected]
        assert sum(found.share) == pytest.approx(np.mean(scores.max(0) > 0))
        for count in range(1, 5):
            part = by_brute_force(scores[:count], SCALES[:count])
            assert found.curve[count - 1] == pytest.approx(tuple(np.mean(part, axis=0)[::-1]))


def test_what_is_wrong_everywhere_counts_the_smallest_budget():
    found = oracle.find_oracle(runs([[0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 1]]))
    assert found.smallest.tolist() == [1, 4, 1] and found.solved.tolist() == [False, True, True]
    assert found.share == pytest.approx((1 / 3, 1 / 3, 0, 0))
    assert (found.tokens, found.accuracy) == pytest.approx((2, 2 / 3))


def test_budgets_are_in_the_order_of_numbers_and_auto_is_none():
    scores = np.eye(4)
    made = runs(scores)
    shuffled = {"auto": made["9"], **{scale: made[scale] for scale in ("36", "9", "4", "1")}}
    assert oracle.find_oracle(shuffled).curve == oracle.find_oracle(made).curve
    assert oracle.budgets(shuffled) == [1, 4, 9, 36]


def test_pictures_of_several_grids_count_in_the_sequence_alone():
    made = runs(np.eye(4))
    made = {s: [dataclasses.replace(r, visual_tokens=5 * r.scale + 1) for r in of] for s, of in made.items()}
    found = oracle.find_oracle(made)
    assert (found.tokens, found.visual_tokens) == (12.5, 63.5)


def test_each_kind_has_its_oracle_and_together_they_are_that_of_all():
    rng = np.random.default_rng(1)
    kinds = rng.choice(["b", "a", "c"], 60).tolist()
    made = runs(rng.integers(0, 2, (4, 60)).astype(float), kinds=kinds)
    of_kinds, whole = oracle.by_kind(made), oracle.find_oracle(made)
    assert list(of_kinds) == ["a", "b", "c"]
    weights = [kinds.count(kind) / 60 for kind in of_kinds]
    for name in ("accuracy", "tokens", "visual_tokens"):
        mean = np.dot(weights, [getattr(of, name) for of in of_kinds.values()])
        assert mean == pytest.approx(getattr(whole, name))


def test_questions_that_are_right_at_few_tokens_and_wrong_at_all_larger_ones_fell():
    scores = np.array(
        [[1, 0, 1, 0, 0, 1, 0.7], [0, 1, 0, 0, 1, 1, 0], [0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0.4]]
    )
    falls = oracle.falls(runs(scores))
    assert [(fall.place, fall.right_at, fall.wrong_at) for fall in falls.samples] == [
        (0, 1, (4, 9, 36)),
        (6, 1, (4, 9, 36)),
        (1, 4, (9, 36)),
        (2, 9, (36,)),
    ]
    assert falls.gains == 2


def test_a_kind_falls_where_it_is_more_than_chance():
    rng = np.random.default_rng(2)
    falling = rng.random((4, 200)) < np.array([0.3, 0.6, 0.9, 0.5])[:, None]
    level = rng.random((4, 200)) < 0.5
    made = runs(np.concatenate([falling, level], axis=1).astype(float), kinds=["falls"] * 200 + ["level"] * 200)
    whole, fall = oracle.falls(made).kinds
    assert (whole.kind, fall.kind, fall.few, fall.many) == (None, "falls", 9, 36)
    assert fall.questions == 200 and fall.low < fall.difference < fall.high < 0 and fall.p < 0.001
    assert fall.difference == pytest.approx(falling[3].mean() - falling[2].mean())


def test_nothing_falls_by_chance_however_many_pairs_are_looked_at():
    rng, found = np.random.default_rng(3), 0
    for seed in range(20):
        made = runs((rng.random((4, 120)) < 0.5).astype(float), kinds=["a", "b", "c"] * 40)
        found += bool(oracle.falls(made, seed=seed).kinds)
    assert found <= 3


def test_a_fall_that_a_single_picture_brings_is_chance():
    scores = np.array([[1.0] * 40, [0.0] * 40])
    assert oracle.falls(runs(scores, (1, 4))).kinds
    assert not oracle.falls(runs(scores, (1, 4), picture=7)).kinds


def test_what_cannot_be_used_is_said():
    made = runs(np.ones((2, 3)), (1, 4))
    with pytest.raises(ValueError, match="no run at one"):
        oracle.find_oracle({"auto": made["1"]})
    with pytest.raises(ValueError, match="no answers"):
        oracle.find_oracle({"1": []})
    with pytest.raises(ValueError, match="3 and 2 answers"):
        oracle.find_oracle({"1": made["1"], "4": made["4"][:2]})
    with pytest.raises(ValueError, match="answer 0 is of another"):
        oracle.find_oracle({"1": made["1"], "4": made["4"][::-1]})
    unscored = [dataclasses.replace(record, score=None) for record in made["4"]]
    with pytest.raises(ValueError, match="3 answers have no score of their own"):
        oracle.find_oracle({"1": made["1"], "4": unscored})
