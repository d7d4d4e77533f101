"""The door for data sets: one that lives here alone, made from a folder, is checked, prepared and offered."""

import io
import json
import types

import pytest
from PIL import Image

from lmm_jax import cli
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepare.datasets import DATASETS
from lmm_jax.data.prepared import Prepared, as_turns


def check(source):
    wanted = () if source is None else ("names.txt", "colours.txt")
    return ["data set squares needs --source"] * (not wanted) + [
        f"{source}/{name} is missing" for name in wanted if not (source / name).exists()
    ]


def records(source, split, rows):
    names = (source / "names.txt").read_text().split()
    for n, name in enumerate(names[:rows]):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), name).save(picture, "jpeg")
        turns = [("user", "<image>\nwhat colour?", "colour"), ("assistant", name * (split != "broken"), "colour")]
        turns = [dict(zip(("role", "text", "kind"), turn, strict=True)) for turn in turns]
        yield {"id": f"{split}-{n}", "images": [picture.getvalue()], "turns": turns}


@pytest.fixture
def squares(monkeypatch):
    """A toy data set: what a module of `data/prepare/datasets/` gives, and no more."""
    toy = types.SimpleNamespace(
        __doc__="100% plain squares.\nMore.", ROWS={"train": None, "test": 1}, check=check, records=records
    )
    monkeypatch.setitem(DATASETS, "squares", toy)
    return toy


@pytest.fixture
def source(tmp_path):
    (tmp_path / "names.txt").write_text("red green blue")
    (tmp_path / "colours.txt").touch()
    return tmp_path


@pytest.mark.parametrize("name", DATASETS)
def test_built_in_ones_give_what_the_door_asks_for(name):
    dataset = DATASETS[name]
    assert dataset.check(None) == [] and "takes no source" in dataset.check("folder")[0]
    assert all(rows > 0 for rows in dataset.ROWS.values()) and {"train", "test"} <= dataset.ROWS.keys()
    (record,) = dataset.records(None, "test", 1)
    assert record.keys() == {"id", "images", "turns"} and record["turns"][0]["text"].startswith("<image>")


def test_a_toy_is_prepared_from_its_source(squares, source, tmp_path):
    out = tmp_path / "out"
    assert prepare.prepare_dataset("squares", out, source=source)["rows"] == 4
    data = Prepared(out, "train")
    assert [as_turns(data[i])[1][1] for i in range(3)] == ["red", "green", "blue"]
    assert data.about["source"] == {"dataset": "squares", "source": str(source)}
    assert Image.open(out / "example.png").format == "PNG"
    assert prepare.prepare_dataset("squares", tmp_path / "two", rows=2, source=source)["rows"] == 3
    with pytest.raises(FileExistsError, match="source was"):
        (tmp_path / "other").mkdir()
        for name in ("names.txt", "colours.txt"):
            (tmp_path / "other" / name).touch()
        prepare.prepare_dataset("squares", out, source=tmp_path / "other")


def test_all_faults_of_a_source_are_told_before_anything_is_written(squares, tmp_path):
    with pytest.raises(ValueError, match=r"names\.txt is missing\n.*colours\.txt is missing"):
        prepare.prepare_dataset("squares", tmp_path / "out", source=tmp_path)
    with pytest.raises(ValueError, match="needs --source"):
        prepare.prepare_dataset("squares", tmp_path / "out")
    with pytest.raises(ValueError, match="no data set 'circles'; known are digits, pages, squares"):
        prepare.prepare_dataset("circles", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_that_cannot_be_used_is_named(squares, source, tmp_path):
    squares.ROWS = {"train": 3, "broken": 1}
    with pytest.raises(ValueError, match="data set squares, split broken, record broken-0: turn 2: empty answer"):
        prepare.prepare_dataset("squares", tmp_path / "out", source=source)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_the_command_offers_it(squares, capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "squares - 100% plain squares" in told and "digits - Real handwriting" in told


def test_files_on_disk_are_what_they_were(digits_folder):
    about = json.loads((digits_folder / "prepared.json").read_text())
    assert about["source"] == {"dataset": "digits"}
    assert (digits_folder / "example.png").read_bytes() == next(DATASETS["digits"].records(None, "test", 1))[
        "images"
    ][0]
