"""JSON of others: what could mean two things is refused, with its place."""

import json
import os

import pytest
from etils import epath

from lmm_jax import strict_json
from lmm_jax.ranges import each, flag, whole

REFUSED = {
    "": "Expecting value",
    "{": "Expecting property name",
    '{"a": NaN}': "a is NaN, which is no finite number",
    '{"a": {"b": [1, -Infinity]}}': "a.b.1 is -Infinity",
    '{"a": 1e400}': "a is 1e400",
    "NaN": "it is NaN",
    '{"a": 1, "a": 1}': "the key 'a' stands there twice",
    '[{"b": {"x": 1, "x": 2}}]': "the key 'x' stands there twice",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 100_000: "nested too deeply",
    "[" * 202 + "]" * 202: "nested too deeply",
    '{"a":' * 300 + "[]" + "}" * 300: "nested too deeply",
    "9" * 5000: "limit",
}


def test_what_is_written_can_be_read():
    told = {"loss": float("nan"), "list": [1, float("inf"), {"x": (float("-inf"), 2.5)}], "name": "ä"}
    read = strict_json.parse(strict_json.line(told))
    assert read == {"loss": None, "list": [1, None, {"x": [None, 2.5]}], "name": "ä"}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:20])
def test_what_means_nothing_or_two_things_is_refused(text):
    with pytest.raises(ValueError, match=REFUSED[text]):
        strict_json.parse(text)


def test_what_is_sound_is_what_python_reads():
    text = json.dumps({"a": [1, 2.5, 10**30, None, True, "é", {"b": {}}], "": -1e308})
    assert strict_json.parse(text) == json.loads(text) == strict_json.parse(text.encode())


@pytest.mark.parametrize("content", [b"[1]", b"null", b"3", b"\xff\xfe\x00", b"", b'{"a": Infinity}'])
def test_a_file_that_holds_no_object_is_named(tmp_path, content):
    path = epath.Path(tmp_path / "config.json")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json (is no JSON|holds no keys)"):
        strict_json.read_object(path)


def test_what_is_read_can_be_gone_through():
    deepest = strict_json.parse("[" * 201 + "]" * 201)
    assert strict_json.as_tuples(deepest) and strict_json.fault({"a": deepest}, {"a": flag()})
    wide = strict_json.parse("[" + "[1, {}]," * 10_000 + "3]")
    assert len(wide) == 10_001


def test_a_device_and_a_file_without_end_are_not_read(tmp_path):
    (tmp_path / "a.json").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"a\.json is no file"):
        strict_json.read_object(epath.Path(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text("{}" + " " * 100)
    with pytest.raises(ValueError, match=r"b\.json has 102 bytes, more than 50 are not read"):
        strict_json.read_object(epath.Path(tmp_path / "b.json"), 50)
    os.mkfifo(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"c\.json is no file"):
        strict_json.read_bytes(epath.Path(tmp_path / "c.json"))
    with open(tmp_path / "d.json", "wb") as file:
        file.truncate(strict_json.MOST_BYTES + 1)  # a hole, which takes no room
    with pytest.raises(ValueError, match=r"d\.json has 16,777,217 bytes, more than 16,777,216 are not read"):
        strict_json.read_object(epath.Path(tmp_path / "d.json"))


def test_values_are_held_to_their_ranges_by_name():
    ranges = {"n": whole(1, 8), "on": flag(), "sizes": each(whole(1), 1, 2)}
    for good in ({}, {"n": None, "other": "x"}, {"n": 8, "on": False, "sizes": [1, 2]}):
        assert strict_json.fault(good, ranges) == ""
    for bad, words in (
        ({"n": True}, "n = True is not supported, a whole number from 1 to 8 is"),
        ({"n": 10**7}, "n = 10000000 is not supported"),
        ({"n": "x" * 10_000}, "xx… is not supported"),
        ({"on": 1}, "on = 1 is not supported, True or False is"),
        ({"sizes": [1, [2]]}, r"sizes = [1, [2]] is not supported"),
        ({"sizes": 3}, "sizes = 3"),
    ):
        found = strict_json.fault(bad, ranges, "part")
        assert found.startswith("part.") and words in found and len(found) < 250
