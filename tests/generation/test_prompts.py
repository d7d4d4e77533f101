"""What a user may ask, and the sentence for everything else."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from lmm_jax.generation import prompts

RED = Image.new("RGB", (6, 4), "red")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "human", "content": "<image><image>Which?"},
    {"role": "gpt", "content": "The first."},
    {"role": "user", "content": "<image>And this?"},
]


def shown(value):
    """A name for a value that is the same in every process, without its address."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:40]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a picture, an empty file, a text and a folder."""
    folder = tmp_path_factory.mktemp("files")
    RED.save(folder / "red.png")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture")
    (folder / "sub").mkdir()
    return folder


def read(images, prompt, captions=False):
    return prompts.read_queries(images, prompt, captions)


def test_a_picture_or_a_list_of_them_belongs_to_one_prompt(files):
    path = files / "red.png"
    for images in (path, str(path), path.read_bytes(), RED, [path], (RED,)):
        (query,), many = read(images, "What?")
        assert not many and query.turns == (("user", "<image>\nWhat?"),) and query.sizes == ((6, 4),)
    for images in (None, [], ()):
        (query,), many = read(images, "What?")
        assert not many and query.turns == (("user", "What?"),) and query.pictures == ()


def test_a_list_of_prompts_has_as_many_entries_of_pictures_or_none(files):
    queries, many = read(
        [RED, [RED, files / "red.png"], None, []], ["a", "b", "c", [TALK[0], TALK[3] | {"content": "d"}]]
    )
    assert many and [len(query.pictures) for query in queries] == [1, 2, 0, 0]
    assert queries[1].turns == (("user", "<image>\n<image>\nb"),) and queries[1].name == "prompt 2 of 4"
    queries, many = read(None, ["a"])
    assert many and queries[0].pictures == () and read(None, []) == ([], True)


def test_a_conversation_loses_its_oldest_question_with_its_pictures():
    (query,), many = read([RED, RED, Image.new("RGB", (1, 2))], TALK)
    assert not many and [role for role, _ in query.turns] == ["system", "user", "assistant", "user"]
    shorter = query.without_oldest_turn()
    assert shorter.turns == (("system", "Be brief."), ("user", "<image>And this?"))
    assert shorter.sizes == ((1, 2),) and len(shorter.pictures) == 1
    assert shorter.without_oldest_turn() is None
    (query,), _ = read([RED, RED], TALK[1:2])
    assert query.without_oldest_turn() is None


def test_pictures_without_tags_come_before_the_first_question():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    (query,), _ = read(RED, turns)
    assert query.turns == (("user", "<image>\nHi"), ("assistant", "Ho"), ("user", "?"))


def test_a_model_of_captions_is_not_asked_anything():
    (query,), _ = read(RED, "", captions=True)
    assert query.turns == (("user", "<image>\n"),)


BAD_PROMPTS = [
    *(None, 5, 2.5, True, b"text", {"role": "user", "content": "x"}, object()),
    *("", "  \n", "\udc80", "<image> and <image>"),
    *([5], [None], [[]], [["a"]], ["a", {"role": "user", "content": "x"}], [TALK, 7]),
    *([{"role": "user"}], [{"content": "x"}], [{"role": "bot", "content": "x"}], [{"role": 5, "content": "x"}]),
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "user", "content": " "}],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=shown)
def test_a_bad_prompt_is_named(prompt):
    with pytest.raises(ValueError, match="^prompt"):
        read(None, prompt)


BAD_PICTURES = [
    *(5, 2.5, True, {"a": 1}, {"a.png"}, object(), np.zeros((4, 4, 3), np.uint8), iter([RED])),
    *("", " ", b"", b"no picture", "nothere.png", "nothere/", "a\0.png", "x" * 5000),
    *("EMPTY", "TEXT", "SUB", pathlib.Path("nothere.png")),
]


@pytest.mark.parametrize("nested", [lambda x: x, lambda x: [x], lambda x: [RED, x]])
@pytest.mark.parametrize("image", BAD_PICTURES, ids=shown)
def test_a_bad_picture_is_named(files, image, nested):
    names = {"EMPTY": files / "empty.png", "TEXT": files / "text.png", "SUB": files / "sub"}
    if isinstance(image, str):
        image = names.get(image, image)
    with pytest.raises((ValueError, OSError), match="^images") as caught:
        read(nested(image), "What?")
    if isinstance(image, pathlib.Path):
        assert str(image) in str(caught.value)


@pytest.mark.parametrize("images", [[[RED]], [[]], [None], [["a.png"]]], ids=shown)
def test_pictures_of_one_prompt_are_not_nested(images):
    with pytest.raises(ValueError, match=r"^images\[0\] is a (list|NoneType); a picture is a path"):
        read(images, "What?")


@pytest.mark.parametrize("images", ["a.png", RED, b"x", 5, [], [RED], [RED] * 3, [[RED]]], ids=shown)
def test_pictures_of_two_prompts_are_a_list_of_two(images):
    with pytest.raises(ValueError, match=r"^images (is an? \w+ for a list of 2 prompts|has \d entr.* for 2 prompts)"):
        read(images, ["a", "b"])
    with pytest.raises(ValueError, match=r"^images\[1\]\[0\] is a list; a picture is"):
        read([RED, [[RED]]], ["a", "b"])


@pytest.mark.parametrize("value", [0, -1, True, False, 2.5, 4.0, "9", None, b"1", [1], (), {}, np.nan], ids=shown)
def test_numbers_are_whole_and_positive(value):
    with pytest.raises(ValueError, match=r"^batch_size=.*: a whole number of 1 or more is valid"):
        prompts.read_number("batch_size", value)
    assert prompts.read_number("batch_size", np.int64(3)) == 3


def test_numbers_are_one_for_all_or_one_for_each():
    assert prompts.read_numbers("n", 3, 2, many=True) == [3, 3]
    assert prompts.read_numbers("n", [3, 4], 2, many=True) == [3, 4]
    for value, count, many in (([3], 2, True), ([3, 0], 2, True), ([3], 1, False), (0, 2, True), ("33", 2, True)):
        with pytest.raises(ValueError, match=r"^n(\[1\])?(=| has)"):
            prompts.read_numbers("n", value, count, many)
    for value in (1, "yes", None):
        with pytest.raises(ValueError, match="^truncate=.*: True or False is valid"):
            prompts.read_flag("truncate", value)
