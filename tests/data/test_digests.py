"""A prepared folder whose files are not as they were written is named with the folder, before a step."""

import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
from etils import epath

from lmm_jax.data import digests
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepare.index import read
from lmm_jax.data.prepared import Prepared


def rows(folder, count, first=0):
    """A file of rows; those of `first` are others."""
    turns = [
        [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * (1 + n % 7)}]
        for n in range(count)
    ]
    path = folder / f"rows{first}.json"
    path.write_text(json.dumps([{"id": f"r{first + n}", "messages": t} for n, t in enumerate(turns)]))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders of different rows, with two splits each."""
    folder = tmp_path_factory.mktemp("prepared")
    for n in range(2):
        prepare_rows(rows(folder, 20, 100 * n), None, folder / f"out{n}", workers=0, validation=5)
    return folder / "out0", folder / "out1"


@pytest.fixture
def copy(folders, tmp_path):
    return shutil.copytree(folders[0], tmp_path / "copy")


READ = (
    *("prepared.json", "index_train.npz", "tokenizer.model", "records/conversations/1.0.0/features.json"),
    *(
        "records/conversations/1.0.0/dataset_info.json",
        "records/conversations/1.0.0/conversations-train.array_record-00000",
    ),
)


def flip(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


DAMAGES = {
    "first byte": lambda data, other: flip(data, 0),
    "a byte in the middle": lambda data, other: flip(data, len(data) // 2),
    "a byte near the end": lambda data, other: flip(data, len(data) - 9),
    "cut": lambda data, other: data[: len(data) // 2],
    "emptied": lambda data, other: b"",
    "longer": lambda data, other: data + b"\0",
    "of another folder": lambda data, other: other,
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_changed_is_named_with_its_folder(copy, folders, name, how):
    path = copy / name
    before = path.read_bytes()
    path.write_bytes(DAMAGES[how](before, (folders[1] / name).read_bytes()))
    if path.read_bytes() == before:  # both folders have the same
        return
    with pytest.raises((ValueError, OSError)) as error:
        Prepared(copy, "train")
    assert str(copy) in str(error.value) and name.rpartition("/")[2].partition(".")[0][:8] in str(error.value)


@pytest.mark.parametrize("kind", ["index_{}.npz", "records/conversations/1.0.0/conversations-{}.array_record-00000"])
def test_splits_that_changed_places_are_named(copy, kind):
    train, validation = (copy / kind.format(split) for split in ("train", "validation"))
    train.rename(copy / "aside")
    validation.rename(train)
    (copy / "aside").rename(validation)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=rf"{copy}.*"):
            Prepared(copy, split)


@pytest.mark.parametrize("key", ["fingerprint", "builder", "template", "splits"])
def test_a_changed_value_of_prepared_json_is_named(copy, key):
    about = json.loads((copy / "prepared.json").read_text())
    other = {"fingerprint": "0" * 64, "builder": "other/1.0.0", "template": "qa"}
    about[key] = other.get(key) or {split: n | {"images": 3} for split, n in about["splits"].items()}
    (copy / "prepared.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"prepared\.json is damaged: it is not as `lmm prepare` wrote it"):
        Prepared(copy, "train")


def test_a_folder_of_an_earlier_version_is_read_and_told(copy, capsys):
    about = json.loads((copy / "prepared.json").read_text())
    del about["files"], about["digest"]
    (copy / "prepared.json").write_text(json.dumps(about))
    assert len(Prepared(copy, "train")) == 15
    assert "was prepared by an earlier version, without digests" in capsys.readouterr().err


def test_a_file_of_records_is_read_through_once_on_a_machine(copy, monkeypatch, tmp_path):
    monkeypatch.setenv("LMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "REMEMBERED", 1 << 14)
    read = []
    monkeypatch.setattr(
        digests, "_sha256", lambda file, bar=None, real=digests._sha256: read.append(file.name) or real(file)
    )
    for _ in range(2):
        Prepared(copy, "train")
    assert sum("array_record" in name for name in read) == 1 and read.count("index_train.npz") == 2
    file = copy / READ[-1]
    data = file.read_bytes()
    file.write_bytes(flip(data, 70_000))
    with pytest.raises(ValueError, match="holds other bytes than were written"):
        Prepared(copy, "train")


def test_indices_that_contradict_themselves_are_named(copy):
    """Also in a folder without digests."""
    about = json.loads((copy / "prepared.json").read_text())
    del about["files"], about["digest"]
    (copy / "prepared.json").write_text(json.dumps(about))
    with np.load(copy / "index_train.npz") as f:
        sound = dict(f)
    for change in (
        {"turn_offsets": sound["turn_offsets"][::-1]},
        {"turn_offsets": sound["turn_offsets"].astype(np.int32)},
        {"turn_tokens": sound["turn_tokens"][:-1]},
        {"turn_tokens": -1 - sound["turn_tokens"]},
        {"image_sizes": sound["image_sizes"].reshape(-1)},
        {"turn_images": sound["turn_images"].astype(np.float32)},
        {"turn_images": sound["turn_images"] + 1},  # of which no record has any
        {"turn_supervised": sound["turn_tokens"] + 1},
        *(sides(sound, (width, 20)) for width in (0, 20_001, -5, 2**31 - 1)),
    ):
        np.savez(copy / "index_train.npz", **(sound | change))
        with pytest.raises(ValueError, match=r"index_train\.npz is damaged: "):
            Prepared(copy, "train")
    np.savez(copy / "index_train.npz", **(sound | sides(sound, (1, 20_000))))
    Prepared(copy, "train")


def sides(index, size):
    """The arrays of an index whose last record has a picture of that size."""
    offsets = index["image_offsets"].copy()
    offsets[-1] += 1
    return {"image_offsets": offsets, "image_sizes": np.array([size], np.int32)}


def test_an_index_takes_no_more_memory_than_it_has_bytes(copy):
    path = epath.Path(copy / "index_train.npz")
    with np.load(path) as f:
        sound = dict(f)
    np.savez_compressed(path, **(sound | {"turn_tokens": np.zeros(10_000_000, np.int32)}))
    assert path.stat().length < 100_000
    with pytest.raises(ValueError, match=r"index_train\.npz is missing or damaged: turn_\w+\.npy is compressed"):
        read(path)
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    for count in (10**9, 2**50, 1):  # of which there are two
        about = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({count},), }}".encode()
        with zipfile.ZipFile(path, "w") as f:
            f.writestr("turn_tokens.npy", start + about.ljust(117) + b"\n" + bytes(8))
        with pytest.raises(ValueError, match=rf"turn_tokens\.npy is said to be an array \({count},\) of int32"):
            read(path)


def test_the_same_rows_give_the_same_files_to_the_byte(tmp_path):
    for n in range(2):
        prepare_rows(rows(tmp_path, 40), None, tmp_path / f"out{n}", workers=n, validation=5)
    files = [
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "out0", tmp_path / "out1")
    ]
    assert len(files[0]) == 10 and files[0] == files[1]
