"""Preparing conversations: what is stored, what is refused and why, and what a kill leaves."""

import errno
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lmm_jax import lock
from lmm_jax.data.conversation import encode
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepare import records, summary, survey
from lmm_jax.data.prepare.datasets import digits
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from tests.opened import open_packs

DIGITS = "the tokenizer of the digits"
ROOT = pathlib.Path(__file__).parents[3]

REFUSED = [  # what to write as a row, reason
    ("{broken", "broken JSON"),
    ({"image": "missing.jpg"}, "missing picture"),
    ({"image": "circle0.png/a.jpg"}, "missing picture"),
    ({"image": "empty.jpg"}, "empty picture file"),
    ({"image": "text.jpg"}, "unreadable picture"),
    ({"image": "folder.jpg"}, "unreadable picture"),
    ({"image": "pipe.jpg"}, "unreadable picture"),
    ({"image": "truncated.jpg"}, "truncated picture"),
    ({"image": "truncated.png"}, "truncated picture"),
    ({"image": "large.png"}, "picture too large"),
    ({"image": "bomb.png"}, "picture too large"),
    ({"image": "../secret.png"}, "picture name leads out of the folder"),
    ({"image": "/etc/hosts"}, "absolute picture name outside the folder"),
    ({"image": "link.png"}, "link that leads out of the folder"),
    ({"image": "https://example.org/a.png"}, "picture name is a URL"),
    ({"image": ["circle0.png", "circle1.png"]}, "tags do not match pictures"),
    ({"image": None}, "tags do not match pictures"),
    ({"turns": [("human", "what?"), ("gpt", "a circle")]}, "tags do not match pictures"),
    ({"turns": [("human", "what?"), ("gpt", "<image>")]}, "tags do not match pictures"),
    ({"turns": [("human", "<image>"), ("tool", "a circle")]}, "tool call"),
    ({"turns": [("human", "<image>"), ("gpt", " \n")]}, "empty answer"),
    ({"turns": [("gpt", "<image>"), ("human", "a circle")]}, "roles out of turn"),
    ({"turns": [("human", "<image>\nwhat?")]}, "nothing supervised"),
    ({"turns": [("system", "be brief")], "image": None}, "no conversation"),
]


def row(id, image="circle0.png", turns=(("human", "<image>\nwhat is it?"), ("gpt", "a circle"))):
    item = {"id": id, "conversations": [{"from": role, "value": text} for role, text in turns]}
    return item if image is None else {**item, "image": image}


def good(n):
    """Row `n` of different numbers of pictures and turns."""
    count = n % 3
    asked = [("human", "<image>" * count + f"question {n}"), ("gpt", f"answer {n} " * (1 + n % 4))] * (1 + n % 2)
    asked = [(role, text.replace("<image>", "") if i > 1 else text) for i, (role, text) in enumerate(asked)]
    return row(f"row-{n}", [f"circle{(n + i) % 4}.png" for i in range(count)] or None, asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of drawn pictures, sound and otherwise."""
    folder = tmp_path_factory.mktemp("source") / "images"
    folder.mkdir()
    for n in range(4):
        picture = Image.new("RGB", (40 + n, 30), "white")
        ImageDraw.Draw(picture).ellipse((5, 5, 20 + n, 20), fill="blue")
        picture.save(folder / f"circle{n}.png")
    noise = Image.effect_noise((200, 100), 50).convert("RGB")
    for name in ("truncated.jpg", "truncated.png"):
        noise.save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:-3000])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    Image.new("1", (8100, 8000)).save(folder / "large.png")
    small = (folder / "circle0.png").read_bytes()  # its header, at 16, says how large it is
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    (folder / "bomb.png").write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
    shutil.copy(folder / "circle0.png", folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


def write(folder, items, name="rows.jsonl"):
    path = folder / name
    lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
    path.write_text("\n".join(lines) if name.endswith("l") else json.dumps(items, indent=1))
    return path


def contents(folder):
    """Everything in a prepared folder: files as bytes, records in order."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    data = Prepared(folder, "train")
    records = [(data[i]["id"], list(data[i]["images"]), as_turns(data[i])) for i in range(len(data))]
    return files, records


def refusals(folder):
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]


def test_rows_are_stored_in_source_order_with_their_index(folder, tmp_path):
    items = [good(n) for n in range(40)]
    path = write(folder, items)
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    data = Prepared(tmp_path / "out", "train")
    assert counts["rows"] == len(data) == 40 and counts["refused"] == {} and refusals(tmp_path / "out") == []
    sizes, tokens = [], []
    for n, item in enumerate(items):
        assert data[n]["id"].decode() == item["id"]
        names = item.get("image", [])
        assert list(data[n]["images"]) == [(folder / name).read_bytes() for name in names]
        asked = [({"human": "user", "gpt": "assistant"}[t["from"]], t["value"]) for t in item["conversations"]]
        assert [turn[:2] for turn in as_turns(data[n])] == asked
        sizes += [picture.size for picture in as_pictures(data[n])]
        encoded = encode(asked, data.tokenizer, "vicuna_v1")
        tokens.append(len(encoded.ids) - encoded.images)
    index = data.index
    assert index["image_sizes"].tolist() == [list(size) for size in sizes]
    assert index["turn_tokens"][index["turn_offsets"][1:] - 1].tolist() == tokens
    assert counts["images"] == len(sizes) and counts["tokens"]["longest"] == max(tokens)
    assert counts["tokens"]["mean"] == round(np.mean(tokens), 1) and counts["pictures"] == {"0": 14, "1": 13, "2": 13}
    assert data.tokenizer.decode(data.tokenizer.encode("never seen ☃")) == "never seen ☃"


def test_layouts_and_worker_counts_give_the_same(folder, tmp_path):
    items = [good(n) for n in range(100)]
    roles = {"human": "user", "gpt": "assistant"}
    others = [
        {
            "id": item["id"],
            "images": item.get("image"),
            "messages": [{"role": roles[t["from"]], "content": t["value"]} for t in item["conversations"]],
        }
        for item in items
    ]
    found = []
    for workers, path in (
        (0, write(folder, items, "a.jsonl")),
        (0, write(folder, others, "a.json")),
        (2, write(folder, items, "b.jsonl")),
    ):
        out = tmp_path / f"{path.name}-out"
        prepare.prepare_rows(path, folder, out, workers=workers)
        files, records = contents(out)
        about = json.loads(files.pop("prepared.json"))
        found.append((files, records, about["fingerprint"], about["splits"]))
    assert found[0] == found[1] == found[2]


def test_bad_rows_are_refused_by_file_line_id_and_reason(folder, tmp_path):
    bad = [item if isinstance(item, str) else row(f"bad-{n}", **item) for n, (item, _) in enumerate(REFUSED)]
    path = write(folder, [good(0), *bad, "", good(1)])
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0, max_refused=1)
    found = refusals(tmp_path / "out")
    assert [entry["reason"] for entry in found] == [reason for _, reason in REFUSED]
    assert [entry["line"] for entry in found] == list(range(2, len(bad) + 2))
    assert [entry["id"] for entry in found] == ["", *(f"bad-{n}" for n in range(1, len(bad)))]
    assert {entry["file"] for entry in found} == {str(path)} and all(entry["detail"] for entry in found)
    reasons = [reason for _, reason in REFUSED]
    assert counts["refused"] == {reason: reasons.count(reason) for reason in reasons} and counts["rows"] == 2
    assert Prepared(tmp_path / "out", "train")[1]["id"] == b"row-1"
    assert "1 empty answer" in summary.report(tmp_path / "out", counts)


def test_kinds_of_questions_are_kept(folder, tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    own = [said[0] | {"kind": "count"}, said[1], said[0] | {"kind": None}, said[1] | {"kind": 3}]
    items = [{"messages": own, "kind": "any"}, {"messages": own}, {"messages": said, "kind": None}]
    items += [{"messages": said, "kind": ["a"]}]
    given = {"workers": 0, "max_refused": 0.3}
    counts = prepare.prepare_rows(write(folder, items), None, tmp_path / "out", **given)
    data = Prepared(tmp_path / "out", "train")
    found = [[kind.decode() for kind in data[n]["turns"]["kind"]] for n in range(3)]
    assert found == [["count", "any", "any", "3"], ["count", "", "", "3"], ["", ""]]
    assert counts["refused"] == {"kind is no name": 1}


def test_weights_reach_the_index_and_the_packs(folder, tmp_path, tiny):
    """Of a conversation of three answers, one at a time and all but one are out of the loss."""
    asked = [(role, text) for n in range(3) for role, text in (("human", f"question {n}"), ("gpt", f"answer {n}"))]
    items = []
    for n in range(6):
        items.append(row(f"row-{n}", None, asked))
        for turn in items[n]["conversations"][1::2]:
            turn["weight"] = int((turn["value"] == f"answer {n % 3}") == (n >= 3))
    items.append(row("silent", None, asked))
    for turn in items[-1]["conversations"]:
        turn["weight"] = 0
    counts = prepare.prepare_rows(write(folder, items), None, tmp_path / "out", template="qa", workers=0)
    assert counts["rows"] == 6 and counts["refused"] == {"nothing supervised": 1}
    data = Prepared(tmp_path / "out", "train")
    ends = np.diff(data.index["turn_offsets"])
    assert ends.tolist() == [2, 2, 2, 1, 1, 1]
    in_loss = [[turn.in_loss for turn in as_turns(data[n])][1::2] for n in range(6)]
    assert in_loss == [[(k == n % 3) == (n >= 3) for k in range(3)] for n in range(6)]
    whole = encode([tuple(turn) for turn in as_turns(data[3])], data.tokenizer, "qa")
    for length in (whole.turn_ends[-1], 64):
        lengths = f"data.length={length}", f"data.targets={length}", "data.max_left_out=1.0"
        config = tiny("model.decoder.vocab_size=512", f"data.path={tmp_path / 'out'}", *lengths)
        with config.unlocked():
            config.data.update(rows=1, views=0, targets=None, too_long="cut")
        packs = open_packs(config, "train", packs_per_step=1, shuffle=False)
        # A record fits if its first answer that is trained on does.
        assert [record for _, record in packs.left_out] == ([0, 4, 5] if length < 64 else [])
        for position in range(packs.stream._end(0)):
            pack = packs[position]
            planned = sum(int(packs.datasets[0].counts.supervised[record]) for _, record in packs.members(position))
            assert not pack["faults"] and (pack["group"] > 0).sum() == planned > 0


def test_a_table_with_pictures_gives_what_a_file_of_names_gives(folder, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    items = [{**good(n), "source": "web", "image": good(n).get("image", [])} for n in range(30)]
    prepare.prepare_rows(write(folder, items), None, tmp_path / "names", workers=0)

    def held(name, n):
        return {"bytes": None, "path": name} if n % 2 else {"bytes": (folder / name).read_bytes(), "path": None}

    table = [{**item, "image": [held(name, n) for name in item["image"]]} for n, item in enumerate(items)]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "rows.parquet")
    counts = prepare.prepare_rows(folder / "rows.parquet", None, tmp_path / "table", workers=2)
    assert counts["ignored"] == {"row.source": 30}
    assert "ignored keys: row.source 30" in summary.report(tmp_path / "table", counts)
    (a, found), (b, expected) = contents(tmp_path / "table"), contents(tmp_path / "names")
    assert found == expected
    assert json.loads(a["prepared.json"])["fingerprint"] == json.loads(b["prepared.json"])["fingerprint"]


def test_a_file_of_another_kind_is_refused_before_anything_is_written(folder, tmp_path):
    (tmp_path / "rows.zip").write_bytes(b"PK\x03\x04" + bytes(30))
    with pytest.raises(ValueError, match="rows.zip is a zip archive"):
        prepare.prepare_rows(tmp_path / "rows.zip", folder, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_links_are_followed_where_it_is_asked_for(folder, tmp_path):
    path = write(folder, [row("a", "link.png"), row("b")])
    assert prepare.prepare_rows(path, None, tmp_path / "a", workers=0)["rows"] == 1
    assert prepare.prepare_rows(path, None, tmp_path / "b", workers=0, follow_links=True)["rows"] == 2


def test_templates_refuse_rows_they_have_no_place_for(folder, tmp_path):
    caption = (("human", "<image>"), ("gpt", "a circle"))
    items = [row("a", turns=caption), row("b", turns=caption * 2), row("c", None, turns=caption[1:])]
    given = {"template": "plain", "workers": 0, "max_refused": 0.7}
    counts = prepare.prepare_rows(write(folder, items), None, tmp_path / "out", **given)
    assert counts["rows"] == 1 and counts["refused"] == {"does not fit the template": 1, "roles out of turn": 1}


def test_too_many_refused_rows_stop_the_run(folder, tmp_path):
    items = [row(str(n), None, (("human", "hi"), ("gpt", "ho" if n % 10 else ""))) for n in range(1500)]
    path = write(folder, items)
    with pytest.raises(ValueError, match=r"rows.jsonl: 100 of the first 1,000 rows .*0.05.*100 empty answer"):
        prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "prepared.json").exists()
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0, max_refused=0.11)
    assert counts["rows"] == 1350 and counts["refused"] == {"empty answer": 150}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "rows.json: no row can be used: it has none"),
        ("[]", "rows.json: no row can be used: it has none"),
        (
            "[1, 2]",
            "no row can be used: 2 not an object; the first is line 1: not an object: it is a number",
        ),
        (json.dumps({"messages": 3}), "no row can be used: 1 no conversation; the first is line 1"),
        (json.dumps([good(0)])[:-1], "rows.json: broken JSON: the array breaks off"),
        (json.dumps(row("a", "missing.png")), "no row can be used: 1 missing picture"),
    ],
)
def test_files_without_usable_rows_are_errors(folder, tmp_path, text, problem):
    path = folder / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_a_finished_folder_stays_and_one_of_other_data_is_refused(folder, tmp_path, capsys, digits_folder):
    out = tmp_path / "out"
    path = write(folder, [good(n) for n in range(5)])
    first = prepare.prepare_rows(path, None, out, workers=0)
    before = (out / "prepared.json").stat().st_mtime_ns
    assert prepare.prepare_rows(path, None, out, workers=0) == first
    assert (out / "prepared.json").stat().st_mtime_ns == before and "left as it is" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="template was vicuna_v1, is qa"):
        prepare.prepare_rows(path, None, out, template="qa", workers=0)
    with pytest.raises(FileExistsError, match="tokenizer was trained on the first rows, is "):
        prepare.prepare_rows(path, None, out, tokenizer=digits_folder / "tokenizer.model", workers=0)
    write(folder, [good(n) for n in range(6)])
    with pytest.raises(FileExistsError, match="what rows.jsonl holds has changed"):
        prepare.prepare_rows(path, None, out, workers=0)
    with pytest.raises(FileExistsError, match="dataset was digits"):
        prepare.prepare_rows(path, None, digits_folder, workers=0)


def test_files_of_others_are_never_deleted(folder, tmp_path):
    path = write(folder, [good(0)])
    (tmp_path / "tokenizer.model").write_text("mine")
    with pytest.raises(FileExistsError, match="tokenizer.model"):
        prepare.prepare_rows(path, None, tmp_path, workers=0)
    (tmp_path / "preparing.json").write_text("{}")
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="thesis.tex"):
        prepare.prepare_rows(path, None, tmp_path, workers=0)
    assert (tmp_path / "tokenizer.model").read_text() == "mine"


KILLED = """
import multiprocessing, os, signal, sys
from lmm_jax.data.prepare import folder as prepare

def items_of(f, path, original=prepare.items_of):
    for n, item in enumerate(original(f, path)):
        if n == 300 and multiprocessing.active_children():  # the first time, rows are only looked at
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

if __name__ == "__main__":
    data, out, tokenizer = sys.argv[1:]
    prepare.items_of = items_of
    prepare.prepare_rows(data, None, out, tokenizer, workers=2)
"""


def test_after_a_kill_the_same_command_gives_the_same(folder, tmp_path, monkeypatch, digits_folder):
    tokenizer = digits_folder / "tokenizer.model"
    path = write(folder, [good(n) if n % 50 else row(str(n), "missing.png") for n in range(600)])
    prepare.prepare_rows(path, None, tmp_path / "whole", tokenizer, workers=0)
    expected, out = contents(tmp_path / "whole"), tmp_path / "out"

    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, script, path, out, tokenizer]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL and not (out / "prepared.json").exists()
    workers = [int(pid) for pid in killed.stdout.split()]
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(_runs(pid) for pid in workers)
    assert (out / "preparing.json").exists() and list((out / "records").rglob("*array_record*"))

    def dying(f, path, original=prepare.items_of):
        for n, item in enumerate(original(f, path)):
            if n == 300 and multiprocessing.active_children():
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "items_of", dying)
        with pytest.raises(ChildProcessError, match="a worker process died"):
            prepare.prepare_rows(path, None, out, tokenizer, workers=2)
    assert not (out / "prepared.json").exists() and not multiprocessing.active_children()

    prepare.prepare_rows(path, None, out, tokenizer, workers=0)
    assert contents(out) == expected


def text_rows(number, bad=0):
    """Rows without pictures, the last `bad` of which have an empty answer."""
    answers = ["ho"] * (number - bad) + [""] * bad
    return [row(f"r{n}", None, (("human", f"hi {n}"), ("gpt", answer))) for n, answer in enumerate(answers)]


def tree(folder):
    """All that lies below a folder, with its contents."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def pictured(number):
    """Rows of which three in a row share a picture, but for every fourth, which has none."""
    return [
        row(f"r{n}", *([f"p{n // 4}.png"] if n % 4 else [None, (("human", "hi"), ("gpt", "ho"))]))
        for n in range(number)
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(30):
        Image.new("RGB", (20, 20 + n), "red").save(folder / f"p{n}.png")
    return folder


def test_numbers_and_shares_of_rows_are_kept_from_training(pictures, tmp_path):
    path = write(pictures, pictured(120))
    found = {}
    for workers, validation, test in ((0, 12, 0.2), (2, "12", "0.2")):
        out = tmp_path / f"out{workers}"
        counts = prepare.prepare_rows(path, None, out, workers=workers, validation=validation, test=test)
        assert list(counts["splits"]) == ["train", "validation", "test"]
        assert sum(split["rows"] for split in counts["splits"].values()) == counts["rows"] == 120
        assert counts["splits"]["validation"]["rows"] == 12 and 8 < counts["splits"]["test"]["rows"] < 45
        report = summary.report(out, counts)
        assert "validation: 12 rows" in report and f"test: {counts['splits']['test']['rows']} rows" in report
        sides = {}
        for split in counts["splits"]:
            data = Prepared(out, split)
            assert len(data) == counts["splits"][split]["rows"] == len(data.index["turn_offsets"]) - 1
            numbers = [int(data[n]["id"][1:]) for n in range(len(data))]
            assert numbers == sorted(numbers)  # in the order of the file
            sides |= dict.fromkeys(numbers, split)
            for n, number in enumerate(numbers):
                assert [p.size[1] for p in as_pictures(data[n])] == [20 + number // 4] * bool(number % 4)
        assert all(len({sides[n + k] for k in (1, 2, 3)}) == 1 for n in range(0, 120, 4))
        found[workers] = (sides, contents(out))
    assert found[0] == found[2]
    shuffled = write(pictures, pictured(120)[::-1], "shuffled.json")
    prepare.prepare_rows(shuffled, None, tmp_path / "shuffled", workers=0, validation=12, test=0.2)
    tested = Prepared(tmp_path / "shuffled", "test")
    assert {int(tested[n]["id"][1:]) for n in range(len(tested))} == {n for n in sides if sides[n] == "test"}


def test_a_number_that_whole_pictures_do_not_meet_is_told(pictures, tmp_path, capsys):
    path = write(pictures, [row(str(n), f"p{n // 3}.png") for n in range(30)])
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0, validation=6, test=5)
    assert (counts["splits"]["validation"]["rows"], counts["splits"]["test"]["rows"]) == (6, 3)
    told = capsys.readouterr().err
    assert "--test 5: 3 rows, as rows that share a picture stay together" in told and "--validation" not in told


def test_the_tokenizer_is_trained_on_training_rows_alone(pictures, tmp_path):
    path = write(pictures, text_rows(60))
    prepare.prepare_rows(path, None, tmp_path / "whole", workers=0)
    prepare.prepare_rows(path, None, tmp_path / "split", workers=0, test=30)
    assert Prepared(tmp_path / "whole", "train").tokenizer.fingerprint != (
        Prepared(tmp_path / "split", "train").tokenizer.fingerprint
    )


def test_each_split_may_have_a_file_of_its_own(pictures, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/p0.png").write_bytes((pictures / "p7.png").read_bytes())
    path, test = write(pictures, pictured(8)), write(tmp_path / "other", [row("t", "p0.png")], "test.json")
    files = {"validation_data": write(pictures, text_rows(3), "v.jsonl"), "test_data": test}
    out = tmp_path / "out"
    counts = prepare.prepare_rows(path, None, out, workers=0, **files)
    assert {split: n["rows"] for split, n in counts["splits"].items()} == {"train": 8, "validation": 3, "test": 1}
    assert as_pictures(Prepared(out, "test")[0])[0].size == (20, 27)  # in the folder of its own file
    assert prepare.prepare_rows(path, None, out, workers=0, **files) == counts
    with pytest.raises(FileExistsError, match="test_data was .*, is None"):
        prepare.prepare_rows(path, None, out, workers=0, validation_data=files["validation_data"])
    write(pictures, text_rows(4), "v.jsonl")
    with pytest.raises(FileExistsError, match="validation_data was "):
        prepare.prepare_rows(path, None, out, workers=0, **files)


def test_split_arguments_are_part_of_what_a_folder_is_made_from(pictures, tmp_path, capsys):
    path, out = write(pictures, text_rows(30)), tmp_path / "out"
    first = prepare.prepare_rows(path, None, out, workers=0, test=5)
    assert prepare.prepare_rows(path, None, out, workers=0, test="5") == first
    assert "left as it is" in capsys.readouterr().err
    for others in ({}, {"test": 6}, {"test": 0.2}, {"test": 5, "validation": 5}):
        with pytest.raises(FileExistsError, match="was prepared from something else"):
            prepare.prepare_rows(path, None, out, workers=0, **others)
    plain = tmp_path / "plain"
    prepare.prepare_rows(path, None, plain, workers=0)
    about = json.loads((plain / "prepared.json").read_text())
    assert set(about["source"]) == {"data", "bytes", "sha256", "images", "tokenizer", "template"}  # as ever


def test_lists_of_rows_in_a_file_are_its_splits(pictures, tmp_path):
    rows = text_rows(12)
    path = pictures / "splits.json"
    path.write_text(json.dumps({"version": 1, "val": rows[:3], "train": rows[3:10], "test": rows[10:]}, indent=1))
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert {split: n["rows"] for split, n in counts["splits"].items()} == {"train": 7, "validation": 3, "test": 2}
    assert counts["ignored"] == {"file.version": 1}
    for split, expected in (("validation", rows[:3]), ("train", rows[3:10]), ("test", rows[10:])):
        data = Prepared(tmp_path / "out", split)
        assert [data[n]["id"].decode() for n in range(len(data))] == [row["id"] for row in expected]


def test_a_file_may_name_splits_itself(pictures, tmp_path, monkeypatch):
    path, named = write(pictures, text_rows(30)), ["train", "train", "test"]

    def items(f, path, original=prepare.items_of):
        return ((named[n % 3], line, text) for n, (_, line, text) in enumerate(original(f, path)))

    for module in (prepare, survey):  # rows are looked at first, and written then
        monkeypatch.setattr(module, "items_of", items)
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert {split: n["rows"] for split, n in counts["splits"].items()} == {"train": 20, "test": 10}
    assert Prepared(tmp_path / "out", "test")[1]["id"] == b"r5"
    before = tree(tmp_path)
    for options, message in (
        ({"validation": 5}, "has a split 'test', and --data can have train here"),
        (
            {"validation_data": write(pictures, text_rows(9), "other.jsonl")},
            "has a split 'test', and --data can have",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            prepare.prepare_rows(path, None, tmp_path / "other", workers=0, **options)
    named[:2] = ["validation", "validation"]
    with pytest.raises(ValueError, match="no row is of split 'train'"):
        prepare.prepare_rows(path, None, tmp_path / "other", workers=0)
    named[0] = "data"
    with pytest.raises(ValueError, match="has a split 'data', and --data can have train, validation, test here"):
        prepare.prepare_rows(path, None, tmp_path / "other", workers=0)
    assert tree(tmp_path) == before


def test_rows_may_name_their_split_themselves(pictures, tmp_path):
    names = ["train", "Test", None, "train2014", "val"]
    items = [item | {"split": names[n % 5]} for n, item in enumerate(text_rows(30))]
    path = write(pictures, items)
    counts = prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert {split: n["rows"] for split, n in counts["splits"].items()} == {"train": 18, "validation": 6, "test": 6}
    assert counts["ignored"] == {"row.split": 6}  # of a name that is no split
    assert Prepared(tmp_path / "out", "test")[1]["id"] == b"r6"
    for options in ({"test": 3}, {"test_data": write(pictures, text_rows(3), "other.jsonl")}):
        with pytest.raises(ValueError, match="line 2: the file has a split 'test', and --data can have train here"):
            prepare.prepare_rows(path, None, tmp_path / "other", workers=0, **options)
    path.write_text(json.dumps({"train": items}))
    with pytest.raises(ValueError, match="a row of the list 'train' has split 'test'; leave one out"):
        prepare.prepare_rows(path, None, tmp_path / "other", workers=0)


def test_keys_of_any_origin_can_be_printed(pictures, tmp_path):
    keys = ["", "a\nb", "\x1b[31m", "\u202e", "x" * 5000, "\ud800", "größe", "猫"]
    path = write(pictures, [item | dict.fromkeys(keys, 1) for item in text_rows(3)])
    report = summary.report(tmp_path / "out", prepare.prepare_rows(path, None, tmp_path / "out", workers=0))
    (line,) = [line for line in report.splitlines() if line.startswith("ignored keys")]
    assert line.isprintable() and "row.größe 3" in line and r"row.a\nb 3" in line and r"row.\ud800 3" in line


def test_one_file_is_not_two_splits(pictures, tmp_path):
    path = write(pictures, text_rows(5))
    copy = write(pictures, text_rows(5), "copy.jsonl")
    with pytest.raises(ValueError, match="--test-data .*copy.jsonl holds the same as --data .*rows.jsonl"):
        prepare.prepare_rows(path, None, tmp_path / "out", workers=0, test_data=copy)


@pytest.mark.parametrize(
    ("rows", "bad", "share", "fails"),
    [
        (10, 9, 0.05, True),
        (10, 2, 0.05, True),
        (10, 1, 0.05, False),  # a share is rounded up to whole rows
        (10, 1, 0.0, True),
        (40, 2, 0.05, False),
        (40, 3, 0.05, True),
        (999, 51, 0.05, True),
        (1100, 55, 0.05, False),  # the last rows are the bad ones
        (1100, 56, 0.05, True),
        (10, 9, 0.9, False),
        (10, 9, 0.89, False),
        (10, 9, 0.8, True),
    ],
)
def test_refused_rows_are_judged_at_the_end(tmp_path, digits_folder, rows, bad, share, fails):
    path, out = write(tmp_path, text_rows(rows, bad)), tmp_path / "out"
    given = {"tokenizer": digits_folder, "workers": 0, "max_refused": share}
    if not fails:
        assert prepare.prepare_rows(path, None, out, **given)["refused"] == {"empty answer": bad}
        return
    with pytest.raises(
        ValueError, match=rf"rows.jsonl: {bad} of (the first )?[\d,]+ rows refused.*: {bad} empty answer"
    ):
        prepare.prepare_rows(path, None, out, **given)
    assert not (out / "prepared.json").exists() and (out / "preparing.json").exists()
    assert len(refusals(out)) == bad  # of what has to be mended, the list is kept
    assert prepare.prepare_rows(path, None, out, **given | {"max_refused": 0.95})["rows"] == rows - bad


def test_pictures_that_are_not_there_stop_the_run(folder, tmp_path):
    path = write(folder, [row(str(n), "nowhere.png" if n else "circle0.png") for n in range(10)])
    with pytest.raises(ValueError, match=r"9 of 10 rows refused.*9 missing picture.*--max-refused 0.9$"):
        prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert prepare.prepare_rows(path, None, tmp_path / "out", workers=0, max_refused=0.9)["rows"] == 1


def test_a_split_of_which_all_rows_are_refused_is_told(pictures, tmp_path):
    files = {"test_data": write(pictures, text_rows(1, 1), "t.json")}
    with pytest.raises(ValueError, match=r"t.json: no row can be used: 1 empty answer"):
        prepare.prepare_rows(write(pictures, text_rows(5)), None, tmp_path / "out", workers=0, **files)
    assert not (tmp_path / "out/prepared.json").exists()


@pytest.fixture
def arguments(tmp_path, digits_folder):
    """A folder of things to name in arguments."""
    write(tmp_path, text_rows(20))
    (tmp_path / "broken.json").write_text(json.dumps(text_rows(5))[:-1])
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("precious")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "settings").mkdir()
    shutil.copy(digits_folder / "tokenizer.model", tmp_path / "settings/tokenizer.model")
    (tmp_path / "settings/tokenizer_config.json").write_text('{"added_tokens_decoder": ["<s>"]}')
    (tmp_path / "hollow/tokenizer.model").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "nowhere.json"}, "--data: no file .*nowhere.json"),
        ({"data": "mine"}, "--data .*mine is a folder; name the file of rows"),
        ({"data": "broken.json"}, "broken.json: broken JSON: the array breaks off"),
        ({"data": "empty.json"}, "empty.json: no row can be used: it has none"),
        ({"test_data": "nowhere.json"}, "--test-data: no file .*nowhere.json"),
        ({"validation_data": "mine"}, "--validation-data .*mine is a folder"),
        ({"test_data": "empty.json"}, "empty.json: no row can be used: it has none"),
        ({"images": "file"}, "--images: .*file is a file, not the folder of the pictures"),
        *(({flag: ""}, f"--{flag.replace('_', '-')} is empty") for flag in ("images", "tokenizer", "test_data")),
        ({"template": "Vicuna"}, "--template: no template 'Vicuna'; known are .*vicuna_v1"),
        ({"data": "/dev/null"}, "--data /dev/null is a pipe or a device"),
        ({"validation": "1" * 5000}, "--validation 1*: expected a number of rows"),
        ({"template": "vicuna"}, "no template 'vicuna'; known are"),
        ({"max_refused": 1.5}, "--max-refused.* from 0 to 1, not 1.5"),
        ({"max_refused": float("nan")}, "--max-refused.* from 0 to 1, not nan"),
        ({"workers": -1}, "--workers: -1 worker processes"),
        ({"validation": 20}, "--validation 20: no row of .*rows.jsonl is left to train on, which has 20"),
        ({"test": 0.5, "validation": 15}, "--test 0.5 --validation 15: no row"),
        ({"test": "1.5"}, "--test 1.5: expected a number of rows, such as 500, or a share of them, such as 0.05"),
        ({"validation": "-3"}, "--validation -3: expected a number"),
        ({"validation": "abc"}, "--validation abc: expected a number"),
        ({"test": 5, "validation_data": "rows.jsonl"}, "--test and --validation-data: either numbers .*, or a file"),
        ({"tokenizer": "nowhere"}, "--tokenizer: no tokenizer .*nowhere: there is no such folder or file"),
        ({"tokenizer": "mine"}, "--tokenizer: .*mine holds no tokenizer of a kind that we know"),
        ({"tokenizer": "file"}, "--tokenizer .*file is not the file of a tokenizer"),
        ({"tokenizer": "bad.model"}, "--tokenizer .*bad.model: not a SentencePiece model"),
        ({"tokenizer": "settings"}, "--tokenizer .*tokenizer_config.json is not what Hugging Face writes"),
        (
            {"tokenizer": "hollow"},
            "--tokenizer .*hollow: .*hollow/tokenizer.model is no file",
        ),
        (
            {"tokenizer": DIGITS, "template": "chatml_direct"},
            r"--tokenizer .*: template 'chatml_direct' does not fit .*<\|im_start\|>",
        ),
        ({"tokenizer": DIGITS, "template": "phi3"}, r"--tokenizer .*: template 'phi3' does not fit .*<\|end\|>"),
        ({"tokenizer": DIGITS, "template": "plain"}, "--tokenizer .*: template 'plain' does not fit"),
        ({"out": "file"}, "--out .*file is a file, not a folder"),
        ({"out": "file/below"}, "--out .*file/below: .*file is a file, not a folder"),
        ({"out": "dangling"}, "--out .*dangling is a link that leads nowhere"),
        ({"out": "mine"}, "mine holds other files .thesis.tex."),
        ({"out": "."}, "holds other files"),
        ({"out": "gs://bucket/data"}, "--out gs://bucket/data: records are written to a disk"),
    ],
)
def test_a_refused_argument_leaves_every_byte_as_it_was(arguments, digits_folder, options, message):
    given = {"data": "rows.jsonl", "images": None, "out": "new/deep/out", "workers": 0} | options
    paths = {"data", "images", "out", "test_data", "validation_data", "tokenizer"} & given.keys()
    for name in paths:
        if given[name] and "://" not in given[name]:
            given[name] = str(digits_folder if given[name] == DIGITS else arguments / given[name])
    before = tree(arguments)
    with pytest.raises((ValueError, OSError), match=message):
        prepare.prepare_rows(**given)
    assert tree(arguments) == before


def test_a_folder_that_cannot_be_written_is_told(arguments, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)  # whoever runs the tests may write all
    with pytest.raises(PermissionError, match="--out .*/out: .* cannot be written to"):
        prepare.prepare_rows(arguments / "rows.jsonl", None, arguments / "out", workers=0)
    assert not (arguments / "out").exists()


def test_a_finished_folder_is_found_so_where_nothing_can_be_written(arguments, monkeypatch, capsys):
    counts = prepare.prepare_rows(arguments / "rows.jsonl", None, arguments / "out", workers=0)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    assert prepare.prepare_rows(arguments / "rows.jsonl", None, arguments / "out", workers=0) == counts
    assert "is finished and left as it is" in capsys.readouterr().err
    with (arguments / "rows.jsonl").open("a") as f:
        f.write("\n")
    with pytest.raises(FileExistsError, match=r"from something else \(what rows.jsonl holds has changed\); choose"):
        prepare.prepare_rows(arguments / "rows.jsonl", None, arguments / "out", workers=0)


def test_an_unfinished_folder_is_told_from_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no prepared data"):
        Prepared(tmp_path, "train")
    (tmp_path / "preparing.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="is unfinished: `lmm prepare` still writes there, was stopped"):
        Prepared(tmp_path, "train")


def test_a_disk_without_room_is_told_before(pictures, tmp_path, monkeypatch):
    path = write(pictures, pictured(40))
    size = sum((pictures / f"p{n // 4}.png").stat().st_size for n in range(40) if n % 4)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
    with pytest.raises(
        OSError, match=r"--out .*: rows and pictures take 0\.00 MiB, and 0\.00 MiB are free there; make"
    ):
        prepare.prepare_rows(path, None, tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size))
    prepare.prepare_rows(path, None, tmp_path / "out", workers=0)


FULL_DISK = {
    "of Python": OSError(errno.ENOSPC, "No space left on device", "/somewhere/x"),
    "of ArrayRecord": RuntimeError("write() failed: No space left on device; writing /out/a; at byte 3137536"),
    "of a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.mark.parametrize("error", FULL_DISK)
@pytest.mark.parametrize("at", ["records", "tokenizer", "index", "lock"])
def test_a_disk_that_fills_up_is_one_sentence(pictures, tmp_path, monkeypatch, at, error, digits_folder):
    path, out = write(pictures, text_rows(5)), tmp_path / "out"

    def fail(*_, **__):
        raise FULL_DISK[error]

    where = {
        "records": (records, "write_records"),
        "tokenizer": (SentencePiece, "save"),
        "index": (np, "savez"),
        "lock": (lock, "_create"),
    }[at]
    monkeypatch.setattr(digits, "ROWS", {"train": 4, "test": 1})
    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        for run in (
            lambda: prepare.prepare_rows(path, None, out, tokenizer=digits_folder, workers=0),
            lambda: prepare.prepare_dataset("digits", tmp_path / "digits", rows=4),
        ):
            with pytest.raises(
                OSError, match=r"--out .*: (No space left on device|Disk quota exceeded)\. .* make room"
            ):
                run()
    assert not (out / "prepared.json").exists() and not (out / lock.NAME).exists()
    assert prepare.prepare_rows(path, None, out, tokenizer=digits_folder, workers=0)["rows"] == 5


def test_errors_that_are_of_no_disk_stay_what_they_are(pictures, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(SentencePiece, "save", fail)
    with pytest.raises(RuntimeError, match="^a fault of ours$"):
        prepare.prepare_rows(write(pictures, text_rows(5)), None, tmp_path / "out", workers=0)


def test_one_process_writes_to_a_folder(pictures, tmp_path, digits_folder):
    path, out = write(pictures, text_rows(5)), tmp_path / "out"
    with lock.hold(out, "lmm prepare"):
        before = {name: data for name, data in tree(out).items() if name != lock.NAME}
        for run in (
            lambda: prepare.prepare_rows(path, None, out, tokenizer=digits_folder, workers=0),
            lambda: prepare.prepare_dataset("digits", out, rows=4),
        ):
            with pytest.raises(lock.Held, match="out is being written to by `lmm prepare`, process"):
                run()
        assert {name: data for name, data in tree(out).items() if name != lock.NAME} == before
    seen = []

    def write_records(*given, original=records.write_records):
        seen.append((out / lock.NAME).exists())
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "write_records", write_records)
        prepare.prepare_rows(path, None, out, tokenizer=digits_folder, workers=0)
    assert seen == [True] and not (out / lock.NAME).exists()


def test_a_finished_folder_whose_template_does_not_fit_is_told(pictures, tmp_path, digits_folder):
    """Earlier versions wrote such folders."""
    path, out = write(pictures, text_rows(5)), tmp_path / "out"
    prepare.prepare_rows(path, None, out, template="chatml_direct", workers=0)
    assert Prepared(out, "train").tokenizer.piece(3) == "<|im_start|>"
    before = (out / "prepared.json").read_bytes()
    shutil.copy(digits_folder / "tokenizer.model", out / "tokenizer.model")
    with pytest.raises(ValueError, match="out was prepared with .*template 'chatml_direct' does not fit"):
        prepare.prepare_rows(path, None, out, template="chatml_direct", workers=0)
    assert (out / "prepared.json").read_bytes() == before


def _runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_preparation_starts_again_and_gives_the_same(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "ROWS", {"train": 64, "validation": 32, "test": 16})
    folder = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(Index, "arrays", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare_dataset("digits", folder)
    assert not (folder / "prepared.json").exists()
    prepare.prepare_dataset("digits", folder)
    assert (folder / "prepared.json").read_text() == (digits_folder / "prepared.json").read_text()
    a, b = Prepared(folder, "train"), Prepared(digits_folder, "train")
    assert all(a[i]["images"] == b[i]["images"] for i in range(64))
    before = (folder / "prepared.json").stat().st_mtime_ns
    assert prepare.prepare_dataset("digits", folder)["rows"] == 112
    assert (folder / "prepared.json").stat().st_mtime_ns == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        prepare.prepare_dataset("digits", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
