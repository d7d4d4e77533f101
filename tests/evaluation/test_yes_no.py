"""POPE and MME beyond the recorded cases of `parity/test_metrics.py`."""

import pytest

from lmm_jax.evaluation import yes_no


def test_llava_reads_the_first_sentence_word_by_word():
    for text in ("no", "No, there is none", "There is not", "it is, no, wrong", " No"):
        assert yes_no.llava_label(text) == "no", text
    for text in ("NO", "Yes. No.", "nothing", "no!", "cannot", "", "no\nyes", "."):
        assert yes_no.llava_label(text) == "yes", text


def test_lmms_eval_leaves_other_answers_out_of_precision_and_recall_but_not_of_accuracy():
    pairs = [("Yes", "yes"), ("Yes, a dog", "yes"), ("no", "no"), ("no.", "no")]
    found = yes_no.pope(pairs)
    assert found["lmms_eval"] == {"accuracy": 0.5, "precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert found["llava"] == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5}


def test_what_would_divide_by_zero_is_zero():
    assert set(yes_no.pope([("no", "no")])["llava"].values()) == {0.0, 1.0}
    assert yes_no.pope([("what", "yes")])["lmms_eval"] == dict.fromkeys(
        ("accuracy", "precision", "recall", "f1"), 0.0
    )


def test_mme_reads_four_characters():
    expected = {"Yes.": "yes", "y": "yes", "N.": "no", "non": "no", "the no": "other", "ano": "no", "": "other"}
    expected |= {"no yes": "no", "yesno": "yes", "x yes": "other", " . no": "no"}
    assert {text: yes_no.mme_label(text) for text in expected} == expected


def test_mme_scores_pairs():
    items = [("color", "1.jpg", 1), ("count", "1.jpg", 1), ("color", "1.jpg", 1), ("count", "1.jpg", 0)]
    assert yes_no.mme(items) == {"color": 200.0, "count": 50.0}
    assert yes_no.mme([*items, ("color", "2", 0), ("color", "2", 0)]) == {"color": 100.0, "count": 50.0}
    with pytest.raises(ValueError, match=r"MME scores pairs of questions, and count/2.jpg has 1"):
        yes_no.mme([*items, ("count", "2.jpg", 1)])
