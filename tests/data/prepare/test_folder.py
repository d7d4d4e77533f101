"""Preparing conversations: what is stored, what is refused and why, and what a kill leaves."""

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

from lmm_jax.data.conversation import encode
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepare.datasets import digits
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns

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
    ({"image": "../secret.png"}, "picture path leaves the folder"),
    ({"image": "/etc/hosts"}, "picture path leaves the folder"),
    ({"image": "link.png"}, "picture path leaves the folder"),
    ({"image": "https://example.org/a.png"}, "picture path leaves the folder"),
    ({"image": ["circle0.png", "circle1.png"]}, "tags do not match pictures"),
    ({"image": None}, "tags do not match pictures"),
    ({"turns": [("human", "what?"), ("gpt", "a circle")]}, "tags do not match pictures"),
    ({"turns": [("human", "what?"), ("gpt", "<image>")]}, "tags do not match pictures"),
    ({"turns": [("human", "<image>"), ("tool", "a circle")]}, "unknown role"),
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
        assert as_turns(data[n]) == asked
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
    assert "1 empty answer" in prepare.report(tmp_path / "out", counts)


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
            "no row can be used: 2 broken JSON; the first is line 1: broken JSON: expected an object, got int",
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
    with pytest.raises(FileExistsError, match="sha256 was "):
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

def read_items(f, original=prepare.read_items):
    for n, item in enumerate(original(f)):
        if n == 300 and multiprocessing.active_children():  # the first time, rows are only looked at
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

if __name__ == "__main__":
    data, out, tokenizer = sys.argv[1:]
    prepare.read_items = read_items
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

    def read_items(f, original=prepare.read_items):
        for n, item in enumerate(original(f)):
            if n == 300 and multiprocessing.active_children():
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "read_items", read_items)
        with pytest.raises(ChildProcessError, match="a worker process died"):
            prepare.prepare_rows(path, None, out, tokenizer, workers=2)
    assert not (out / "prepared.json").exists() and not multiprocessing.active_children()

    prepare.prepare_rows(path, None, out, tokenizer, workers=0)
    assert contents(out) == expected


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
