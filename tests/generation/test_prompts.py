"""What a user may ask, and the sentence for everything else."""

import base64
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
    *([{"role": "user", "content": x}] for x in (None, 5, b"x", {"type": "text", "text": "x"}, RED, [], [[]], ["x"])),
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    [{"role": "user", "content": " "}],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=shown)
def test_a_bad_prompt_is_named(prompt):
    with pytest.raises(ValueError, match="^prompt"):
        read(None, prompt)


def ask(content, images=None, *before):
    """The query of what a user says, after other turns."""
    (query,), _ = read(images, [*before, {"role": "user", "content": content}])
    return query


def picture(width):
    return Image.new("RGB", (width, 1))


def test_parts_say_what_text_with_tags_says(files):
    text, image = {"type": "text", "text": "What?"}, {"type": "image"}
    for content in (
        [image, text],
        (image, text),
        [{"type": "image"} | {"text": None, "image": None, "index": []}, text],
    ):
        assert ask(content, RED) == ask("<image>\nWhat?", RED)
    assert ask([text]).turns == (("user", "What?"),)
    assert ask([text], RED).turns == (("user", "<image>\nWhat?"),)
    assert ask([text, image, image, text], [RED, RED]).turns == (("user", "What?<image>\n<image>\nWhat?"),)
    assert ask([image], RED).turns == (("user", "<image>\n"),)
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "human", "content": [image, image, {"type": "text", "text": "Which?"}]},
        {"role": "gpt", "content": [{"text": "The first."}]},
    ]
    query = ask([image, {"text": "And this?"}], [RED, RED, picture(2)], *turns)
    plain = ["Be brief.", "<image>\n<image>\nWhich?", "The first.", "<image>\nAnd this?"]
    assert query.turns == tuple(zip(("system", "user", "assistant", "user"), plain, strict=True))
    assert query.without_oldest_turn().sizes == ((2, 1),)


def test_a_part_may_carry_its_picture_as_other_libraries_write_it(files):
    path, text = files / "red.png", {"type": "text", "text": "What?"}
    space = files / "red and blue.png"
    RED.save(space)
    coded = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/png;base64,{coded}"
    for key in ("image", "path", "url", "image_url"):
        pictures = [
            str(path),
            path,
            path.read_bytes(),
            RED,
            path.as_uri(),
            space.as_uri(),
            url,
            url.upper()[:5] + url[5:],
        ]
        for one in (
            *pictures,
            coded,
            {"url": url},
            {"url": str(path), "detail": "low"},
            {"bytes": path.read_bytes()},
        ):
            for part in ({"type": "image", key: one}, {"type": "image_url", key: one}, {key: one}):
                query = ask([part, text])
                assert query.turns == (("user", "<image>\nWhat?"),) and query.sizes == ((6, 4),)
                assert len(query.pictures) == 1
    for one in (path.as_uri(), "FILE" + path.as_uri()[4:], f"file://localhost{path}", url, coded):  # in images too
        assert ask("What?", one).sizes == ((6, 4),)


def test_pictures_of_parts_and_of_images_stand_in_order_of_appearance():
    own = [{"type": "image", "image": picture(width)} for width in range(1, 9)]
    free, text = {"type": "image"}, {"type": "text", "text": "a <image> b <image>"}
    query = ask([own[0], free, text, own[1]], [picture(width) for width in (11, 12, 13)])
    assert query.turns == (("user", "<image>\n<image>\na <image> b <image><image>\n"),)
    assert [width for width, _ in query.sizes] == [1, 11, 12, 13, 2]
    before = ({"role": "user", "content": [own[3], free]}, {"role": "assistant", "content": "c"})
    query = ask([free, own[4], {"text": "d"}], [picture(11), picture(12)], *before)
    assert [width for width, _ in query.sizes] == [4, 11, 12, 5]
    assert [picture.size[0] for picture in query.pictures] == [4, 11, 12, 5]
    assert query.without_oldest_turn().sizes == ((12, 1), (5, 1))
    queries, many = read(
        [None, [RED]], [[{"role": "user", "content": [own[0]]}], [{"role": "user", "content": [free]}]]
    )
    assert many and [query.sizes for query in queries] == [((1, 1),), ((6, 4),)]


@pytest.mark.parametrize(
    ("content", "images", "free"),
    [
        ([{"type": "image"}], None, 1),
        ([{"type": "image"}], [RED, RED], 1),
        ([{"type": "image", "image": RED}], RED, 0),
        ([{"type": "image"}, {"type": "text", "text": "what does <image> mean?"}], RED, 2),
        ([{"type": "image", "image": RED}, {"type": "text", "text": "what does <image> mean?"}], None, 1),
        ([{"type": "text", "text": "<image><image>"}], RED, 2),
    ],
)
def test_places_without_a_picture_of_their_own_are_as_many_as_images(content, images, free):
    given = 0 if images is None else len(images) if isinstance(images, list) else 1
    with pytest.raises(ValueError) as caught:
        ask(content, images)
    assert str(caught.value) == (
        f"prompt: {free} <image> tags and image parts without a picture of their own in the text, {given} pictures "
        "in images; give as many"
    )
    with pytest.raises(
        ValueError, match=r"^prompt: 2 <image> tags in the text, 1 pictures in images; give .* first$"
    ):
        ask("<image><image>", RED)


def test_a_tag_is_not_made_of_two_parts():
    for images in (None, RED):
        with pytest.raises(
            ValueError, match=r"^prompt, turn 1: where two of its parts meet there is an <image>; write"
        ):
            ask([{"text": "a <ima"}, {"text": "ge> b"}], images)


def test_what_an_assistant_writes_stands_for_no_picture():
    said = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "<image>"}]},
    ]
    assert ask("x", None, *said).pictures == () and ask("<image>x", RED, *said).pictures == (RED,)
    for role in ("assistant", "gpt", "system"):
        for part in ({"type": "image"}, {"type": "image", "image": RED}, {"image": "nothere.png"}):
            turn = {"role": role, "content": [{"type": "text", "text": "a"}, part]}
            with pytest.raises(
                ValueError, match=r"^prompt, turn 1, part 2 is a picture in a turn of role '\w+'; pict"
            ):
                ask("x", RED, turn)


BAD_PARTS = [
    *("x", 5, None, [], RED, b"x", np.zeros(2)),
    *({}, {"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 5}, {"text": ["a"]}),
    *(
        {"type": x, "text": "a"}
        for x in ("video", "video_url", "input_audio", "audio", "tool_use", "tool_result", "file")
    ),
    *({"type": x, "text": "a"} for x in (5, ["text"], "TEXT", "", "input_text", "thinking", True, np.zeros(2))),
    *({"video": "a.mp4"}, {"type": "image", "video": "a.mp4"}, {"type": "text", "text": "a", "audio": "a.wav"}),
    *({"type": "image", "source": {"data": "x"}}, {"type": "image", "base64": "x"}, {"type": "image", "Image": RED}),
    *({"type": "image", "img": "a.png"}, {"type": "text", "text": "a", "max_pixels": 5}, {"type": "text", 5: "a"}),
    *({"type": "text", "text": "a", "image": RED}, {"type": "image", "text": "a"}, {"text": "a", "url": RED}),
    *({"type": "image", "image": RED, "url": "a.png"}, {"type": "image", "path": "a.png", "url": "a.png"}),
    *({"type": "image", "image": x} for x in ("", " ", b"", b"no picture", 5, True, [RED], ["a.png"], {}, {"a": 1})),
    *({"type": "image", "image": x} for x in (np.zeros((4, 4, 3)), "nothere.png", "file:///nothere.png", object())),
    *({"type": "image", "image": x} for x in ("data:image/png,abc", "data:image/png;base64,A", "data:;base64,QUJD")),
    *({"type": "image", "image": {"url": x}} for x in (None, 5, "http://a/b.png", {"url": "a.png"})),
    *({"type": "image", "image": x} for x in ({"bytes": "text"}, {"bytes": None}, {"path": "nothere.png"})),
]


@pytest.mark.parametrize("part", BAD_PARTS, ids=shown)
def test_a_bad_part_is_named(part):
    with pytest.raises((ValueError, OSError), match=r"(?s)^prompt, turn 1, part 2\b.*\w"):
        ask([{"type": "text", "text": "a"}, part])
    with pytest.raises((ValueError, OSError), match=r"(?s)^prompt 2 of 2, turn 1, part 2\b"):
        read(None, ["a", [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]])


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (
            {"type": "video", "video": "a.mp4"},
            "'video' (video, which the models here do not take); valid types are text, ",
        ),
        ({"type": "input_audio"}, "'input_audio' (audio, which"),
        ({"type": "tool_result"}, "'tool_result' (tool call, which"),
        ({"type": "file"}, "'file'; valid types are text, image, image_url"),
        ({"type": "image", "img": "a.png"}, "has the key 'img', which is not known; a part is"),
        ({"type": "image", "image": RED, "url": "a"}, "has the keys image and url; a part has one picture"),
        ({"type": "image", "image": "nothere.png"}, "part 1: no file nothere.png"),
        ({"type": "image", "image": b"x"}, "part 1: cannot read a picture from 1 bytes"),
    ],
    ids=shown,
)
def test_what_is_wrong_with_a_part_is_told(part, told):
    with pytest.raises((ValueError, OSError), match=re.escape(told)):
        ask([part])


@pytest.mark.parametrize(
    "url", ["http://a.org/b.png", "https://a.org/b.png", "HTTPS://a/b", " http://a/b", "ftp://a/b"]
)
def test_nothing_is_fetched(url):
    told = r" is the URL .*; nothing is fetched: download it and name the file$"
    for part in ({"type": "image", "url": url}, {"image": url}, {"type": "image_url", "image_url": {"url": url}}):
        with pytest.raises(ValueError, match=f"^prompt, turn 1, part 1{told}"):
            ask([part])
    with pytest.raises(ValueError, match=f"^images{told}"):
        ask("x", url)
    with pytest.raises(ValueError, match=rf"^images\[1\]{told}"):
        ask("x", [RED, url])


@pytest.mark.parametrize("key", ["image", "images", "url", "videos", "audio", "tool_calls", "function_call"])
def test_a_key_of_a_turn_that_would_change_it_is_named(key):
    turn = {"role": "user", "content": "x"}
    with pytest.raises(ValueError, match=rf"^prompt, turn 1 has the key '{key}'"):
        read(None, [turn | {key: ["a.png"]}])
    for nothing in (None, [], "", {}):
        read(None, [turn | {key: nothing, "name": "me"}])


def test_a_role_that_is_none_of_ours_is_named_with_what_it_stands_for():
    with pytest.raises(
        ValueError, match=r"^prompt, turn 1: role 'tool' \(tool call, which the models .*\) is none of us"
    ):
        ask("x", None, {"role": "tool", "content": "x"})
    with pytest.raises(ValueError, match=r"^prompt, turn 1: role 'bot' is none of user, human, "):
        ask("x", None, {"role": "bot", "content": "x"})
    with pytest.raises(ValueError, match=r"^prompt, turn 1 is a part and no turn; parts are the content of a turn"):
        read(RED, [{"type": "image"}, {"type": "text", "text": "x"}])


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
