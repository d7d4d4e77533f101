"""Answers come piece by piece, one budget after the other, with what each took."""

import copy

import pytest
from PIL import Image

from lmm_jax.demo import answers
from lmm_jax.demo.answers import Column, answer, draw_columns, read_options
from tests.demo.asked import Asked


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (24, 24)).save(path)
    return str(path)


def test_budgets_are_asked_one_after_the_other(monkeypatch, picture):
    monkeypatch.setattr(answers, "PAUSE", 0)
    model = Asked("configs/digits.py")
    seen = [copy.deepcopy(columns) for columns in answer(model, picture, "read all", [9, 1, 9], seed=3)]
    options = {"max_new_tokens": None, "temperature": 0.0, "seed": 3}
    assert model.calls == [(1, options), (9, options)]
    assert [[(column.state, column.text) for column in columns] for columns in seen] == [
        [("writing", ""), ("waiting", "")],
        [("writing", "six "), ("waiting", "")],
        [("writing", "six and "), ("waiting", "")],
        [("writing", "six and two"), ("waiting", "")],
        [("done", "six and two"), ("waiting", "")],
        [("done", "six and two"), ("writing", "")],
        [("done", "six and two"), ("writing", "six ")],
        [("done", "six and two"), ("writing", "six and ")],
        [("done", "six and two"), ("writing", "six and two")],
        [("done", "six and two"), ("done", "six and two")],
    ]
    assert all(0 <= column.first <= column.seconds for column in seen[-1])
    assert [(column.tokens, column.trained) for column in seen[-1]] == [(1, True), (9, True)]


def test_pieces_that_come_fast_are_shown_together(picture):
    model = Asked("configs/digits.py", pieces=["a"] * 1000)
    count = sum(1 for _ in answer(model, picture, "read all", [9]))
    assert 3 <= count < 100


def test_what_is_wrong_at_one_budget_stands_in_its_column(picture):
    model = Asked("configs/digits.py", errors={1: ValueError("prompt takes <99> positions")})
    *_, last = answer(model, picture, "read all", [1, 9])
    assert [column.state for column in last] == ["refused", "done"]
    page = draw_columns(last)
    assert "takes &lt;99&gt; positions" in page and page.count("six and two") == 1


def test_a_question_without_a_picture_has_no_visual_tokens():
    *_, (column,) = answer(Asked("configs/digits.py"), None, "how many?", [9])
    assert column.tokens == 0 and column.state == "done" and "0 visual tokens" in draw_columns([column])


def test_an_answer_that_nobody_waits_for_ends(picture):
    model = Asked("configs/digits.py")
    writing = answer(model, picture, "read all", [9])
    assert [next(writing)[0].text for _ in range(2)] and model.closed == 0
    writing.close()
    assert model.closed == 1


def test_answers_are_text_and_never_markup():
    column = Column(9, False, 10, "<b>six</b>", 0.1, 0.25, "done")
    page = draw_columns([column])
    assert "&lt;b&gt;six" in page and "<b>" not in page
    assert "10 visual tokens" in page and "scale 9, not trained" in page and "0.10 s" in page and "0.25 s" in page


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ((None, 0, None), {"max_new_tokens": None, "temperature": 0.0, "seed": 0}),
        ((12.0, 0.7, 5.0), {"max_new_tokens": 12, "temperature": 0.7, "seed": 5}),
    ],
)
def test_fields_of_the_page_become_options(fields, options):
    assert read_options(*fields) == options
