"""Result files: written as answers come, read again, and kept apart from those of another run."""

import dataclasses
import json

import pytest

from lmm_jax.evaluation import records
from lmm_jax.evaluation.records import Results
from tests.evaluation.made import record

HEADER = {"format": 1, "task": "digits", "scale": 9, "model": "a", "tuple": (1, 2), "date": "2026-01-01"}


def results(folder, host=0, **other):
    return Results(folder, "9", HEADER | other, host)


def added(folder, numbers, host=0, **other):
    found = results(folder, host, **other)
    for number in numbers:
        found.add(record(number, 1.0))
    return found


def test_a_record_is_the_same_when_it_is_read_again(tmp_path):
    made = dataclasses.replace(
        record(3, 0.25), answer="é\u2028\ud83d \n", truths=("a", "b"), logprobs=(-0.5, -2.0), expected=(0.5,), id=7
    )
    assert records.from_line(records.to_line(made)) == made
    added(tmp_path, []).add(made)
    assert results(tmp_path).done == {3: made}


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_what_was_answered_is_there_after_a_line_is_torn(tmp_path, cut):
    added(tmp_path, range(5))
    (part,) = tmp_path.glob("9.part-*.jsonl")
    content = part.read_bytes()
    last = content.rstrip(b"\n").rpartition(b"\n")[2]
    part.write_bytes(content[: -min(cut, len(last))])
    found = results(tmp_path)
    assert set(found.done) == {0, 1, 2, 3}
    found.add(record(4, 0.5))  # goes into a file of its own, not behind the torn line
    assert results(tmp_path).done[4].score == 0.5 and len(list(tmp_path.glob("9.part-*"))) == 2


def test_the_parts_of_all_hosts_become_one_file_in_order(tmp_path):
    hosts = [added(tmp_path, range(host, 7, 3), host) for host in range(3)]
    hosts[0].read_again()
    assert sorted(hosts[0].done) == list(range(7))
    hosts[0].finish()
    assert [path.name for path in tmp_path.iterdir()] == ["9.jsonl"]
    header, found = records.read(tmp_path / "9.jsonl")
    assert header == json.loads(json.dumps(HEADER)) and [r.number for r in found] == list(range(7))
    before = (tmp_path / "9.jsonl").stat().st_mtime_ns
    again = results(tmp_path, date="2026-02-02", version="2")  # another day is no other run
    assert len(again.done) == 7
    again.finish()
    assert (tmp_path / "9.jsonl").stat().st_mtime_ns == before


def test_results_of_another_model_are_kept_and_not_taken(tmp_path):
    added(tmp_path, range(3)).finish()
    added(tmp_path, range(2), model="b")
    other = results(tmp_path, model="c")
    assert not other.done
    moved, back = records.make_room(tmp_path, "9", HEADER | {"model": "c"})
    assert sorted(moved) == [str(tmp_path / "older" / name) for name in ("9-1.jsonl", "9.part-0-0-1.jsonl")]
    assert len(records.read(moved[0])[1]) == 3 and back == []
    assert records.make_room(tmp_path, "9", HEADER | {"model": "c"}) == ([], []) and not results(tmp_path).done


def test_results_that_were_put_aside_are_taken_up_again_by_who_asks_in_their_way(tmp_path):
    """Whole files and parts, over and over: a look at another split or at a few questions costs nothing."""
    added(tmp_path, range(3)).finish()
    added(tmp_path, range(3, 5))
    for turn in range(3):
        for header in ({"model": "b"}, {}):
            made = HEADER | header
            moved, back = records.make_room(tmp_path, "9", made)
            assert moved and bool(back) == (turn > 0 or not header)
            found = results(tmp_path, **header)
            assert sorted(found.done) == (list(range(5)) if not header else [9] if turn else [])
            found.add(record(9, 1.0) if header else record(4, 1.0))
            found.finish()
            assert [path.name for path in tmp_path.glob("9*")] == ["9.jsonl"]
    assert len(records.read(tmp_path / "9.jsonl")[1]) == 5


def test_a_file_of_something_else_is_moved_aside(tmp_path):
    (tmp_path / "9.jsonl").write_bytes(b"\xff\xfe\x00")
    assert records.make_room(tmp_path, "9", HEADER) == ([str(tmp_path / "older" / "9-1.jsonl")], [])


def test_scales_do_not_read_each_other(tmp_path):
    added(tmp_path, range(3))
    assert not Results(tmp_path, "36", HEADER).done and not Results(tmp_path, "auto", HEADER).done


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its first line is no header of one"),
        (b'{"task": "digits"}\n', "its first line is no header of one"),
        (b"[1]\n", "its first line is no header of one"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b'{"format": 1, "task": "x"}\n{"number": 0}\n', "line 2: it is damaged"),
        (b'{"format": 1, "task": "x"}\n[]\n', "line 2: it is damaged"),
        (b'{"format": 1, "task": "x"}\nnot json\n', "line 2: it is damaged"),
    ],
)
def test_what_is_no_result_file_is_refused_by_name_and_line(tmp_path, content, message):
    (tmp_path / "9.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"9\.jsonl.*{message}"):
        records.read(tmp_path / "9.jsonl")


def test_a_file_that_is_not_there_is_said_with_where_they_are_written(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no result file .*; `lmm evaluate --out DIR` writes them to DIR/eval"
    ):
        records.read(tmp_path / "9.jsonl")
