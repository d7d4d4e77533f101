"""What the recorded cases of `parity/test_metrics.py` may not reach of the spelling of VQA's answers."""

import pytest

from lmm_jax.evaluation import vqa_text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("black/white", "black white"),
        ("black/ white", "black white"),
        ("black/white - grey", "black white grey"),
        ("1,000/2", "10002"),  # a number with a comma drops every mark
        ("3.5 u.s.", "3.5 us"),
        ("5.", "5"),  # meant to stay by whoever wrote the pattern; it never did
        ("." * 40, "." * 8),  # no more than 32 are dropped
        ("somebody'd", "somebodyd"),
        ("yall've wouldntve", "yall've wouldntve"),
        ("couldntve couldnt've", "couldntve couldn't've"),
        ("The  three\tnones none", "3 nones 0"),
        ("", ""),
    ],
)
def test_vqav2_form(text, plain):
    assert vqa_text.vqav2_form(text) == plain


def test_textvqa_sets_a_genitive_apart_and_drops_commas_first():
    assert vqa_text.textvqa_form("A man's 1,000 dogs, yes?") == "man 's 1000 dogs yes"
    assert vqa_text.textvqa_form("it's") == "it 's" and vqa_text.vqav2_form("it's") == "it's"


def test_each_person_s_answer_is_compared_with_those_of_the_others():
    for same, score in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]:
        truths = ["cat"] * same + [f"dog{n}" for n in range(10 - same)]
        assert vqa_text.soft_accuracy("cat", truths) == pytest.approx(score, abs=1e-12)
    assert vqa_text.soft_accuracy("cat", ["cat"]) == 0.0  # nobody is left to agree
    with pytest.raises(ValueError, match="needs the answers of people"):
        vqa_text.soft_accuracy("cat", [])
