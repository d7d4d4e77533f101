"""The task of one's own rows: which questions it asks, and how it scores them."""

import json
import types

import pytest
from PIL import Image

from lmm_jax.data.prepare import folder as prepare
from lmm_jax.evaluation.tasks import TASKS, Example, own


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A prepared folder of two conversations: with a system turn and two pictures, and of text."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(folder / f"{name}.png")

    def turns(*texts, system=()):
        spoken = zip(("user", "assistant") * len(texts), texts, strict=False)
        return [{"role": role, "content": text} for role, text in (*system, *spoken)]

    talk = turns(
        "<image>\nWhat is it?", "A cat.", "Where?", "Here.", "<image> and this?", "A dog.",
        system=[("system", "Be brief.")],
    )  # fmt: skip
    content = [
        {"id": "talk", "images": ["a.png", "b.png"], "messages": talk},
        {"id": "text", "messages": turns("1 + 1?", "2")},
    ]
    (folder / "rows.json").write_text(json.dumps(content))
    prepare.prepare_rows(folder / "rows.json", None, folder / "data", workers=0)
    return folder / "data"


def test_every_answered_turn_is_asked_with_what_was_said_before(rows):
    first, second, third, text = own.examples(rows, "train")
    assert [len(example.images) for example in (first, second, third, text)] == [1, 1, 2, 0]
    assert first.history == (("system", "Be brief."),) and first.question == "<image>\nWhat is it?"
    assert second.history == (*first.history, ("user", first.question), ("assistant", "A cat."))
    assert [example.answers for example in (third, text)] == [("A dog.",), ("2",)] and text.history == ()
    assert {example.kind for example in (first, second, third, text)} == {"all"}
    assert len(list(own.examples(rows, "train", limit=3))) == 3


def test_an_answer_out_of_the_loss_is_history_alone(tmp_path):
    said = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    turns = [{"role": role, "content": text, "weight": 0 if text == "1" else None} for role, text in said]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns}]))
    prepare.prepare_rows(tmp_path / "rows.json", None, tmp_path / "out", template="qa", workers=0)
    (found,) = own.examples(tmp_path / "out", "train")
    assert (found.question, found.answers, found.history) == ("two?", ("2",), tuple(said[:2]))


def test_kinds_of_the_rows_are_kept_and_limited_one_by_one(digits_folder):
    found = list(own.examples(digits_folder, "test", limit=2))
    assert sorted(example.kind for example in found) == sorted(["cell", "count", "exists", "largest", "read"] * 2)


def test_a_folder_without_a_test_split_says_how_to_make_one(rows):
    with pytest.raises(ValueError, match=r"has no split 'test' to ask about, only train: `lmm prepare .* --test N`"):
        list(own.examples(rows, "test"))
    with pytest.raises(FileNotFoundError, match="run `lmm prepare`"):
        list(own.examples(rows.parent, "test"))


def pairs(*of):
    return [(Example((), "?", (truth,), kind), answer) for kind, truth, answer in of]


def test_scores_are_means_over_all_and_over_each_kind():
    found = own.score_all(pairs(("all", "yes", "yes"), ("all", "a cat", "It is a cat.")))
    assert found == {"exact": 0.5, "contains": 1.0, "anls": 0.5}
    found = own.score_all(pairs(("which", "(B)", "B"), ("which", "A", "B."), ("name", "cat", "cat")))
    assert found["choice"] == found["which/choice"] == 0.5 and "name/choice" not in found
    assert found["exact"] == pytest.approx(1 / 3) and (found["name/exact"], found["which/exact"]) == (1.0, 0.0)


def test_answers_may_be_somewhat_longer_than_the_longest_true_one():
    characters = types.SimpleNamespace(encode=list)

    def most(*answers):
        return own.max_new_tokens([Example((), "?", (answer,), "all") for answer in answers], characters)

    assert [most("B"), most("x" * 13), most("B", "x" * 64), most("x" * 9999)] == [16, 32, 80, 512]
    assert TASKS["own"] is own


def test_one_answer_is_scored_by_its_letter_or_by_anls(rows):
    def score(truth, answer):
        return own.score(Example((), "", (truth,), "all"), answer)

    assert score("(B)", "b. the second") == 1.0 and score("B", "A") == score("B", "") == 0.0
    assert score("a cat", "a bat") == pytest.approx(0.8) and score("a cat", "nothing") == 0.0


def test_questions_have_names_and_groups(rows, digits_folder):
    asked = list(own.examples(rows, "train"))
    assert [(example.id, example.group) for example in asked[-2:]] == [("talk:5", "talk"), ("text:0", "text")]
    digits = list(TASKS["digits"].examples(digits_folder, "test"))
    assert len({(example.id, example.question) for example in digits}) == len(digits)


def test_a_folder_is_checked_before_it_is_asked_about(rows, tmp_path):
    assert own.check(rows, "train") == TASKS["digits"].check(rows, "train") == []
    assert "has no split 'test' to ask about, only train" in own.check(rows, "test")[0]
    for task in (own, TASKS["digits"], TASKS["pages"]):
        assert "holds no prepared data" in task.check(tmp_path, "test")[0]
