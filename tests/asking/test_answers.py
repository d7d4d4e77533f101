"""The file of answers: it grows by lines, goes on after a kill, and belongs to one set of questions and one model."""

import dataclasses
import json

import pytest

from lmm_jax.asking.answers import Answers, asked, check_place
from lmm_jax.asking.questions import Question

DIGESTS = {"a": "1", "2": "2", "c": "3"}


def line(id, digest=None, **more):
    return json.dumps({"id": id, "text": "x", "asked": digest or DIGESTS[str(id)], **more}) + "\n"


def test_what_is_added_is_there_at_once_and_is_done_for_the_next(tmp_path):
    path = tmp_path / "out.jsonl"
    answers = Answers(path, DIGESTS)
    assert answers.done == set() and not path.exists()
    answers.begin()
    answers.add({"id": 2, "text": "ä", "asked": "2"})
    assert json.loads(path.read_text()) == {"id": 2, "text": "ä", "asked": "2"}
    assert Answers(path, DIGESTS).done == {"2"}


@pytest.mark.parametrize("rest", [b"", b'{"id": "c", "te', b'{"id": "c", "text": "\xc3', line("c").encode()[:-1]])
def test_a_line_that_was_cut_and_lines_of_errors_are_asked_again(tmp_path, rest):
    path = tmp_path / "out.jsonl"
    before = (line("a") + '{"id": "2", "error": "no file"}\n').encode() + rest
    path.write_bytes(before)
    answers = Answers(path, DIGESTS)
    assert answers.done == {"a"} and path.read_bytes() == before  # until something is added
    answers.begin()
    answers.add({"id": "2", "asked": "2"})
    assert path.read_text() == line("a") + '{"id": "2", "asked": "2"}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line("a", "9"), "line 1: 'a' was asked otherwise"),
        (line("a") + line("b", "9"), "line 2: no question has the id 'b'"),
        (line("a") + line("a"), "line 2: 'a' is answered on an earlier line"),
        ("my notes\n", "line 1: this is no answer of `lmm generate`"),
        ('{"id": 3}\n', "line 1: this is no answer"),
        ("\n", "line 1: this is no answer"),
    ],
)
def test_a_file_of_something_else_is_refused_and_stays_as_it_is(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Answers(path, DIGESTS)
    assert path.read_text() == content


def test_one_process_writes_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    first, second = Answers(path, DIGESTS), Answers(path, DIGESTS)
    first.begin()
    with pytest.raises(OSError, match="is being written to by another process"):
        second.begin()
    first.add({"id": "a", "asked": "1"})
    first.close()
    with pytest.raises(OSError, match="is being written to by another process"):
        second.begin()  # it was, since it was read
    third = Answers(path, DIGESTS)
    third.begin()
    assert third.done == {"a"}


def test_the_digest_holds_all_that_an_answer_depends_on():
    base = Question(1, "f, line 1", {"prompt": "x", "images": ["a.png"]}, "x", ["/f/a.png"], {"scale": 9, "seed": 0})
    others = [
        {"said": {"prompt": "y", "images": ["a.png"]}},
        {"images": ["/g/a.png"]},
        {"options": {"scale": 4, "seed": 0}},
        {"options": {"scale": 9, "seed": 1}},
    ]
    digests = {asked(base, "model"), asked(base, "another")}
    digests |= {asked(dataclasses.replace(base, **other), "model") for other in others}
    assert len(digests) == 2 + len(others)
    assert asked(dataclasses.replace(base, where="f, line 2", id=2), "model") == asked(base, "model")


def test_places_where_no_file_can_be_are_told_before(tmp_path):
    check_place(tmp_path / "out.jsonl")
    for path, message in [
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no/out.jsonl", "there is no folder"),
        ("gs://bucket/out.jsonl", "which no bucket takes"),
    ]:
        with pytest.raises(OSError, match=message):
            check_place(path)
