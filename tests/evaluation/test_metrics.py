"""Scores of one answer."""

import pytest

from lmm_jax.evaluation import metrics


def test_exact_is_letter_for_letter_but_for_white_space_around():
    assert metrics.exact(" a cat\n", ["a dog", "a cat"]) == 1.0
    assert metrics.exact("A cat", ["a cat"]) == metrics.exact("a cat.", ["a cat"]) == 0.0


def test_contains_looks_for_whole_words():
    assert metrics.contains("It is a  CAT, I think.", ["a dog", "a cat"]) == 1.0
    assert metrics.contains("Nothing.", ["no"]) == metrics.contains("12", ["1"]) == 0.0
    assert metrics.contains("perhaps (B)", ["(B)"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("5 january 2020", ["5 january 2020"], 1.0),
        ("PHILIP Morris", ["philip  morris"], 1.0),
        ("1999 x", ["1999"], 2 / 3),
        ("1999 x", ["abc", "1999"], 2 / 3),  # the best of several
        ("philip  morris  x", ["philip  morris "], 15 / 17),  # of the length with its white space
        ("Straßes", ["Straße"], 7 / 8),  # in capitals
        ("ab", ["ax"], 0.5),
        ("abc", ["axy"], 0.0),  # below the threshold
        ("", ["7"], 0.0),
    ],
)
def test_anls(answer, truths, score):
    assert metrics.anls(answer, truths) == pytest.approx(score, abs=1e-12)


def test_distance_is_that_of_the_textbook():
    def textbook(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(textbook(a[1:], b) + 1, textbook(a, b[1:]) + 1, textbook(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in [("", ""), ("kitten", "sitting"), ("abcd", ""), ("abab", "baba"), ("flaw", "lawn"), ("xyz", "z")]:
        assert metrics.distance(a, b) == metrics.distance(b, a) == textbook(a, b)


def test_letters_of_choices_are_equal_however_they_are_punctuated():
    for text in ("B", "b", "(B)", "B.", "B)", " (b). ", "B:"):
        assert metrics.is_choice(text) and metrics.choice(text, ["A", "(B)"]) == 1.0, text
    for text in ("B) a cat", "(B) a cat", "B. a cat"):
        assert not metrics.is_choice(text) and metrics.choice(text, ["B"]) == 1.0, text
    for text in ("", "Bob", "B cat", "A cat", "A", "7", "B.5"):
        assert metrics.choice(text, ["B"]) == 0.0, text
    for text in ("a cat", "yes", "7", "", "B.5"):
        assert not metrics.is_choice(text), text


def test_relaxed_accuracy_of_charts():
    for answer, truth in [("52.5", "50"), ("5%", "0.05"), ("1e3", "1000"), ("0", "0"), ("Blue", "blue"), ("", "")]:
        assert metrics.relaxed(answer, truth) == 1.0, (answer, truth)
    for answer, truth in [("52.6", "50"), ("0.0", "0"), ("1,000", "1000"), ("nan", "5"), ("50 ", "5 0"), ("5", "5%")]:
        assert metrics.relaxed(answer, truth) == 0.0, (answer, truth)


def test_the_same_letters_but_for_case_and_punctuation():
    for answer, truth in [("U.S.", "us"), ("don't", "Dont"), ("İ", "i"), ("", "."), ("a\0", "a")]:
        assert metrics.same_letters(answer, truth) == 1.0, (answer, truth)
    for answer, truth in [("yes ", "yes"), ("a  b", "a b"), ("a", "b"), ("„a“", "a")]:
        assert metrics.same_letters(answer, truth) == 0.0, (answer, truth)
