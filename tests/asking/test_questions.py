"""Files of questions: what a line may say, and how one that cannot be used is told."""

import json

import pytest
from PIL import Image

from lmm_jax.asking.questions import KEYS, abbreviated, questions_about, read_questions


@pytest.fixture
def folder(tmp_path):
    for name in ("cat.png", "more/dog.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    return tmp_path


def read(folder, *lines, **options):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "asks.jsonl").write_text("\n".join(texts))
    return read_questions(folder / "asks.jsonl", **options)


def test_lines_have_prompts_or_conversations_with_pictures_and_options(folder):
    parts = [{"type": "image", "image": "more/dog.png"}, {"type": "text", "text": "And it?"}]
    found = read(
        folder,
        {"id": "a", "prompt": "What is it?", "image": "cat.png", "scale": 9, "stop": ["\n"], "temperature": None},
        "",
        {"messages": [{"role": "user", "content": parts}], "seed": 7},
        {"prompt": "<image> or <image>?", "images": ["cat.png", "more/dog.png"], "max_new_tokens": 3},
    )
    assert [question.error for question in found] == ["", "", ""]
    assert [question.id for question in found] == ["a", 3, 4]  # lines, where they have no other
    assert found[0].where == "asks.jsonl, line 1" and found[0].images == [str(folder / "cat.png")]
    assert found[0].options == {"scale": 9, "stop": ["\n"], "seed": 0}
    assert found[0].said == {"prompt": "What is it?", "images": ["cat.png"]}
    assert found[1].prompt[0]["content"][0]["image"] == str(folder / "more/dog.png")
    assert found[1].said["messages"][0]["content"][0]["image"] == "more/dog.png"
    assert found[1].options == {"seed": 7} and found[2].options == {"seed": 2, "max_new_tokens": 3}


def test_options_of_all_count_where_a_line_has_no_other(folder):
    found = read(
        folder, {"prompt": "x"}, {"prompt": "x", "temperature": 0.5}, options={"temperature": 1.0, "seed": 5}
    )
    assert [question.options for question in found] == [
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.5, "seed": 6},
    ]


def test_names_are_relative_to_the_folder_that_is_named(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "asks.jsonl").write_text('{"prompt": "x", "image": "more/dog.png"}')
    assert "no file" in read_questions(elsewhere / "asks.jsonl")[0].error
    (found,) = read_questions(elsewhere / "asks.jsonl", folder)
    assert found.images == [str(folder / "more/dog.png")] and not found.error


def test_text_files_have_a_question_a_line_about_the_same_pictures(folder):
    (folder / "asks.txt").write_bytes("\ufeffWhat is it?\r\n\n {no JSON} \n".encode())
    pictures = [str(folder / "cat.png")]
    found = read_questions(folder / "asks.txt", shown_to_all=pictures)
    assert [(q.id, q.prompt, q.images) for q in found] == [(1, "What is it?", pictures), (3, "{no JSON}", pictures)]
    with pytest.raises(ValueError, match="the lines of asks.jsonl name their own pictures"):
        read(folder, {"prompt": "x"}, shown_to_all=pictures)


BAD = {
    '{"prompt": "x"': "broken JSON: Expecting ',' delimiter at character 15",
    "[1]": "a line is an object, such as .*, not a list",
    '{"prompt": "x", "prompt": "y"}': "the key 'prompt' stands there twice",
    '{"prompt": "x", "promt": "y"}': f"the key 'promt' is not known; valid keys are {', '.join(KEYS)}",
    '{"prompt": "x", "messages": []}': "both prompt and messages hold the question",
    '{"prompt": "x", "image": "cat.png", "images": []}': "both image and images hold the pictures",
    '{"image": "cat.png"}': 'no question: "prompt" is its text',
    '{"prompt": ["x"]}': '"prompt" is a list; it is text',
    '{"messages": "x"}': '"messages" is a str',
    '{"messages": [{"role": "user", "content": 3}]}': "prompt, turn 1: content is an int",
    '{"id": true, "prompt": "x"}': "id True is a bool; text or a whole number is valid",
    '{"id": "", "prompt": "x"}': "id '' is a str",
    '{"prompt": "x", "image": "fish.png"}': "no file .*fish.png",
    '{"prompt": "x", "image": "../cat.png"}': r"leads out of .* \(\.\.\)",
    '{"prompt": "x", "image": "/etc/passwd"}': "/etc/passwd is not in",
    '{"prompt": "x", "image": "https://a/b.png"}': "https://a/b.png; download it",
    '{"prompt": "x", "image": 3}': "picture is 3; expected the name of a file",
    '{"prompt": "x", "image": "asks.jsonl"}': "cannot read a picture from",
    '{"prompt": "<image><image>", "image": "cat.png"}': "2 <image> tags in the text, 1 pictures",
    '{"messages": [{"role": "user", "content": [{"type": "image", "image": "fish.png"}]}]}': "no file .*fish.png",
    '{"messages": [{"role": "user", "content": [{"type": "image", "url": "https://a/b.png"}]}]}': "download it",
    '{"prompt": "x", "temperature": "hot"}': r"temperature='hot' \(a str\): a number from 0",
    '{"prompt": "x", "temperature": NaN}': "temperature=nan",
    '{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens=0",
    '{"prompt": "x", "seed": -1}': "seed=-1",
    '{"prompt": "x", "stop": [""]}': "is an empty text",
    '{"prompt": "x", "truncate": 1}': "truncate=1",
}


@pytest.mark.parametrize("line", BAD)
def test_a_line_that_cannot_be_used_says_why(folder, line):
    bad, good = read(folder, line, {"id": "good", "prompt": "x"})
    assert not good.error and bad.where == "asks.jsonl, line 1"
    with pytest.raises(AssertionError, match=BAD[line]):
        raise AssertionError(bad.error)


def test_ids_are_different_whether_they_are_given_or_lines(folder):
    found = read(folder, {"id": "2", "prompt": "x"}, {"prompt": "y"})
    assert [question.error for question in found] == ["", "id 2 is that of line 1, too; give each its own"]


def test_bytes_that_are_no_text_are_told_by_line(folder):
    (folder / "asks.jsonl").write_bytes(b'{"prompt": "x"}\n{"prompt": "\xff"}\n')
    found = read_questions(folder / "asks.jsonl")
    assert not found[0].error and found[1].error == "it is not UTF-8: invalid start byte at byte 13"


def test_files_without_questions_are_refused(folder):
    with pytest.raises(ValueError, match="asks.jsonl holds no question"):
        read(folder, "", " ")
    with pytest.raises(FileNotFoundError, match="--prompts: no file"):
        read_questions(folder / "nothing.jsonl")
    with pytest.raises(NotADirectoryError, match="--images: no folder"):
        read(folder, {"prompt": "x"}, images=folder / "nothing")


def test_a_folder_is_asked_about_picture_by_picture(folder):
    for name in (".hidden.png", "notes.txt", "more/.cache/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    found = questions_about([str(folder)], "What is it?", {"scale": 4})
    assert [(q.id, q.images, q.prompt) for q in found] == [
        ("cat.png", [str(folder / "cat.png")], "What is it?"),
        ("more/dog.png", [str(folder / "more/dog.png")], "What is it?"),
    ]
    assert found[1].options == {"scale": 4, "seed": 1}
    ids = [q.id for q in questions_about([str(folder / "more"), str(folder)], "x")]
    assert ids == [str(folder / "more/dog.png"), str(folder / "cat.png")]  # each once, although one holds the other
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture in the folder"):
        questions_about([str(folder / "empty")], "x")


def test_data_of_pictures_is_not_repeated():
    url = "data:image/png;base64," + "A" * 5000
    said = abbreviated({"images": [url, "cat.png"], "messages": [{"content": "x" * 5000}]})
    assert (
        len(said["images"][0]) < 300
        and said["images"][1] == "cat.png"
        and said["messages"][0]["content"] == "x" * 5000
    )
