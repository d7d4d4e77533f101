"""Letters out of free answers beyond the recorded cases of `parity/test_metrics.py`."""

import pytest

from lmm_jax.evaluation import choices


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("", ""),
        (" ?! ", ""),
        ("B", "B"),
        ("b", ""),
        ("B because A", "B"),  # the start before the end
        ("I would say A", "A"),
        ("The answer is (C), not A or so", "A"),  # the first of each letter behind the phrase, of these the last
        ("Not (A) but (B) I think", "B"),
        ("maybe C. or D: then", "C"),  # a full stop before a colon
        ("fooB", "B"),  # any letter, as nothing better is there
        ("정답은 D 입니다", "D"),
        ("Z", ""),
    ],
)
def test_the_surest_form_counts(answer, letter):
    assert choices.extract_letter(answer) == letter


def test_realworldqa_compares_texts_where_the_truth_is_no_letter():
    assert choices.realworldqa(" Two.. ", "two ") == choices.realworldqa("C) x", "c") == 1.0
    assert choices.realworldqa("2", "two") == choices.realworldqa("E", "E.") == 0.0


def test_seed_looks_at_one_character():
    assert choices.seed_choice(" b. x", "B") == choices.seed_choice("Because", "B") == 1.0
    assert choices.seed_choice("(B)", "B") == choices.seed_choice("", "B") == 0.0
