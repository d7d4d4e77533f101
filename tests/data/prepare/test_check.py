"""Checking rows: in order, in any number of processes, not further ahead than they are used."""

import hashlib
import json
import multiprocessing
import os
import signal

import pytest
from PIL import Image

from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.prepare import check
from lmm_jax.data.prepare.refused import Refused
from lmm_jax.data.prepared import Prepared


@pytest.fixture(scope="module")
def tokenizer(digits_folder):
    return Prepared(digits_folder, "train").tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(3):
        Image.new("RGB", (20 + n, 10), "white").save(folder / f"{n}.png")
    (folder / "text.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    outside = tmp_path_factory.mktemp("outside") / "picture.png"
    Image.new("RGB", (30, 10), "white").save(outside)
    (folder / "link.png").symlink_to(outside)
    return folder


def row(n, image="0.png", question="<image> how many?", answer="7", weight=None):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, "weight": weight}]
    return json.dumps({"id": f"row{n}", "images": [image] if image else [], "messages": turns})


def items(count):
    """Lines and rows of them; every fifth row names a picture that is not there."""
    return [(10 + n, row(n, "gone.png" if n % 5 == 4 else f"{n % 3}.png")) for n in range(count)]


def summary(result):
    if isinstance(result, Refused):
        return result.reason, result.detail, result.id
    return result.record["id"], result.encoded.ids.tolist(), result.sizes, result.digest


def test_a_row_is_stored_with_its_picture_and_encoded(pictures, tokenizer):
    checked = check.check_row(row(1, "1.png"), 1, pictures, tokenizer, "qa")
    assert checked.record["images"] == [(pictures / "1.png").read_bytes()] and checked.sizes == [(21, 10)]
    assert checked.record["turns"][1] == {"role": "assistant", "text": "7", "kind": ""}
    assert (checked.encoded.ids == IMAGE).sum() == 1
    supervised = checked.encoded.ids[checked.encoded.supervised].tolist()
    assert supervised == [*tokenizer.encode("7"), tokenizer.eos]


def test_the_digest_is_of_all_that_is_stored(pictures, tokenizer):
    """So that another picture of the same name and size gives another fingerprint of the data."""

    def digest(n=1, **fields):
        return check.check_row(row(n, **fields), 1, pictures, tokenizer, "qa").digest

    first = digest()
    assert len(first) == hashlib.sha256().digest_size and first == digest()
    others = [digest(2), digest(image="1.png"), digest(answer="8"), digest(question="<image> which?")]
    before = (pictures / "0.png").read_bytes()
    Image.new("RGB", (20, 10), "black").save(pictures / "0.png")
    others.append(digest())
    (pictures / "0.png").write_bytes(before)
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ({"image": "gone.png"}, "missing picture", "gone.png"),
        ({"image": "text.png"}, "unreadable picture", "text.png: "),
        ({"image": None}, "tags do not match pictures", "1 <image> tags, 1 of them in what a user says, 0 pictures"),
        ({"answer": " "}, "empty answer", "turn 2"),
        ({"image": "folder.png"}, "unreadable picture", "folder.png: a folder, not a file"),
        ({"image": "sub\\9.png"}, "missing picture", "folders in a name are parted by /"),
        ({"image": "link.png"}, "link that leads out of the folder", "--follow-links allows it"),
        ({"image": {"bytes": None, "path": "../0.png"}}, "picture name leads out of the folder", "(..)"),
        ({"weight": 0}, "nothing supervised", "all answers are out of the loss"),
        ({"question": "how many?"}, "tags do not match pictures", "has one <image> for each picture"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_id(pictures, tokenizer, fields, reason, detail):
    with pytest.raises(Refused) as error:
        check.check_row(row(7, **fields), 1, pictures, tokenizer, "qa")
    assert (error.value.reason, error.value.id) == (reason, "row7") and detail in error.value.detail


def test_pictures_as_bytes_and_behind_links_are_stored_as_others(pictures, tokenizer):
    expected = summary(check.check_row(row(1, "1.png"), 1, pictures, tokenizer, "qa"))
    held = json.loads(row(1)) | {"images": [{"bytes": (pictures / "1.png").read_bytes(), "path": None}]}
    assert summary(check.check_row(held, 1, pictures, tokenizer, "qa")) == expected
    assert check.check_row(row(1, "link.png"), 1, pictures, tokenizer, "qa", follow_links=True).sizes == [(30, 10)]
    for data, reason in ((b"no picture", "unreadable picture: picture 1 of the row"), (b" ", "unreadable picture")):
        with pytest.raises(Refused, match=reason):
            check.check_row(held | {"images": data}, 1, pictures, tokenizer, "qa")


def test_an_answer_out_of_the_loss_is_read_and_not_trained_on(pictures, tokenizer):
    asked = json.loads(row(1))["messages"]
    silent = [
        asked[0],
        asked[1] | {"weight": 0},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "8"},
    ]
    spoken = [*silent[:1], asked[1], *silent[2:]]
    a, b = (
        check.check_row(
            json.dumps({"id": "a", "image": "0.png", "messages": turns, "n": 1}), 1, pictures, tokenizer, "qa"
        )
        for turns in (silent, spoken)
    )
    assert a.encoded.ids.tolist() == b.encoded.ids.tolist() and a.digest != b.digest
    assert [turn.get("in_loss", True) for turn in a.record["turns"]] == [True, False, True, True]
    assert all("in_loss" not in turn for turn in b.record["turns"]), "so that their digest is that of before"
    assert a.encoded.ids[a.encoded.supervised].tolist() == [*tokenizer.encode("8"), tokenizer.eos]
    assert a.encoded.turn_ends.tolist() == b.encoded.turn_ends.tolist()[1:]
    assert a.ignored == b.ignored == ("row.n",)


def test_processes_change_nothing(pictures, tokenizer):
    given = (items(70), pictures, tokenizer, "qa")
    here, there = (list(check.check_rows(*given, workers)) for workers in (0, 2))
    assert [line for line, _ in here] == list(range(10, 80))
    assert [isinstance(result, Refused) for _, result in here] == [n % 5 == 4 for n in range(70)]
    assert [(line, summary(result)) for line, result in there] == [(line, summary(result)) for line, result in here]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_is_not_read_far_ahead(pictures, tokenizer, workers):
    """Of any number of rows only those are in memory that the processes have; one that is not used on ends them."""
    read = []

    def endless():
        for n in range(1_000_000):
            read.append(n)
            yield n, row(n)

    results = check.check_rows(endless(), pictures, tokenizer, "qa", workers)
    for n in range(2 * check.ROWS):
        assert next(results)[0] == n
    assert len(read) <= (2 + 3 * workers) * check.ROWS
    results.close()
    assert not multiprocessing.active_children()


def write_half_and_die(pipe, *_):
    pipe.recv()
    os.write(pipe.fileno(), (1000).to_bytes(4, "big") + b"of 1,000 bytes")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_while_it_writes_stops_nobody_for_ever(pictures, tokenizer, monkeypatch):
    monkeypatch.setattr(check, "_work", write_half_and_die)
    with pytest.raises(ChildProcessError, match="a worker process died at line 10"):
        list(check.check_rows(items(100), pictures, tokenizer, "qa", 2))
    assert not multiprocessing.active_children()


def test_a_worker_that_is_interrupted_while_it_starts_goes_on(pictures, tokenizer, monkeypatch):
    """A Ctrl-C reaches all processes of a terminal; the parent alone ends them, without a traceback of each."""
    spawn, started = check.multiprocessing.get_context("spawn"), []

    def start(process, original=spawn.Process.start):
        original(process)
        os.kill(process.pid, signal.SIGINT)
        started.append(process)

    monkeypatch.setattr(spawn.Process, "start", start)
    results = list(check.check_rows(items(20), str(pictures), tokenizer, "qa", workers=1))
    assert len(results) == 20 and started[0].exitcode == 0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        *(
            (name, "there is 0.png")
            for name in (" 0.png", "0.png\n", "0.PNG", "0.jpg", "0", "x/images/0.png", "%30.png")
        ),
        *((name, "there is 0.png") for name in (".\\0.png", "C:\\pictures\\0.png", "file:0/../a/0.png")),
        *(
            ("n\u0303.png", "there is the same name in another form of Unicode"),
            ("Folder.png", "is not in .*images$"),
        ),
        *(
            ("images/0.png", "images, but in .*; see --images"),
            ("dangling.png", "it is a link that leads nowhere"),
            ("a\\b.png", "folders in a name are parted by /"),
        ),
        *(("nothing.png", "nothing.png is not in .*images$"), ("x/" * 90 + "y.png", "x/x/…/?x/x/.*y.png is not in")),
    ],
)
def test_a_missing_picture_is_told_with_what_is_there_instead(tokenizer, tmp_path, name, hint):
    folder = tmp_path / "images"
    folder.mkdir()
    for found in ("0.png", "\u00f1.png"):
        Image.new("RGB", (20, 10)).save(folder / found)
    (folder / "dangling.png").symlink_to("gone.png")
    with pytest.raises(Refused, match=f"(?s)^missing picture: .*{hint}"):
        check.check_row(row(1, name), 1, str(folder), tokenizer, "qa")


@pytest.mark.parametrize("name", ["a/" * 2000, "a/" * 500_000, "a\\" * 2000, "../" * 1300, "a" * 4000])
def test_a_name_of_endless_folders_is_refused_soon(tokenizer, tmp_path, name, monkeypatch):
    looked = []
    monkeypatch.setattr(check, "safe_path", lambda *args, real=check.safe_path: looked.append(args) or real(*args))
    with pytest.raises(Refused) as error:
        check.check_row(row(1, name), 1, str(tmp_path), tokenizer, "qa")
    assert len(looked) < 25 and len(str(error.value)) < 10_000


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a pointer of Git LFS; .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>404", "a web page, not the picture"),
        (b"<HTML>", "a web page, not the picture"),
        (b"<svg/>", "no known image format"),
    ],
)
def test_a_file_that_is_no_picture_is_named(tokenizer, tmp_path, data, what):
    (tmp_path / "0.png").write_bytes(data)
    with pytest.raises(Refused, match=f"^unreadable picture: 0.png: .*{what}"):
        check.check_row(row(1, "0.png"), 1, str(tmp_path), tokenizer, "qa")
