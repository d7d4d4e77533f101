"""Reading a prepared folder."""

import io
import json

import numpy as np
import pytest

from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared


def test_missing_or_altered_folders_are_named(digits_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="lmm prepare"):
        Prepared(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train', 'validation'\]"):
        Prepared(digits_folder, "dev")
    about = json.loads((digits_folder / "prepared.json").read_text())
    (tmp_path / "prepared.json").write_text(json.dumps({**about, "tokenizer": "other"}))
    (tmp_path / "tokenizer.model").write_bytes((digits_folder / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match="not the one"):
        Prepared(tmp_path, "train")


@pytest.fixture
def copy(tmp_path):
    """A prepared folder of three rows, to be damaged."""
    rows = [
        {"id": f"r{n}", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
        for n in range(3)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare_rows(tmp_path / "rows.json", None, tmp_path / "out", workers=0)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("splits", value)
            for value in ([], ["train"], {"train": 5}, {"train": {}}, {"train": {"rows": "3"}}, None)
        ),
        *((key, value) for key in ("builder", "template", "tokenizer", "fingerprint") for value in (3, None, ["x"])),
        *(("source", value) for value in ("x", [], None, {"dataset": ["digits"]}, {"dataset": {}}, {"dataset": 3})),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(copy, key, value):
    path = copy / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=f"prepared.json is damaged: {key} is .*; prepare the folder again"):
        Prepared(copy, "train")


def _records(folder):
    (path,) = folder.glob("records/*/*/*array_record*")
    return path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *(
            ((lambda d, text=text: (d / "prepared.json").write_text(text)), "damaged: ")
            for text in ("", "[]", "null", "1")
        ),
        (
            lambda d: (d / "prepared.json").write_bytes(b"\xff\xfe"),
            "prepared.json is damaged: .*prepare the folder again",
        ),
        (lambda d: [(d / "prepared.json").unlink(), (d / "prepared.json").mkdir()], "prepared.json is damaged: .*"),
        (lambda d: (d / "index_train.npz").unlink(), "index_train.npz is missing or damaged"),
        (lambda d: (d / "index_train.npz").write_bytes(b""), "index_train.npz is missing or damaged"),
        (lambda d: (d / "index_train.npz").write_bytes(npy()), "index_train.npz is missing or damaged"),
        (lambda d: np.savez(d / "index_train.npz", a=np.array([{}])), "index_train.npz is damaged: it lacks turn"),
        (
            lambda d: np.savez(d / "index_train.npz", turn_offsets=np.arange(4)),
            "index_train.npz is damaged: it lacks turn_t",
        ),
        (lambda d: _records(d).unlink(), "records is missing or damaged"),
        (lambda d: _records(d).write_bytes(b""), "array_record.* is empty; copy or prepare the folder again"),
        (lambda d: (_records(d).parent / "dataset_info.json").write_text("{"), "records is missing or damaged"),
    ],
)
def test_a_damaged_file_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        Prepared(copy, "train")


def npy():
    """Bytes of an array, where a file of arrays is expected."""
    out = io.BytesIO()
    np.save(out, np.arange(4))
    return out.getvalue()


def test_a_folder_of_before_that_says_chatml_means_the_layout_of_yi(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"template": "chatml", "workers": 0}
    prepare_rows(tmp_path / "rows.json", None, tmp_path / "out", **flags)
    assert Prepared(tmp_path / "out", "train").about["template"] == "chatml"
    path = tmp_path / "out/prepared.json"
    about = json.loads(path.read_text())
    for content in (about, about["source"]):  # as they were before Qwen's layout had the name
        del content["template_names"]
    del about["files"], about["digest"]
    path.write_text(json.dumps(about))
    assert Prepared(tmp_path / "out", "train").about["template"] == "chatml_direct"
    with pytest.raises(FileExistsError, match="prepared from something else"):
        prepare_rows(tmp_path / "rows.json", None, tmp_path / "out", **flags)
