"""Workdirs and data in a bucket, against an emulator of Google Cloud Storage in this process."""

import errno
import json
import os
import pathlib
import time

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import load_file, save

import lmm_jax as lmm
from lmm_jax import evaluation, storage
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.tokenizer.sentencepiece import train_tokenizer
from lmm_jax.hf.safetensors import Folder
from lmm_jax.tools import plots
from lmm_jax.training import loop
from lmm_jax.training.metrics import read_metrics
from tests.parity.reference import write_folder
from tests.release.recipes import LINES
from tests.runs import asked_to_stop


@pytest.fixture(scope="module")
def data(bucket, digits_folder):
    """The prepared digits, copied to the bucket."""
    for file in pathlib.Path(digits_folder).rglob("*"):
        if file.is_file():
            (bucket / "data" / str(file.relative_to(digits_folder))).write_bytes(file.read_bytes())
    return bucket / "data"


def test_paths_in_a_bucket_stay_there():
    assert str(storage.absolute("gs://bucket/run")) == "gs://bucket/run"
    assert str(storage.absolute("runs")) == os.path.abspath("runs")


def test_lines_are_added_to_what_is_there(bucket, tmp_path):
    for path in (bucket / "lines", epath.Path(tmp_path / "lines")):
        for words in (["a", "b"], ["c"]):
            lines = storage.Lines(path)
            for word in words:
                lines.add([word])
            lines.flush()
        assert path.read_text() == "a\nb\nc\n"


def test_lines_wait_while_their_place_cannot_be_reached(bucket, tmp_path, monkeypatch):
    away, real = [ConnectionResetError(errno.ECONNRESET, "reset")], epath.Path(bucket).__class__.write_text

    def write(path, text):
        if away:
            raise away[0]
        return real(path, text)

    lines = storage.Lines(bucket / "waiting")
    monkeypatch.setattr(lines.path.__class__, "write_text", write)
    lines.add(["a"])
    lines.flush()
    lines.add(["b"])
    with pytest.raises(ConnectionResetError):
        lines.close()
    away.clear()
    lines.close()
    assert (bucket / "waiting").read_text() == "a\nb\n"


def test_records_are_copied_once_and_a_broken_copy_is_mended(data, digits_folder, capsys, monkeypatch):
    prepared, local = Prepared(data, "train"), Prepared(digits_folder, "train")
    assert "copying gs://bucket/data/records to " in capsys.readouterr().out
    assert len(prepared) == len(local) and prepared[5]["images"] == local[5]["images"]
    (copy,) = pathlib.Path(os.environ[storage.CACHE]).glob("records-*")
    (file,) = copy.rglob("*train.array_record*")
    file.write_bytes(file.read_bytes()[:1000])
    assert Prepared(data, "train")[5]["images"] == local[5]["images"]
    assert ": 1 files" in capsys.readouterr().out
    data_of_file = file.read_bytes()
    file.write_bytes(data_of_file[:-1] + bytes([data_of_file[-1] ^ 1]))  # the size says nothing of that
    with pytest.raises(ValueError, match="is damaged: .* the same command copies it anew"):
        Prepared(data, "train")
    assert Prepared(data, "train")[5]["images"] == local[5]["images"] and file.read_bytes() == data_of_file
    capsys.readouterr()
    Prepared(data, "validation")
    assert capsys.readouterr().out == ""
    assert not list(copy.rglob("*.part-*"))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder of three files that is not of this machine's disk, of the sizes 10, 20 and 30."""
    files = fsspec.filesystem("memory")
    for n, name in enumerate(("a", "b", "deep/c"), start=1):
        files.pipe(f"/folder/{name}", bytes([n]) * 10 * n)
    monkeypatch.setenv(storage.CACHE, str(tmp_path))
    monkeypatch.setattr(storage, "AT_ONCE", 1)
    yield "memory://folder"
    files.rm("/folder", recursive=True)


def test_an_interrupted_copy_goes_on_by_whole_files(remote, tmp_path, monkeypatch, capsys):
    get_file = MemoryFileSystem.get_file

    def interrupted(self, path, part, **kwargs):
        get_file(self, path, part, **kwargs)
        if path.endswith("b"):
            os.truncate(part, 5)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            storage.local_copy(remote, "copy")
    (copy,) = tmp_path.iterdir()
    assert (copy / "a").stat().st_size == 10 and not (copy / "b").exists()
    capsys.readouterr()
    assert storage.local_copy(remote, "copy") == epath.Path(copy)
    assert ": 2 files" in capsys.readouterr().out
    assert (copy / "b").read_bytes() == b"\2" * 20 and (copy / "deep/c").read_bytes() == b"\3" * 30


def test_a_copy_of_another_size_is_an_error_and_no_file(remote, tmp_path, monkeypatch):
    get_file = MemoryFileSystem.get_file

    def cut(self, path, part, **kwargs):
        get_file(self, path, part, **kwargs)
        os.truncate(part, 5)

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    with pytest.raises(OSError, match=r"folder/a has 10 bytes, its copy .* 5"):
        storage.local_copy(remote, "copy")
    assert not list(tmp_path.rglob("a"))


def test_no_key_chooses_where_a_copy_lies(remote, tmp_path):
    """The cache holds compiled programs and models too, and another folder may say that it has the same key."""
    other = remote.replace("folder", "other")
    fsspec.filesystem("memory").pipe("/other/a", b"x" * 10)
    keys = ("compiled", "0" * 24, "../outside", "/etc", "", "verified")
    copies = {storage.local_copy(folder, key) for folder in (remote, other) for key in keys}
    assert len(copies) == 12 and {copy.parent for copy in copies} == {epath.Path(tmp_path)}
    assert all(copy.name.startswith("records-") for copy in copies)


def test_the_bar_counts_bytes_of_all_files(remote, monkeypatch):
    bars = []

    class Bar(storage.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(storage, "tqdm", lambda **kwargs: Bar(**kwargs | {"disable": False}))
    monkeypatch.setattr(storage, "AT_ONCE", 2)
    storage.local_copy(remote, "copy")
    assert bars[0] == (60, 60)


def test_a_model_is_read_from_a_bucket_and_copied_again_if_it_changed(bucket, golden, tmp_path, capsys):
    about = json.loads((golden / "m3/config.json").read_text())
    keys = about["text"] | about["mm"] | {"matryoshka_vis_token_scale": about["scales"], "image_aspect_ratio": "pad"}
    folder = write_folder(golden / "m3", tmp_path / "model", keys, about["vision"])
    (folder / "tokenizer.model").write_bytes(train_tokenizer(LINES, 120))  # fewer pieces than the table has rows
    for file in folder.rglob("*.*"):
        (bucket / "model" / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    local = lmm.load(folder)
    for copied in (True, False):
        model = lmm.load("gs://bucket/model")
        jax.tree.map(np.testing.assert_array_equal, local.params, model.params)
        assert ("copying gs://bucket/model to " in capsys.readouterr().out) == copied
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    time.sleep(1.1)  # the time of a file in a bucket is of seconds here
    (bucket / "model/model.safetensors").write_bytes(save(weights))
    found = Folder("gs://bucket/model").read("model.norm.weight")
    np.testing.assert_array_equal(found, weights["model.norm.weight"])


def test_a_run_lives_in_a_bucket(data, bucket, tiny, capsys):
    workdir = bucket / "run"
    config = tiny(f"data.path={data}", "train.log_every=1", "train.save_every=2", "train.steps=6")
    with asked_to_stop(3), pytest.raises(loop.Preempted, match="step 3 is saved"):
        lmm.train(config, str(workdir))
    assert "Ctrl-C once more quits" in capsys.readouterr().err
    result = lmm.train(config, str(workdir))
    assert f"continuing {workdir} from step 3 of 6" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 7)) and result["step"] == 6
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [4, 6]
    assert not pathlib.Path("gs:").exists()
    found = evaluation.evaluate(str(workdir), ("digits",), (1,), limit=2)
    evaluation.save_results(found, workdir / "evaluation.json")
    assert json.loads((workdir / "evaluation.json").read_text()) == found
    assert (epath.Path(plots.draw_loss(str(workdir)))).read_bytes()[1:4] == b"PNG"


def test_preparing_into_a_bucket_is_refused(bucket):
    with pytest.raises(ValueError, match="gs://bucket/new: records are written to a disk"):
        prepare.prepare_dataset("digits", bucket / "new", rows=8)
