"""Fitting how a model chooses its budget, on made-up answers whose best choice is known."""

import dataclasses
import types

import numpy as np
import pytest

from lmm_jax.evaluation import auto
from lmm_jax.evaluation.auto import Point
from lmm_jax.evaluation.run import digest
from lmm_jax.evaluation.tasks import Example
from lmm_jax.generation.auto import BOTH, CASCADE, ROUTER, Way
from tests.evaluation.made import record

SCALES = (1, 4, 9)


def made(n, seed, routed=True):
    """Runs of n questions: a third is answered at 1 token, a third at 4, a third at 9; log-probabilities tell it."""
    rng = np.random.default_rng(seed)
    needs = rng.integers(0, 3, n)
    runs = {}
    for s, scale in enumerate(SCALES):
        runs[str(scale)] = []
        for number in range(n):
            right = s >= needs[number]
            sure = (-0.05 if right else -1.5) * rng.uniform(0.5, 1.5)
            expected = [0.9 if k >= needs[number] else 0.2 for k in range(3)] if routed else ()
            noisy = tuple(float(x + rng.uniform(-0.05, 0.05)) for x in expected)
            answer = record(number, float(right), scale, "abc"[needs[number]], logprobs=(sure,), end=-0.01)
            runs[str(scale)].append(
                dataclasses.replace(answer, expected=noisy, picture=number // 2, seconds=scale / 10)
            )
    return runs


@pytest.fixture(scope="module")
def answers():
    return auto.collect(made(600, 0))


@pytest.fixture(scope="module")
def fitted(answers):
    return auto.fit(answers, {"split": "validation"}, 7)


def test_a_logistic_regression_finds_the_weights_that_made_the_scores():
    rng = np.random.default_rng(0)
    known = np.concatenate([np.ones((20_000, 1)), rng.normal(3, [0.1, 10.0], (20_000, 2))], axis=1)
    truth = np.array([-20.0, 7.0, 0.1])
    score = 1 / (1 + np.exp(-known @ truth))  # graded scores
    np.testing.assert_allclose(auto.fit_logistic(known, score), truth, rtol=2e-3)
    constant = auto.fit_logistic(np.ones((9, 2)), np.array([1.0] * 3 + [0.0] * 6))  # a column that says nothing
    assert constant[1] == 0 and 1 / (1 + np.exp(-constant[0])) == pytest.approx(1 / 3, abs=1e-2)
    assert np.isfinite(auto.fit_logistic(known, np.ones(20_000))).all()


def test_every_way_is_as_accurate_as_the_best_budget_with_fewer_tokens_than_it(answers, fitted):
    """The oracle takes (1 + 4 + 9) / 3 tokens; going up by 1, 4, 9 (1 + 5 + 14) / 3; by 1, 9 (1 + 10 + 10) / 3."""
    about = fitted.about
    assert about["accuracy"] == 1.0 and fitted.use == ROUTER and fitted.step == 7
    assert about[ROUTER] == {"tokens": pytest.approx(14 / 3, abs=0.3), "accuracy": 1.0}
    assert about[CASCADE]["accuracy"] == 1.0 and about[CASCADE]["tokens"] < 7.2
    assert about[BOTH]["accuracy"] == 1.0 and about[BOTH]["tokens"] == pytest.approx(14 / 3, abs=0.3)


def test_what_is_followed_is_what_a_model_would_do(fitted):
    tested = made(200, 1)
    answers = auto.collect(tested)
    worth = auto.expectations(fitted, answers)
    ways = [*fitted.ways.values(), Way(4, True, 0.01), Way(1, True, 0.05), Way(None, True, 0.03), Way(9, True, 0.0)]
    for way in ways:
        at, tokens, score, seconds = auto.follow(way, answers, worth)
        for n in range(200):
            expected = tested["1"][n].expected
            scale = fitted.first(way, expected)
            taken, up = [], scale
            while up is not None:
                scale, answer = up, tested[str(up)][n]
                taken.append(scale)
                up = fitted.next(way, scale, answer.logprobs, answer.end, expected)
            assert (SCALES[at[n]], tokens[n], score[n]) == (scale, sum(taken), answer.score)
            assert seconds[n] == pytest.approx(sum(taken) / 10)


def test_the_report_is_of_the_questions_that_it_is_given(fitted):
    told = auto.report(fitted, auto.collect(made(400, 2)))
    assert [p["scale"] for p in told["fixed"]] == [1, 4, 9]
    assert told["oracle"][-1] == {"tokens": pytest.approx(14 / 3, abs=0.4), "accuracy": 1.0}
    assert set(told["chosen"]) == {CASCADE, ROUTER, BOTH}
    kinds = told["chosen"][ROUTER]["kinds"]
    assert 1 <= kinds["a"]["tokens"] < 1.1 and 3.9 < kinds["b"]["tokens"] < 4.1 and kinds["c"]["tokens"] == 9
    assert told["gap_closed"][ROUTER] > 0.9 > told["gap_closed"][CASCADE] > 0.1
    assert told["tokens_at"][ROUTER]["9"] < 5.2 and 4.6 < told["tokens_at"][CASCADE]["9"] < 7.2
    assert all(error < 0.05 for error in told["calibration"].values())
    said = auto.report_words(told).splitlines()
    assert said[0] == "the best fixed budget, 9 visual tokens: accuracy 1.0000"
    assert f"calibration error {told['calibration'][ROUTER]:.3f}" in said[1 + list(told["chosen"]).index(ROUTER)]


def test_without_a_router_there_is_a_cascade_alone():
    found = auto.fit(auto.collect(made(300, 3, routed=False)))
    assert set(found.ways) == set(found.curves) == {CASCADE} == {found.use} and not found.of_router
    told = auto.report(found, auto.collect(made(300, 4, routed=False)))
    assert set(told["chosen"]) == {CASCADE}
    with_router = auto.fit(auto.collect(made(300, 3)))
    assert set(auto.report(with_router, auto.collect(made(300, 4, routed=False)))["chosen"]) == {CASCADE}


def test_the_cheapest_that_is_accurate_enough_is_chosen():
    way = Way(1, True, 0.0)
    points = [
        Point(way, 5.0, 0.8),
        Point(way, 3.0, 0.8),
        Point(way, 2.0, 0.7),
        Point(way, 9.0, 0.9),
        Point(way, 9.5, 0.85),
    ]
    assert [p.tokens for p in auto.best(points)] == [2.0, 3.0, 9.0]
    assert auto.choose(points, 0.75).tokens == 3.0 and auto.choose(points, 0.95).accuracy == 0.9


def test_budgets_that_nothing_can_be_fitted_to_are_refused_before_they_are_asked():
    model = types.SimpleNamespace(scales=(9, 1, 4), has_router=True)
    auto.check_budgets(model, [1, 4, 9])
    with pytest.raises(
        ValueError, match="the router knows the trained budgets, 1, 4, 9, so .* and not 1, 4, 16: --scal"
    ):
        auto.check_budgets(model, [1, 4, 16])
    model.has_router = False
    auto.check_budgets(model, [1, 16])
    with pytest.raises(ValueError, match="answers at two or more are needed"):
        auto.check_budgets(model, [9, 9])


def test_what_was_fitted_on_a_part_of_a_split_was_fitted_on_it(fitted):
    question = types.SimpleNamespace(number=0, prompt="q", example=Example((), "q", ("a",), "k"))
    asked = types.SimpleNamespace(questions=[question], split="validation", folder="data")
    about = {"task": "say", "split": "validation", "folder": "data", "digest": "of fewer questions"}
    assert auto.is_fitted_on(dataclasses.replace(fitted, about=about), "say", asked)
    assert not auto.is_fitted_on(dataclasses.replace(fitted, about=about | {"split": "train"}), "say", asked)
    same = {"digest": digest(asked.questions)}  # from another place
    assert auto.is_fitted_on(dataclasses.replace(fitted, about=same), "say", asked)


def test_questions_without_a_picture_or_a_score_are_not_fitted_to():
    runs = made(30, 5)
    for records in runs.values():
        records[3] = dataclasses.replace(records[3], visual_tokens=0)
        records[4] = dataclasses.replace(records[4], score=None)
    assert auto.collect(runs).score.shape == (3, 28)
    assert auto.collect(runs | {"auto": runs["1"]}).scales == SCALES
    with pytest.raises(ValueError, match="at least two have to be asked at: --scales all"):
        auto.collect({"9": runs["9"]})
    none = {scale: [dataclasses.replace(r, score=None) for r in records] for scale, records in runs.items()}
    with pytest.raises(ValueError, match="no question has a picture and an answer that can be scored"):
        auto.collect(none)
    with pytest.raises(ValueError, match="the router knows the trained budgets"):
        auto.collect({scale: runs[scale] for scale in ("1", "4")})
    with pytest.raises(ValueError, match=r"fitted to the budgets \(1, 4, 9\), and these are answers at \(1, 4\)"):
        two = {scale: [dataclasses.replace(r, expected=()) for r in runs[scale]] for scale in ("1", "4")}
        auto.report(auto.fit(auto.collect(runs)), auto.collect(two))
