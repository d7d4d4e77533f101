"""Two result files beside each other."""

import dataclasses

import numpy as np
import pytest

from lmm_jax.config import ConfigError
from lmm_jax.evaluation.compare import compare, text
from tests.evaluation.made import record

HEADER = {"task": "digits", "split": "test", "metric": "exact (1)", "model": "abc", "decoding": {"temperature": 0}}


def records(scores, **other):
    return [record(n, float(score), **other) for n, score in enumerate(scores)]


def test_the_difference_is_paired_by_question_in_whatever_order():
    rng = np.random.default_rng(0)
    first, second = (rng.random((2, 300)) < [[0.5], [0.8]]).astype(float)
    shuffled = [records(second)[n] for n in rng.permutation(300)]
    found = compare((HEADER, records(first)), (HEADER, shuffled))
    assert found.all.questions == 300 and found.only == (0, 0)
    assert found.all.difference == pytest.approx(second.mean() - first.mean())
    assert found.all.low < found.all.difference < found.all.high and found.all.p < 0.001
    assert (found.all.wins, found.all.losses) == (int((second > first).sum()), int((second < first).sum()))
    assert len(found.changed) == found.all.wins + found.all.losses
    turned = compare((HEADER, shuffled), (HEADER, records(first)))
    assert turned.all.difference == pytest.approx(-found.all.difference) and turned.all.wins == found.all.losses


def test_a_file_does_not_differ_from_itself():
    made = (HEADER, records([0, 1, 1]))
    found = compare(made, made)
    assert (found.all.difference, found.all.p, found.changed, found.settings, found.reworded) == (0, 1, (), (), 0)
    assert "no difference that could not be chance" in text(found) and "Settings that differ: none" in text(found)


def test_kinds_have_their_own_difference():
    first = [*records([0] * 30, kind="a"), *(record(30 + n, 1.0, kind="b") for n in range(30))]
    second = [dataclasses.replace(r, score=1.0) for r in first]
    found = compare((HEADER, first), (HEADER, second))
    assert {kind: of.difference for kind, of in found.kinds.items()} == {"a": 1, "b": 0}
    assert found.kinds["a"].wins == 30 and found.all.difference == 0.5


def test_what_differs_between_the_headers_is_said_and_what_must_not_is_refused():
    other = HEADER | {"model": "xyz", "decoding": {"temperature": 0, "beams": 2}, "date": "today", "limit": 5}
    found = compare((HEADER, records([1])), (other, records([1])))
    assert found.settings == (("model", "abc", "xyz"), ("decoding.beams", None, 2))
    for key in ("task", "split", "metric"):
        with pytest.raises(ConfigError, match=f"a.jsonl and b.jsonl cannot be compared: their {key} is"):
            compare((HEADER, records([1])), (HEADER | {key: "other"}, records([1])), ("a.jsonl", "b.jsonl"))


def test_questions_of_one_file_alone_are_counted_and_left_out():
    found = compare((HEADER, records([1, 0, 1, 1])), (HEADER, records([1, 1])))
    assert found.all.questions == 2 and found.only == (2, 0)
    assert "2 questions are in A alone" in text(found)
    with pytest.raises(ConfigError, match="no question in common"):
        compare((HEADER, records([1])), (HEADER, records([1], question="another?")))


def test_questions_of_the_same_words_are_told_apart_by_number_or_refused():
    first, second = (records(scores, id="", question="largest digit") for scores in ([1, 0, 1], [1, 1, 1]))
    assert compare((HEADER, first), (HEADER, second)).all.wins == 1
    with pytest.raises(ConfigError, match="can only be matched by their number"):
        compare((HEADER, first), (HEADER, second[:2]))
    with pytest.raises(ConfigError, match="B has question number 0 twice"):
        compare((HEADER, first), (HEADER, [*second, second[0]]))


def test_scores_against_other_truths_or_none_at_all_are_refused():
    with pytest.raises(ConfigError, match="other true answers to 2 of the same questions"):
        compare((HEADER, records([1, 1])), (HEADER, records([1, 1], truths=("maybe",))))
    unscored = [dataclasses.replace(r, score=None) for r in records([1, 1])]
    with pytest.raises(ConfigError, match="B has 2 answers without a score"):
        compare((HEADER, records([1, 1])), (HEADER, unscored))


def test_questions_about_one_picture_count_together():
    rng = np.random.default_rng(1)
    first, second = np.repeat((rng.random((2, 30)) < [[0.5], [0.7]]).astype(float), 10, axis=1)
    pair = records(first), records(second)
    shared = [[dataclasses.replace(r, picture=r.number // 10) for r in of] for of in pair]
    alone, together = (compare((HEADER, a), (HEADER, b)) for a, b in (pair, shared))
    assert together.all.high - together.all.low > 2 * (alone.all.high - alone.all.low)
    assert together.all.p > alone.all.p


def test_the_text_shows_losses_and_wins_and_nothing_that_moves_the_cursor():
    first = records([1] * 40 + [0] * 3, question="red \x1b[2J or\nblue?")
    second = [dataclasses.replace(r, score=1 - r.score, answer="x" * 500) for r in first]
    said = text(compare((HEADER, first), (HEADER, second), ("runs/a.jsonl", "runs/b.jsonl")))
    assert "A is better" in said and "runs/a.jsonl" in said and "20 of 43" in said
    assert said.count("B 1.00") == 3 and said.count("B 0.00") == 17
    assert "\x1b" not in said and max(map(len, said.splitlines())) < 180
