"""Reading a prepared folder."""

import json

import pytest

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
