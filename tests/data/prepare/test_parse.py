"""Reading a row: every layout, absent keys, keys that change its meaning, and names of pictures."""

import base64
import dataclasses
import json
import os
import pickle

import pytest

from lmm_jax.data.conversation import Turn
from lmm_jax.data.prepare import keys
from lmm_jax.data.prepare import parse as rows
from lmm_jax.data.prepare.parse import parse_row
from lmm_jax.data.prepare.picture_names import safe_path
from lmm_jax.data.prepare.refused import Refused

LLAVA = {
    "id": 7,
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def parse(item):
    return parse_row(json.dumps(item), 1)


def test_every_layout_is_the_same_row():
    expected = rows.Row("7", ("a.jpg",), (Turn("user", "<image>\nwhat?"), Turn("assistant", "a cat")), ("", ""))
    asked = turns("<image>\nwhat?", "a cat")
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "what?"}]
    for item in (
        LLAVA,
        {**LLAVA, "image": ["a.jpg"]},
        {"id": "7", "images": ["a.jpg"], "messages": asked},
        {"id": "7", "images": ["a.jpg"], "conversation": asked},
        {"id": "7", "messages": turns(parts, "a cat")},
        {
            "id": "7",
            "images": ["a.jpg"],
            "messages": turns([{"type": "image"}, parts[1]], [parts[1] | {"text": "a cat"}]),
        },
    ):
        assert parse(item) == expected
    assert parse({"messages": turns("hi", "ho")}) == rows.Row(
        "1", (), (Turn("user", "hi"), Turn("assistant", "ho")), ("", "")
    )


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ([1], "not an object"),
        ({"id": 7}, "no conversation"),
        ({"id": 7, "messages": []}, "no conversation"),
        ({"id": 7, "messages": ["hi"]}, "no conversation"),
        ({"id": 7, "messages": [{"role": "tool", "content": "x"}]}, "tool call"),
        ({"id": 7, "messages": [{"role": "narrator", "content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": [{"content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": turns(None)}, "turn without text"),
        ({"id": 7, "messages": turns([{"type": "video"}])}, "video"),
        ({"id": 7, "messages": turns([{"type": "graph"}])}, "unknown type of part"),
        ({"id": 7, "messages": turns([{"type": "text", "text": 3}])}, "turn without text"),
        ({"id": 7, "messages": turns([["a"]])}, "turn without text"),
        ({"id": 7, "messages": turns("\ud800")}, "text is not UTF-8"),
        ({"id": 7, "image": 3, "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": {"a": 1}, "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": [["a.jpg"]], "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": {"bytes": "iVBOR", "path": None}, "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": "data:image/png;base64,%%%", "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": "data:image/png,abc", "messages": turns("hi")}, "images are not file names"),
        (
            {"id": 7, "image": "a.jpg", "messages": turns([{"type": "image", "image": "b.jpg"}])},
            "tags do not match pictures",
        ),
    ],
)
def test_rows_are_refused_with_reason_and_id(item, reason):
    with pytest.raises(Refused) as refused:
        parse(item)
    assert refused.value.reason == reason
    assert refused.value.id == ("7" if isinstance(item, dict) else "")
    again = pickle.loads(pickle.dumps(refused.value))
    assert (again.reason, again.detail, again.id) == (reason, refused.value.detail, refused.value.id)


@pytest.mark.parametrize("text", ["{", "nonsense", '{"a": "\n"}', "[" * 100_000, "1" * 10_000])
def test_text_that_is_no_json_is_refused(text):
    with pytest.raises(Refused, match="broken JSON"):
        parse_row(text, 1)


GOOD = [  # rows of either layout
    LLAVA,
    {**LLAVA, "image": ["a.jpg", "b.jpg"], "system": "be brief"},
    {"messages": turns("hi", "ho")},
    {"id": "x", "images": ["a.jpg"], "messages": turns("<image>what?", "a cat", "why?", "so")},
    {"id": "x", "messages": turns([{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "what?"}], "a cat")},
    {"id": "x", "images": ["a.jpg"], "messages": turns([{"type": "image"}, {"type": "text", "text": ""}], "a cat")},
    {"conversation": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a", "weight": 0}]},
]
NOTHING = [None, float("nan"), "", [], [None], {}, {"bytes": None, "path": None}, [{"x": None}]]


@pytest.mark.parametrize("nothing", NOTHING, ids=repr)
@pytest.mark.parametrize("number", range(len(GOOD)))
def test_what_holds_nothing_counts_as_absent_at_each_level(number, nothing):
    """As tables write rows: every key in each, whether it is used or not."""
    item = GOOD[number]
    every = {level: keys.KNOWN[level] | keys.REFUSED_KEYS[level].keys() | {"source", "time"} for level in keys.KNOWN}
    for level in ("row", "turn", "part"):
        found = json.loads(json.dumps(item))
        (key,) = [key for key in rows.TURNS if key in found]
        parts = [part for turn in found[key] if isinstance(turn.get("content"), list) for part in turn["content"]]
        for filled in {"row": [found], "turn": found[key], "part": parts}[level]:
            filled.update(dict.fromkeys(every[level] - filled.keys(), nothing))
        assert parse(found) == parse(item), level


def test_a_number_of_a_row_stands_for_an_id_that_holds_nothing():
    for nothing in (None, "", float("nan"), []):
        assert parse({"id": nothing, "messages": turns("hi", "ho")}).id == "1"
    assert parse({"id": 0, "messages": turns("hi", "ho")}).id == "0"


def test_two_keys_of_one_meaning_agree_or_refuse_the_row():
    for item in (
        {**LLAVA, "images": ["a.jpg"]},
        {**LLAVA, "messages": turns("other", "turns")},
        {"messages": [{"role": "user", "from": "gpt", "content": "hi"}]},
        {"messages": [{"role": "user", "value": "ho", "content": "hi"}]},
        {"messages": turns([{"type": "image", "image": "a.jpg", "path": "b.jpg"}], "a")},
        {"messages": turns([{"type": "text", "text": "x", "path": "b.jpg"}], "a")},
        {"messages": turns("hi", "ho"), "system": "a", "system_prompt": "b"},
        {"messages": [{"role": "system", "content": "b"}, *turns("hi", "ho")], "system": "a"},
        {"messages": [{"role": "assistant", "content": "b", "weight": 0, "train": True}]},
    ):
        with pytest.raises(Refused, match="keys contradict each other"):
            parse(item)
    assert parse({**LLAVA, "images": "a.jpg", "messages": LLAVA["conversations"]}) == parse(LLAVA)


WEIGHTS = ("weight", "loss", "train", "training", "loss_mask", "loss_scale")


@pytest.mark.parametrize("key", WEIGHTS)
def test_a_weight_takes_a_turn_out_of_the_loss_or_refuses_the_row(key):
    def in_loss(value, role="assistant"):
        given = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        for turn in given:
            turn.update({key: value} if turn["role"] == role else {})
        return parse({"messages": given}).turns[1].in_loss

    assert not any(map(in_loss, (0, False, 0.0))) and all(map(in_loss, (1, True, 1.0, None)))
    assert in_loss(0, "user") and in_loss(None, "user")
    for value, role in ((0.5, "assistant"), (2, "assistant"), ("0", "assistant"), (-1, "assistant"), (1, "user")):
        with pytest.raises(Refused, match=f"weight that is not taken: turn . has {key} "):
            in_loss(value, role)
    for value in (0, False, 0.5):
        with pytest.raises(Refused, match=f"weight that is not taken: the row has {key} "):
            parse({"messages": turns("q", "a"), key: value})
    assert parse({"messages": turns("q", "a"), key: 1}) == parse({"messages": turns("q", "a")})


@pytest.mark.parametrize(
    ("level", "key", "value"),
    [
        *(
            ("turn", key, 0)
            for key in ("Weight", "weights", "lossWeight", "loss_multiplier", "train ", "compute-loss")
        ),
        *(("turn", key, False) for key in ("trainable", "train_on_turn", "supervised", "learn", "label")),
        *(("turn", key, True) for key in ("ignore", "is_masked", "no_loss")),
        *(("turn", key, [0, 1, 1]) for key in ("loss_weights", "assistant_masks", "label_mask")),
        *(("turn", key, "so …") for key in ("reasoning_content", "Thinking", "toolCalls", "video_path", "audioUrl")),
        *(("row", key, [0, 1, 0]) for key in ("weights", "assistant_masks", "completion_mask", "LossMask")),
        *(("row", key, 0.5) for key in ("sample_weight", "lossWeight", "Weight", "loss_weight")),
        *(("row", key, False) for key in ("label", "kto_tag", "kto-label")),
        *(("row", key, "x.mp4") for key in ("Video", "video_path", "videoPaths", "video_file", "clips")),
        *(("row", key, "x") for key in ("Image", "Conversations", "System", "Mask", "Chosen", "toolCalls")),
        ("row", "history", [["q", "a"]]),
    ],
)
def test_what_changes_the_meaning_refuses_the_row_in_any_spelling(level, key, value):
    item = {"id": 7, "messages": turns("hi", "ho")}
    (item if level == "row" else item["messages"][1])[key] = value
    with pytest.raises(Refused, match=f"has the key {key!r}; .") as refused:
        parse(item)
    assert refused.value.id == "7"


def test_what_says_something_else_is_ignored():
    for key, value in (
        *(("ID", 3), ("label", True), ("label", 0), ("label", "cat"), ("loss_weight", 1.0), ("mask_path", "m.png")),
        *(
            ("video_id", "x"),
            ("video_fps", 3),
            ("trained_by", "me"),
            ("train_id", 3),
            ("image_id", 5),
            ("margin", 0.2),
        ),
        *(("image_caption", "a cat"), ("source", "http://host/a.jpg"), ("weight", 1), ("image_url", "http://host/a")),
    ):
        row = parse({**LLAVA, key: value})
        assert row == dataclasses.replace(parse(LLAVA), ignored=() if key == "weight" else (f"row.{key}",))


def test_pictures_under_another_key_are_not_lost():
    said = turns("what is it?", "a cat")
    for key, value in (
        *(
            ("img", "a.jpg"),
            ("image_path", "a.jpg"),
            ("imagePaths", ["a", "b"]),
            ("image_file", "a"),
            ("photo", "x.TIF"),
        ),
        *(("file_name", "a.png"), ("picture", {"bytes": None, "path": "a.png"}), ("source", "sub/a.jpeg")),
    ):
        for item in ({"messages": said, key: value}, {"messages": [said[0] | {key: value}, said[1]]}):
            with pytest.raises(Refused, match=f"picture under another key: .* has the key '{key}'; .*image"):
                parse(item)
    assert parse({**LLAVA, "image_path": "/data/a.jpg"}).images == ("a.jpg",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *((f"{mark}\nwhat?", "mark of a picture") for mark in ("<|image_1|>", "<image_1>", "<image 1>", "<|image|>")),
        *(
            (f"{mark}what?", "mark of a picture")
            for mark in ("<|vision_start|><|image_pad|>", "<IMG_CONTEXT>", "<IMAGE>")
        ),
        *(("Picture 1: <img>a.jpg</img>", "mark of a picture"), ("<start_of_image> x", "mark of a picture")),
        *(("<video>\nwhat?", "video"), ("what?\n<video>", "video"), ("x <|video_pad|> y", "video")),
        *(("<audio>\nwhat?", "audio"), ("<|audio|> what?", "audio")),
    ],
)
def test_marks_of_other_libraries_refuse_the_row(text, reason):
    with pytest.raises(Refused, match=f"^{reason}"):
        parse({"messages": turns(text, "a")})
    assert parse({"messages": turns("what?", text)}).images == ()  # an answer may speak of anything


def test_marks_that_html_has_too_are_text_inside_a_text():
    for text in ("what does <video> do in HTML?", "is <img src='a'> closed?", "list <ul><li>x</li></ul>"):
        assert parse({"messages": turns(text, "a")}).turns[0].text == text


def test_a_key_that_an_object_has_twice_is_no_silent_loss():
    said = '"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"%s}]'
    for text in (
        '{"image": "a.jpg", "image": "b.jpg", %s}' % (said % ""),
        "{%s}" % (said % ', "weight": 0, "weight": 1'),
        '{%s, "meta": {"a": 1, "a": 2}}' % (said % ""),
    ):
        with pytest.raises(Refused, match="keys contradict each other: an object has the key .* twice"):
            parse_row(text, 1)
    for first, second in ((1, 1), ("null", 1), (1, "null"), (1, '""')):
        assert parse_row(f'{{"id": {first}, "id": {second}, {said % ""}}}', 9).id == "1"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("// rows", "Expecting value, at character 1: '// rows'"),
        ('{"a": 1} {"b": 2}', "something follows the row, at character 10: '{\"b\": 2}'"),
        ("{'a': 1}", "double quotes, at character 2"),
        ("[" * 100_000, "nested too deeply"),
        ("1" * 5_000, "a number of more than 4,300 digits"),
        (
            f'{{"messages": {json.dumps(turns("x"))}, "id": "caf\udce9"}}',
            "byte 0xE9 after 'caf'; write the file as UTF-8",
        ),
        (
            f'{{"messages": {json.dumps(turns("x"))}, "id": "x\\ud800"}}',
            r"half of a pair of UTF-16, .ud800 after 'x'",
        ),
    ],
)
def test_what_cannot_be_read_is_shown(text, detail):
    with pytest.raises(Refused, match=detail):
        parse_row(text, 1)


HELD = {"video": "a.mp4", "audio": {"bytes": b"x".decode(), "path": "a.wav"}, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("key", "reason"),
    [(key, reason) for level in keys.REFUSED_KEYS for key, (reason, _) in keys.REFUSED_KEYS[level].items()],
)
def test_a_key_that_changes_the_meaning_refuses_the_row_by_its_name(key, reason):
    held = HELD.get(key, ["x"])
    tried = {
        "row": {**LLAVA, key: held},
        "turn": {"id": 7, "messages": [{"role": "user", "content": "hi", key: held}]},
        "part": {"id": 7, "messages": turns([{"type": "text", "text": "hi", key: held}])},
    }
    for level, item in tried.items():
        if key in keys.REFUSED_KEYS[level]:
            with pytest.raises(Refused, match=f"^{reason}: .* has the key '{key}'; .") as refused:
                parse(item)
            assert refused.value.id == "7"


def test_other_marks_of_what_we_do_not_take_refuse_the_row():
    for kind in (*rows.REFUSED_PARTS, *rows.REFUSED_ROLES):
        part = {"messages": turns([{"type": kind, "url": "x"}])}
        role = {"messages": [{"role": kind, "content": "x"}]}
        for item, known in ((part, rows.REFUSED_PARTS), (role, rows.REFUSED_ROLES)):
            if kind in known:
                with pytest.raises(Refused, match=f"^{known[kind][0]}: .*{kind}"):
                    parse(item)
    boxes = {**LLAVA, "objects": {"bbox": [[1, 2, 3, 4]]}}
    assert parse(boxes).ignored == ("row.objects",)
    boxes["conversations"] = [{"from": "human", "value": "<image>\nwhat is at <bbox>?"}]
    with pytest.raises(Refused, match="marks for boxes: <bbox> stands for the row's objects"):
        parse(boxes)
    assert parse({**LLAVA, "mask": "User"}) == parse(LLAVA)
    with pytest.raises(Refused, match="unclear mask: the row has mask 'Assistant'"):
        parse({**LLAVA, "mask": "Assistant"})


def test_keys_that_are_not_known_are_named():
    parts = [{"type": "image", "path": "a.jpg", "min_pixels": 4}, {"type": "text", "text": "what?"}]
    url = [{"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}]
    said = [{"role": "user", "content": parts + url, "time": 3}, {"role": "assistant", "content": "a", "time": 4}]
    row = parse({"messages": said, "source": "web", "label": [], "n": 0})
    assert row.images == ("a.jpg", "a.jpg")
    assert row.ignored == (
        "row.source",
        "row.n",
        "turn.time",
        "part.min_pixels",
        "part.image_url.detail",
        "turn.time",
    )


PNG = b"\x89PNG\r\n"
LARGE = b"\x89PNG\r\n\x1a\n" + bytes(60)


def test_pictures_are_names_or_bytes():
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    given = {"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]}
    for image, expected in (
        ("a.jpg", "a.jpg"),
        (["a.jpg", None, ""], "a.jpg"),
        (PNG, PNG),
        ([PNG], PNG),
        ({"bytes": PNG, "path": "a.jpg"}, PNG),
        ([{"bytes": PNG, "path": None}], PNG),
        ({"bytes": None, "path": "a.jpg"}, "a.jpg"),
        ({"path": "a.jpg"}, "a.jpg"),
        (url, PNG),
        ([url], PNG),
        (url.replace("data", "DATA").replace("base64,", "base64,\n"), PNG),
        (base64.b64encode(LARGE).decode(), LARGE),  # as it stands, without the head of a URL
    ):
        assert parse_row({**given, "image": image, "images": None}, 1).images == (expected,)
        parts = [{"type": "image", "text": None, "path": image if isinstance(image, str) else None, "image": image}]
        in_turn = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]}
        assert parse_row(in_turn, 1).images == (expected,)
        of_turn = {"messages": [{"role": "user", "content": "<image>", "images": image}]}
        assert parse_row(of_turn, 1).images == (expected,)
    typed = [{"type": "image_url", "image_url": x} for x in (url, {"url": url}, {"url": "a.jpg"})]
    assert parse({"messages": turns([*typed, {"image": "b.jpg"}, {"text": "what?"}])}) == rows.Row(
        "1", (PNG, PNG, "a.jpg", "b.jpg"), (Turn("user", "<image>\n" * 4 + "what?"),), ("",)
    )


def test_turns_may_be_columns_and_a_row_may_bring_the_system_prompt():
    columns = {"from": ["human", "gpt"], "value": ["hi", "ho"], "weight": [None, 0.0], "time": None}
    expected = (Turn("user", "hi"), Turn("assistant", "ho", False))
    assert parse({"conversations": columns}).turns == expected
    said = turns("hi", "ho")
    for key in ("system", "system_prompt"):
        assert parse({"messages": said, key: "be brief"}).turns[0] == Turn("system", "be brief")
        assert parse({"messages": said, key: ""}).turns == parse({"messages": said}).turns


@pytest.mark.parametrize(
    ("item", "detail"),
    [
        ({"instruction": "x", "output": "y", "input": ""}, "keys of the row: instruction, output$"),
        ({}, "keys of the row: none"),
        ({"messages": "[]"}, "the turns are text, not a list of objects; parse them as JSON"),
        ({"messages": 3}, "the turns are a number, not a list"),
        ({"messages": {"0": turns("hi", "ho"), "1": None}}, "is this a table by columns\\? .*orient='records'"),
        ({"0": LLAVA, "1": LLAVA}, "an object whose values are rows .keys: 0, 1, ….; write them as a list"),
        ({"messages": {"a": [1], "b": [1, 2]}}, "the turns are an object, not a list"),
        ({"messages": ["hi"]}, "turn 1 is text, not an object with role and content"),
        ({"messages": [{"text": "hi", "who": "me"}]}, "turn 1 has no role .keys: text, who.; known are user, human"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "turn 1: value or content is missing .keys: role, text."),
        ({"messages": turns(3)}, "turn 1: value or content is a number; it is text, or a list of parts"),
        ({"messages": turns(["hi"])}, "turn 1, part 1 is text, not an object of type text or image"),
    ],
)
def test_reasons_say_what_is_there_and_what_should_be(item, detail):
    with pytest.raises(Refused, match=detail):
        parse(item)


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with links, beside others."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "images2").mkdir()
    for path in (tmp_path / "secret.jpg", folder / "a.jpg", tmp_path / "images2" / "a.jpg"):
        path.write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "inside.jpg").symlink_to(folder / "a.jpg")
    (folder / "other").symlink_to(tmp_path / "images2")
    (tmp_path / "alias").symlink_to(folder)
    return folder


def test_pictures_inside_the_folder_may_be_named_in_any_way(folder):
    for name in (
        *("a.jpg", "./a.jpg", "sub/../a.jpg", "inside.jpg", str(folder / "a.jpg"), str(folder / "inside.jpg")),
        *(
            f"file://{folder}/a.jpg",
            f"FILE://localhost{folder}/a.jpg",
            str(folder / "sub/../a.jpg"),
            str(folder.parent / "alias" / "a.jpg"),
        ),
    ):
        for root in (folder, folder.parent / "alias"):
            assert safe_path(root, name) == os.path.realpath(folder / "a.jpg")


OUTSIDE = [
    ("http://host/a.jpg", "picture name is a URL: http://host/a.jpg; download it"),
    ("s3://bucket/a.jpg", "picture name is a URL"),
    ("../secret.jpg", r"picture name leads out of the folder: .* \(\.\.\)"),
    ("sub/../../secret.jpg", "picture name leads out of the folder"),
    ("../images2/a.jpg", "picture name leads out of the folder"),
    ("other/../secret.jpg", "picture name leads out of the folder"),
    ("/etc/passwd", "absolute picture name outside the folder: /etc/passwd is not in .*--images"),
    ("file:///etc/passwd", "absolute picture name outside the folder"),
    ("{}/../secret.jpg", "picture name leads out of the folder"),
    ("{}2/a.jpg", "absolute picture name outside the folder"),
    ("", "images are not file names"),
    ("a\0.jpg", "images are not file names"),
]


@pytest.mark.parametrize(("name", "reason"), OUTSIDE)
def test_pictures_cannot_be_named_outside_the_folder(folder, name, reason):
    for follow_links in (False, True):
        with pytest.raises(Refused, match=reason):
            safe_path(folder, name.format(folder), follow_links)


def test_links_lead_out_of_the_folder_only_where_they_may(folder):
    for name, target in (("link.jpg", "secret.jpg"), ("other/a.jpg", "images2/a.jpg")):
        for given in (name, str(folder / name), str(folder.parent / "alias" / name)):
            for root in (folder, folder.parent / "alias"):
                if given.startswith(str(folder.parent / "alias")) and root == folder:
                    continue  # named by way of another folder
                with pytest.raises(Refused, match="link that leads out of the folder: .*--follow-links allows it"):
                    safe_path(root, given)
                assert safe_path(root, given, follow_links=True) == os.path.realpath(folder.parent / target)
