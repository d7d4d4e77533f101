"""Files of rows: every layout that is read, at any chunk size, and those that are named instead."""

import collections
import gzip
import io
import json
import re
import sys
import tracemalloc

import pytest

from lmm_jax.data.prepare import layouts
from lmm_jax.data.prepare.layouts import open_rows, read_items
from lmm_jax.data.prepare.parse import parse_row
from lmm_jax.data.prepare.refused import Refused

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
SAID = [{"role": "user", "content": "hi [x] {y}"}, {"role": "assistant", "content": "ho ☃"}]
ROWS = [{"id": f"row{n}", "messages": SAID, "nested": {"a": [n, {"b": "]}"}]}} for n in range(5)]


def cutting(f):
    """Yields `(line, text)` of each value of a text file."""
    cutter = layouts._layout(f)
    f.seek(0)
    for _, line, row in cutter(f, collections.Counter()):
        yield line, row


def cut(text):
    return list(cutting(io.StringIO(text)))


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_are_cut_alike_at_any_chunk_size(monkeypatch, indent):
    text = "\n " + json.dumps(VALUES, indent=indent, ensure_ascii=False) + " \n"
    expected = cut(text)
    assert [json.loads(value) for _, value in expected] == VALUES
    lines = text.splitlines()
    assert all(value.splitlines()[0] in lines[line - 1] for line, value in expected)
    for size in range(1, len(text) + 1):
        monkeypatch.setattr(layouts, "CHUNK", size)
        assert cut(text) == expected


def test_an_array_that_breaks_off_anywhere_gives_what_came_before_and_is_an_error(monkeypatch):
    text = json.dumps(VALUES, indent=1)
    whole = cut(text)
    for size in (1, 3, 64):
        monkeypatch.setattr(layouts, "CHUNK", size)
        for end in range(1, len(text)):
            found = []
            with pytest.raises(Refused, match="broken JSON: the array breaks off"):
                _collect(text[:end], found)
            assert found == whole[: len(found)]
            assert text[:end].count("\n") + 1 >= max([line for line, _ in found], default=1)


def _collect(text, found):
    for item in cutting(io.StringIO(text)):
        found.append(item)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}\n{"a": 2}]', "breaks off in the value at line 2: .*','"),
        ('[{"a": 1},\n{"a" 2},\n{"a": 3}]', "breaks off in the value at line 2: .*':'"),
        ('[{"a": 1},\n\n]', "breaks off in the value at line 3"),
        ('[{"a": 1}, a {"a": 2}]', "breaks off in the value at line 1: a word or sign"),
        ('[{"a": 1} o {"a": 2}]', "breaks off in the value at line 1: a word or sign"),
        ("[,]", "breaks off in the value at line 1"),
        ("[}", "breaks off in the value at line 1"),
        ('[{"a": 1}]\n{"a": 2}', "something follows the array's end at line 1"),
        ('[{"a": "never closed},\n{"a": 2}]', "breaks off in the value at line 1"),
        ("[" * 100_000, "breaks off in the value at line 1: the file ends"),
        (f'[1,\n{{"a": {"1" * 5_000}}}]', "breaks off in the value at line 2: a number of more than"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(text, problem):
    with pytest.raises(Refused, match=problem):
        cut(text)


def test_a_string_without_end_does_not_read_the_whole_file(monkeypatch):
    monkeypatch.setattr(layouts, "CHUNK", 16)
    monkeypatch.setattr(layouts, "MAX_ROW", 64)
    for head, rest in (('[{"a": "', "x"), ('[{"a": "', "x}, {y}, "), ('["', "x, "), ("[1", "1"), ('{"a": "', "x")):
        f = io.StringIO(head + rest * 10_000)
        with pytest.raises(Refused, match="broken JSON: .* more than 64 characters"):
            list(cutting(f))
        assert f.tell() < 500


def test_what_a_string_without_end_takes_of_memory_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(layouts, "CHUNK", 1 << 16)
    monkeypatch.setattr(layouts, "MAX_ROW", 1 << 20)
    path = tmp_path / "rows.json"
    path.write_text('[{"a": "' + "never closed}, {and on " * 1_000_000)
    with open_rows(path) as f:
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
        b'{"messages": %s, "id": null, "id": "NaN, Infinity"}' % said,
        b'{"messages": %s, "id": "\xff"}' % said,
        b'{"messages": %s, "id": "\\ud800"}' % said,
        b"[" * 3_000 + b"]" * 3_000,
        b'{"messages": %s}' % said,
    ]
    path.write_bytes(b"[" + b",\n".join(given) + b"]")
    with open_rows(path) as f:
        found = [(line, _parsed(text, line)) for _, line, text in read_items(f)]
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
    assert [(line, value.strip()) for line, value in cut(text)] == [
        (1, '{"id": 1}'),
        (3, "not json"),
        (4, '{"id": 2}'),
    ]
    assert cut(" [ ] ") == cut("") == []


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = tmp_path / "rows.json"
    for text in ('[{"a": 1}]', '{"a": 1}\n'):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        with open_rows(path) as f:
            assert [json.loads(value) for _, _, value in read_items(f)] == [{"a": 1}]


def read(path):
    """Splits, lines and rows, parsed, of a file."""
    with open_rows(path) as f:
        return [(split, line, json.loads(row) if isinstance(row, str) else row) for split, line, row in read_items(f)]


def printed(rows, indent=1):
    return json.dumps(rows, indent=indent, ensure_ascii=False)


LAYOUTS = {  # texts that hold `ROWS`, and the split that each row is of
    "array": (json.dumps(ROWS), [None] * 5),
    "pretty array": ("\n\n" + printed(ROWS), [None] * 5),
    "lines": ("\n".join(map(json.dumps, ROWS)), [None] * 5),
    "lines with blank ones between": ("\n\n".join(map(json.dumps, ROWS)) + "\n", [None] * 5),
    "lines of one row": (json.dumps(ROWS[0]) + "\n", [None]),
    "pretty rows": ("\n".join(map(printed, ROWS)), [None] * 5),
    "one pretty row": (printed(ROWS[0]), [None]),
    "rows in one line": (" ".join(map(json.dumps, ROWS)), [None] * 5),
    "a split": (json.dumps({"train": ROWS}), ["train"] * 5),
    "a pretty split": (printed({"train": ROWS}), ["train"] * 5),
    "splits": (
        printed({"train": ROWS[:2], "val": ROWS[2:3], "test": ROWS[3:]}),
        ["train"] * 2 + ["validation"] + ["test"] * 2,
    ),
    "an empty split": (json.dumps({"dev": [], "test": ROWS}), ["test"] * 5),
    "another split": (json.dumps({"minival": ROWS}), ["minival"] * 5),
    "a list of a name that says nothing": (printed({"data": ROWS}), [None] * 5),
    "conversations of rows": (printed({"conversations": ROWS}), [None] * 5),
    "a title before": (printed({"version": "1.0", "info": {"x": [1]}, "data": ROWS, "n": 5}), [None] * 5),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_its_rows_and_their_splits(name, tmp_path, monkeypatch):
    text, splits = LAYOUTS[name]
    path = tmp_path / "rows.json"
    path.write_text(text)
    found = read(path)
    assert [(split, row) for split, _, row in found] == list(zip(splits, ROWS, strict=False))
    lines = text.splitlines()
    assert all("{" in lines[line - 1] for _, line, _ in found)
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(layouts, "CHUNK", size)
        assert read(path) == found


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_layout_may_be_encoded_and_compressed(encoding, pack, tmp_path):
    path = tmp_path / "rows"
    for text, splits in LAYOUTS.values():
        path.write_bytes(pack(text.encode(encoding)))
        assert [(split, row) for split, _, row in read(path)] == list(zip(splits, ROWS, strict=False))


def test_what_a_file_holds_beside_its_lists_is_counted(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(LAYOUTS["a title before"][0])
    with open_rows(path) as f:
        assert len(list(read_items(f))) == 5 and f.ignored == {"file.version": 1, "file.info": 1, "file.n": 1}


def test_the_first_line_alone_does_not_say_what_the_others_are(tmp_path):
    """A first line that is broken is one bad row of JSON lines; a row may hold a list of objects before its turns."""
    path, rows = tmp_path / "rows.json", [json.dumps({"objects": [{"box": [1]}], "tags": [], **row}) for row in ROWS]
    path.write_text("\n".join(rows))
    assert [row["id"] for _, _, row in read(path)] == [row["id"] for row in ROWS]
    for broken in ('{"id": 1, "messages": [', '{"id": 1}}', '{"a": "never closed}', "not json", "{broken"):
        path.write_text("\n".join([broken, *rows]))
        with open_rows(path) as f:
            found = list(read_items(f))
        assert [line for _, line, _ in found] == [1, 2, 3, 4, 5, 6] and found[0][2].strip() == broken


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (printed({"train": ROWS})[:-1], "the file breaks off in the value at line .*: the file ends"),
        (printed({"train": ROWS})[:-40], "the file breaks off in the value at line .*: the file ends"),
        (printed({"train": ROWS}) + "{}", "something follows the file's end"),
        (printed(ROWS[0]) + printed(ROWS[1])[:-9], "the file breaks off in the value at line"),
        (printed(ROWS[0]) + ",\n" + printed(ROWS[1]), "the file breaks off in the value at line"),
        (printed({"train": ROWS, "a b": ROWS}), "no split: the list 'a b' at line .*known are train"),
    ],
)
def test_what_is_wrong_with_other_layouts_is_said(text, problem, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(Refused, match=problem), open_rows(path) as f:
        list(read_items(f))


def test_a_file_whose_bytes_break_off_is_an_error(tmp_path):
    path, text = tmp_path / "rows", "\n".join(map(json.dumps, ROWS * 1000))
    for data, problem in (
        (gzip.compress(text.encode())[:-20], "broken gzip .*copy the file anew"),
        (gzip.compress(text.encode())[:-8] + bytes(8), "broken gzip"),
        (text.encode("utf-16")[:-1], "not UTF-16-LE, as it begins"),
    ):
        path.write_bytes(data)
        with pytest.raises(Refused, match=problem), open_rows(path) as f:
            for _ in read_items(f):
                assert 0 < f.position() <= f.size
    path.write_bytes(gzip.compress(b"x")[:8])
    with pytest.raises(ValueError, match="rows is broken gzip"):
        open_rows(path)


FOREIGN = {
    "zip": (b"PK\x03\x04" + bytes(30), "a zip archive.*unpack it"),
    "tar": (b"rows.json" + bytes(248) + b"ustar\x0000" + bytes(600), "a tar archive; unpack it"),
    "tar.gz": (gzip.compress(b"rows.json" + bytes(248) + b"ustar\x0000" + bytes(600)), "gzip around a tar archive"),
    "xz": (b"\xfd7zXZ\0" + bytes(20), "compressed by xz; unpack it"),
    "bz2": (b"BZh91AY&SY" + bytes(20), "compressed by bzip2; unpack it"),
    "zst": (b"\x28\xb5\x2f\xfd" + bytes(20), "compressed by zstd; unpack it"),
    "arrow": (b"ARROW1\0\0" + bytes(20), "an Arrow file; .*to_parquet"),
    "arrow stream": (b"\xff\xff\xff\xff" + bytes(20), "an Arrow stream; .*to_parquet"),
    "xlsx": (b"PK\x03\x04" + bytes(26) + b"[Content_Types].xml", "a workbook of Excel .*; write its rows as JSON"),
    "xlsx by others": (b"PK\x03\x04" + bytes(26) + b"docProps/app.xml", "a workbook of Excel"),
    "ods": (b"PK\x03\x04" + bytes(26) + b"mimetype", "an OpenDocument table"),
    "gz gz": (gzip.compress(gzip.compress(b"[]")), "gzip around gzip once more; unpack it"),
    "zeros": (bytes(5_000), "nothing but zeros where it begins"),
    "js": (b'const rows = [{"id": 1, "image": "a.jpg"}]', "no JSON: it begins with 'const rows"),
    "commented": (b"/* mine */\n[]", "JSON with comments"),
    "json5": (b"// mine\n// too\n[]", "JSON with comments"),
    "null": (b"null", "JSON that holds null where rows are expected"),
    "number": (b"5\n6\n", "JSON that holds numbers where"),
    "texts": (b'"{\\"id\\": 1}"\n', "JSON that holds texts where rows are expected, which are objects"),
    "pickle": (b"\x80\x04\x95" + bytes(20), "a pickle, which is not opened"),
    "npy": (b"\x93NUMPY\x01\0" + bytes(20), "a NumPy array"),
    "sqlite": (b"SQLite format 3\0" + bytes(20), "an SQLite database"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a picture, .*--images"),
    "jpg": (b"\xff\xd8\xff\xe0" + bytes(20), "a picture, .*--images"),
    "mp4": (b"\0\0\0\x20ftypisom" + bytes(20), "a film"),
    "csv": (b"id,image,question\n1,a.jpg,what?\n", "a table as text"),
    "tsv": (b"id\timage\tquestion\n1\ta.jpg\twhat?\n", "a table as text"),
    "html": (b"<!DOCTYPE html>\n<html>", "a web page, .*direct link"),
    "xml": (b'<?xml version="1.0"?>\n', "XML"),
    "yaml": (b"- id: 1\n  image: a.jpg\n", "YAML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS, .*git lfs pull"),
    "python": (b"rows = [1]\n", "no JSON: it begins with 'rows = "),
    "bytes": (bytes(range(128, 256)) * 4, "no JSON: it begins with"),
    "utf16": ("id\n1".encode("utf-16") + b"\0", "not UTF-16-LE, as it begins"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_file_is_named_in_one_sentence(name, tmp_path):
    data, what = FOREIGN[name]
    path = tmp_path / f"rows.{name}"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is {what}") as error:
        open_rows(path)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name one file"):
        open_rows(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_rows(tmp_path / "rows.json")


IMAGE = {"bytes": b"\x89PNG", "path": "a.png"}
TABLES = {  # columns as tables hold rows, each of two
    "conversations": [
        [{"from": "human", "value": "hi", "weight": None}],
        [{"from": "human", "value": "ho", "weight": 1.0}],
    ],
    "image": [IMAGE, None],
    "images": [[IMAGE, {"bytes": None, "path": "b.png"}], None],
    "names": [["a.png", None], []],
    "raw": [b"\xff\xd8", None],
    "id": ["a", None],
    "n": [1, None],
}


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)


def test_parquet_gives_rows_as_they_were_written(tmp_path):
    write_parquet(tmp_path / "rows.parquet", TABLES)
    found = read(tmp_path / "rows.parquet")
    expected = [dict(zip(TABLES, row, strict=True)) for row in zip(*TABLES.values(), strict=True)]
    assert found == [(None, 1, expected[0]), (None, 2, expected[1])]


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path):
    """Also where all rows, with their pictures, are of one group; of its pages each has to be read whole."""
    count, size = 256, 1 << 18
    pictures = [n.to_bytes(2, "big") * (size // 2) for n in range(count)]
    pages = {"write_batch_size": 8, "data_page_size": size, "use_dictionary": False}
    write_parquet(tmp_path / "rows", {"image": pictures}, compression="none", **pages)
    import pyarrow

    with open_rows(tmp_path / "rows") as f:
        before, most, positions = pyarrow.total_allocated_bytes(), 0, []
        for n, (_, number, row) in enumerate(read_items(f), start=1):
            assert number == n and row["image"] == pictures[n - 1]
            most = max(most, pyarrow.total_allocated_bytes() - before)
            positions.append(f.position())
        assert positions == sorted(positions) and positions[-1] == f.size
    assert most < count * size / 4


def test_columns_of_any_type_are_read(tmp_path):
    """Those that Python has no exact value for too, also inside of turns."""
    pa = pytest.importorskip("pyarrow")
    when = pa.array([1, None], pa.timestamp("ns"))
    turn = pa.StructArray.from_arrays([pa.array(["hi", "ho"]), when], ["content", "time"])
    columns = {
        "ns": when,
        "far": pa.array([2**62, 1], pa.timestamp("us")),
        "zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Phobos")),
        "date": pa.array([1, 2**31 - 1], pa.date32()),
        "time": pa.array([1, 2], pa.time64("ns")),
        "short": pa.array([1, 2], pa.time32("s")),
        "long": pa.array([1, 2**62], pa.duration("ns")),
        "decimal": pa.array([1, 2]).cast(pa.decimal128(30, 2)),
        "messages": pa.ListArray.from_arrays([0, 1, 2], turn),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "big": pa.array([2**63, 1], pa.uint64()),
        "large": pa.array(["a", "b"], pa.large_string()),
        "names": pa.array([["a"], ["b"]], pa.large_list(pa.string())),
        "dictionary": pa.array(["a", "a"]).dictionary_encode(),
    }
    write_parquet(tmp_path / "rows.parquet", columns)
    (_, _, first), (_, _, second) = read(tmp_path / "rows.parquet")
    assert first["messages"] == [{"content": "hi", "time": 1}] and second["messages"][0]["time"] is None
    assert (first["ns"], first["far"], first["decimal"], second["date"]) == (1, 2**62, "1.00", 2**31 - 1)
    assert (second["large"], second["names"], second["dictionary"], first["big"]) == ("b", ["b"], "a", 2**63)


def test_two_columns_of_one_name_are_an_error(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table([["a.jpg"], ["b.jpg"]], names=["image", "image"]), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="is a table with two columns 'image'"):
        open_rows(tmp_path / "rows.parquet")


def test_marks_and_commas_where_files_were_put_together_are_no_part_of_a_row(tmp_path):
    given = [{"n": n, "text": "ends, with a comma,"} for n in range(4)]
    lines = [json.dumps(item) for item in given]
    for text in (
        "\n\ufeff".join(lines),
        "\ufeff\ufeff" + "\n".join(lines),
        ",\n".join(lines),
        ",\r\n".join(lines) + ",\r\n",
        "[" + ",\n\ufeff".join(lines) + "\ufeff]",
    ):
        path = tmp_path / "rows"
        path.write_bytes(text.encode("utf-8"))
        assert [row for _, _, row in read(path)] == given


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},]', "a value is missing; is there a comma too many"),
        ('[{"a": 1,}]', "a key is missing; is there a comma too many"),
        ("[{'a': 1}]", "double quotes, near .*'a'"),
        ('[{"a": None}]', "a word or sign that JSON does not have.*near.*None"),
        ('[{"a": 1} // mine\n]', "a comment, which JSON does not have"),
    ],
)
def test_what_is_near_a_break_is_shown(text, problem, tmp_path):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(Refused, match=f"breaks off in the value at line 1: .*{problem}"):
        read(tmp_path / "rows")


def test_broken_parquet_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    write_parquet(path, TABLES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="rows.parquet is a broken Parquet file .*anew"):
        open_rows(path)
    write_parquet(path, {"image": [bytes([n]) * 5000 for n in range(99)]}, compression="snappy")
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + b"\xff" * 2000 + whole[2200:])
    with pytest.raises(Refused, match="broken Parquet: after row"), open_rows(path) as f:
        list(read_items(f))
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="Parquet file inside of gzip"):
        open_rows(path)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"which pyarrow reads: pip install 'lmm_jax\[parquet\]'"):
        open_rows(path)
