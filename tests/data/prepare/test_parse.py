"""Reading rows: every layout, every break, at any chunk size."""

import io
import json
import os
import pickle
import tracemalloc

import pytest

from lmm_jax.data.prepare import parse as rows
from lmm_jax.data.prepare.parse import Refused, parse_row, read_items, safe_path

VALUES = [
    {"id": "a", "text": 'quotes " and \\ and ] } , [ {', "nested": [{"x": [1, 2]}, []]},
    {"id": "ü☃\U0001f600", "n": -12.5e-3, "flags": [True, False, None]},
    "a string",
    123456,
    {},
    [],
    -1,
    {"last": float("-inf")},
]
LLAVA = {
    "id": 7,
    "image": "a.jpg",
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}],
}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def parse(item):
    return parse_row(json.dumps(item), 1)


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_are_cut_alike_at_any_chunk_size(monkeypatch, indent):
    text = "\n " + json.dumps(VALUES, indent=indent, ensure_ascii=False) + " \n"
    expected = list(read_items(io.StringIO(text)))
    assert [json.loads(value) for _, value in expected] == VALUES
    lines = text.splitlines()
    assert all(value.splitlines()[0] in lines[line - 1] for line, value in expected)
    for size in range(1, len(text) + 1):
        monkeypatch.setattr(rows, "CHUNK", size)
        assert list(read_items(io.StringIO(text))) == expected


def test_an_array_that_breaks_off_anywhere_gives_what_came_before_and_is_an_error(monkeypatch):
    text = json.dumps(VALUES, indent=1)
    whole = list(read_items(io.StringIO(text)))
    for size in (1, 3, 64):
        monkeypatch.setattr(rows, "CHUNK", size)
        for end in range(1, len(text)):
            found = []
            with pytest.raises(Refused, match="broken JSON: the array breaks off"):
                _collect(text[:end], found)
            assert found == whole[: len(found)]
            assert text[:end].count("\n") + 1 >= max([line for line, _ in found], default=1)


def _collect(text, found):
    for item in read_items(io.StringIO(text)):
        found.append(item)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}\n{"a": 2}]', "breaks off in the value at line 2: .*','"),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', "breaks off in the value at line 2: .*':'"),
        ('[{"a": 1},\n\n]', "breaks off in the value at line 3"),
        ('[{"a": 1}, a {"a": 2}]', "breaks off in the value at line 1: .*invalid"),
        ('[{"a": 1} o {"a": 2}]', "breaks off in the value at line 1: .*invalid"),
        ("[,]", "breaks off in the value at line 1"),
        ("[}", "breaks off in the value at line 1"),
        ('[{"a": 1}]\n{"a": 2}', "something follows the array's end at line 1"),
        ('[{"a": "never closed},\n{"a": 2}]', "breaks off in the value at line 1"),
        ("[" * 100_000, "breaks off in the value at line 1: the file ends"),
        (f'[1,\n{{"a": {"1" * 5_000}}}]', "breaks off in the value at line 2: .*5000 digits"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(text, problem):
    with pytest.raises(Refused, match=problem):
        list(read_items(io.StringIO(text)))


def test_a_string_without_end_does_not_read_the_whole_file(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK", 16)
    monkeypatch.setattr(rows, "MAX_ROW", 64)
    for head, rest in (('[{"a": "', "x"), ('[{"a": "', "x}, {y}, "), ('["', "x, "), ("[1", "1"), ('{"a": "', "x")):
        f = io.StringIO(head + rest * 10_000)
        with pytest.raises(Refused, match="broken JSON: .* more than 64 characters"):
            list(read_items(f))
        assert f.tell() < 500


def test_what_a_string_without_end_takes_of_memory_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "CHUNK", 1 << 16)
    monkeypatch.setattr(rows, "MAX_ROW", 1 << 20)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "' + "never closed}, {and on " * 1_000_000)
    with rows.open_rows(path) as f:
        tracemalloc.start()
        with pytest.raises(Refused, match="the value at line 1: it has more than 1,048,576 characters"):
            list(read_items(f))
        (_, most), size = tracemalloc.get_traced_memory(), path.stat().st_size
        tracemalloc.stop()
    assert most < 12 << 20 < size


def test_a_value_that_json_reads_in_its_own_way_stands_or_falls_alone(tmp_path):
    path = tmp_path / "rows.json"
    said = b'[{"role": "user", "content": "hi"}]'
    given = [
        b'{"messages": %s, "score": NaN, "range": [-Infinity, Infinity, 1e400]}' % said,
        b'{"messages": %s, "id": "first", "id": "NaN, Infinity"}' % said,
        b'{"messages": %s, "id": "\xff"}' % said,
        b'{"messages": %s, "id": "\\ud800"}' % said,
        b"[" * 3_000 + b"]" * 3_000,
        b'{"messages": %s}' % said,
    ]
    path.write_bytes(b"[" + b",\n".join(given) + b"]")
    with rows.open_rows(path) as f:
        found = [(line, _parsed(text, line)) for line, text in read_items(f)]
    assert found == [
        (1, "1"),
        (2, "NaN, Infinity"),
        (3, "text is not UTF-8"),
        (4, "text is not UTF-8"),
        (5, "broken JSON"),
        (6, "6"),
    ]


def _parsed(text, number):
    try:
        return parse_row(text, number).id
    except Refused as error:
        return error.reason


def test_lines_are_numbered_as_they_stand_and_need_not_be_json():
    text = '{"id": 1}\n\nnot json\r\n{"id": 2}'
    assert [(line, value.strip()) for line, value in read_items(io.StringIO(text))] == [
        (1, '{"id": 1}'),
        (3, "not json"),
        (4, '{"id": 2}'),
    ]
    assert list(read_items(io.StringIO(" [ ] "))) == list(read_items(io.StringIO(""))) == []


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "rows.json"
    for text in ('[{"a": 1}]', '{"a": 1}\n'):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        with rows.open_rows(path) as f:
            assert [json.loads(value) for _, value in read_items(f)] == [{"a": 1}]


def test_every_layout_is_the_same_row():
    expected = rows.Row("7", ("a.jpg",), (("user", "<image>\nwhat?"), ("assistant", "a cat")), ("", ""))
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
        "1", (), (("user", "hi"), ("assistant", "ho")), ("", "")
    )


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ([1], "broken JSON"),
        ({"id": 7}, "no conversation"),
        ({"id": 7, "messages": []}, "no conversation"),
        ({"id": 7, "messages": ["hi"]}, "no conversation"),
        ({"id": 7, "messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": [{"content": "x"}]}, "unknown role"),
        ({"id": 7, "messages": turns(None)}, "turn without text"),
        ({"id": 7, "messages": turns([{"type": "video"}])}, "turn without text"),
        ({"id": 7, "messages": turns("\ud800")}, "text is not UTF-8"),
        ({"id": 7, "image": 3, "messages": turns("hi")}, "images are not file names"),
        ({"id": 7, "image": "", "messages": turns("hi")}, "images are not file names"),
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


def test_pictures_cannot_be_named_outside_the_folder(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "inside.jpg").symlink_to(folder / "a.jpg")
    (tmp_path / "images2").mkdir()
    for name in (
        *("/etc/passwd", "../secret.jpg", "sub/../../secret.jpg", "link.jpg", "../images2/a.jpg", "", "a\0.jpg"),
        *("http://host/a.jpg", "file:///etc/passwd", str(folder / "a.jpg")),
    ):
        with pytest.raises(Refused, match="picture path leaves the folder"):
            safe_path(folder, name)
    for name in ("a.jpg", "sub/../a.jpg", "inside.jpg"):
        assert safe_path(folder, name) == os.path.realpath(folder / "a.jpg")
