"""Scores of answers against those that lmms-eval's and LLaVA's own functions gave: equal to the digits recorded."""

import json

import pytest

from lmm_jax.evaluation import boxes, choices, metrics, vqa_text, yes_no

DIGITS = 1e-10  # recorded to ten places

SCORES = {
    "anls": lambda case: metrics.anls(case["pred"], case["answers"]),
    "chartqa_relaxed_accuracy": lambda case: metrics.relaxed(case["pred"], case["answer"]),
    "gqa_exact_match": lambda case: metrics.same_letters(case["pred"], case["answer"]),
    "realworldqa": lambda case: choices.realworldqa(case["pred"], case["answer"]),
    "seed_multiple_choice": lambda case: choices.seed_choice(case["pred"], case["answer"]),
    "textvqa_soft_accuracy": lambda case: vqa_text.textvqa_accuracy(case["pred"], case["answers"]),
    "vqav2_soft_accuracy": lambda case: vqa_text.vqav2_accuracy(case["pred"], case["answers"]),
}


@pytest.fixture(scope="session")
def cases(golden):
    """`cases(metric)`: the recorded cases of a metric."""

    def read(metric):
        found = json.loads((golden / "metrics" / f"{metric}.json").read_text())
        assert found["metric"] == metric and found["cases"]
        return found["cases"]

    return read


def test_every_metric_that_was_recorded_is_compared_here(golden):
    others = {"vqa_answer_normalisation", "pope", "mme", "refcoco_rec"}
    assert {path.stem for path in (golden / "metrics").glob("*.json")} <= SCORES.keys() | others


@pytest.mark.parametrize("metric", SCORES)
def test_an_answer_scores_what_the_benchmark_s_own_function_gave(metric, cases):
    for case in cases(metric):
        assert SCORES[metric](case) == pytest.approx(case["score"], abs=DIGITS), case


def test_answers_are_spelled_as_the_vqa_challenge_compares_them(cases):
    for case in cases("vqa_answer_normalisation"):
        text = case["input"]
        assert vqa_text.textvqa_form(text) == case["evalai"], case
        assert vqa_text.without_punctuation(vqa_text.one_line(text)) == case["punctuation_only"], case
        assert vqa_text.vqav2_form(text) == case["digit_article_after_punct"], case


def test_pope_by_both_definitions(cases):
    for case in cases("pope"):
        pairs = [(item["pred"], item["label"]) for item in case["items"]]
        found, llava = yes_no.pope(pairs), dict(case["llava"])
        counts, llava["f1"] = llava.pop("tp_fp_tn_fn"), llava.pop("f1_score")
        assert found["lmms_eval"] == pytest.approx(case["lmms_eval"], abs=DIGITS), case
        assert found["llava"] == pytest.approx(llava, abs=DIGITS), case
        said = [(yes_no.llava_label(answer), label) for answer, label in pairs]
        assert list(yes_no.confusion(said)) == counts, case


def test_mme_is_the_sum_of_its_categories(cases):
    for case in cases("mme"):
        items = [
            (item["category"], item["question_id"], yes_no.mme_label(item["pred"]) == item["answer"].lower())
            for item in case["items"]
        ]
        assert sum(yes_no.mme(items).values()) == pytest.approx(case["score"], abs=DIGITS), case


def test_boxes_of_referring_expressions(cases):
    for case in cases("refcoco_rec"):
        box, truth = boxes.read_box(case["text"]), case["bbox"]
        assert list(box) == case["parsed"], case
        found = boxes.overlap(truth, box)
        assert found == pytest.approx(case["iou"], abs=DIGITS), case
        assert float(found >= 0.5) == case["acc50"] and boxes.within(truth, box) == case["center"], case
