"""What a value may be: types are taken at their word, ends belong to a range or do not, words say so."""

import pytest

from lmm_jax.ranges import each, either, flag, like, number, one_of, text, together, unset, whole

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("valid", "good", "bad"),
    [
        (whole(1, 8), [1, 8], [0, 9, 1.0, True, "1", None, NAN, 10**30]),
        (number(0, 1), [0, 1, 0.5, 0.0], [-0.1, 1.1, NAN, INFINITY, True, "0", None]),
        (number(0, 1, above=True, below=True), [0.5], [0, 1, 0.0, 1.0]),
        (number(0), [1e300], [INFINITY, -INFINITY, NAN]),
        (flag(), [True, False], [0, 1, "True", None]),
        (one_of(["a", ""]), ["a", ""], ["b", None, 0, ("a",)]),
        (text("a name"), ["a", " a "], ["", "  ", "a\0b", None, 1]),
        (unset(whole(1, 8)), [None, 1], [0, "None"]),
        (
            each(whole(1), least=1, most=2, distinct=True),
            [(1,), (1, 2)],
            [(), (1, 1), (1, 2, 3), [1], 1, ("1",), ([],)],
        ),
        (
            together(text("a"), number(0), what="pairs"),
            [("a", 1.0)],
            [("a",), ("a", -1), ("", 1.0), ("a", 1.0, 2), "a1"],
        ),
        (either(whole(1), one_of(["all"])), [1, "all"], [0, "none", None]),
        (like(0), [0, -5], [0.5, True, "0"]),
        (like((1,)), [(), ("a",)], [[], "a", None]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_range_holds_what_its_words_say(valid, good, bad):
    assert valid.words and str(valid) == valid.words
    assert [x for x in good if not valid.holds(x)] == []
    assert [x for x in bad if valid.holds(x)] == []


def test_the_words_say_ends_counts_and_choices():
    assert str(whole(1, 1_000_000)) == "a whole number from 1 to 1,000,000"
    assert str(number(0, 1, above=True)) == "a number above 0 to 1"
    assert str(number(0, 1, below=True)) == "a number from 0 to below 1"
    assert str(number(0, special="0 = no clipping")) == "a number from 0; 0 = no clipping"
    assert str(one_of(["a", "b", "c"])) == "one of a, b, c" and str(one_of(["", "b"])) == "one of '' or b"
    assert str(each(flag(), least=2, most=2)) == "a tuple of 2 values, each True or False"
    assert str(unset(flag())) == "True or False, or None"
