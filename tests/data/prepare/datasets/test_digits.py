"""The digits: real scans, disjoint splits, true answers, a preparation that can be interrupted."""

import collections
import json

import numpy as np
import pytest

from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepare.datasets import digits
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns


def test_scans_are_all_there_and_splits_share_none():
    images, labels = digits.load_scans()
    assert images.shape == (1797, 8, 8) and images.max() == 16 and len(labels) == 1797
    splits = digits.split_scans()
    assert [len(s) for s in splits.values()] == list(digits.SCANS.values())
    assert len(set(np.concatenate(list(splits.values())))) == 1797


def test_cells_are_named_as_on_a_chess_board():
    assert digits.CELLS[0] == "a3" and digits.CELLS[2] == "c3" and digits.CELLS[6] == "a1"


def test_answers_are_true():
    rng = np.random.default_rng(1)
    kinds = collections.Counter()
    for _ in range(300):
        nine = rng.integers(0, 10, 9).astype(np.uint8)
        turns = digits.questions(nine, rng)
        assert turns[-1] == ("read all", " ".join(map(str, nine)), "read")
        for question, answer, kind in turns:
            kinds[kind] += 1
            if kind == "cell":
                cell = question.removeprefix("digit at ").rstrip("?")
                row, column = 3 - int(cell[1]), "abc".index(cell[0])
                assert answer == str(nine.reshape(3, 3)[row, column])
            elif kind == "count":
                assert int(answer) == list(nine).count(int(question.removeprefix("how many ")[0]))
            elif kind == "exists":
                assert answer == ("yes" if int(question[-2]) in nine else "no")
            elif kind == "largest":
                assert int(answer) == max(nine)
    assert set(kinds) == set(digits.KINDS)


def test_stored_rows_hold_the_mosaic_and_its_truth(digits_folder):
    images, labels = digits.load_scans()
    templates = {digits.mosaic(np.repeat(images[i : i + 1], 9, 0))[:8, :8].tobytes(): i for i in range(1797)}
    for split in digits.SCANS:
        data = Prepared(digits_folder, split)
        allowed = set(digits.split_scans()[split])
        for row in range(8):
            pixels = np.asarray(as_pictures(data[row])[0])[..., 0]
            cells = pixels.reshape(3, 8, 3, 8).swapaxes(1, 2).reshape(9, 8, 8)
            scans = [templates[cell.tobytes()] for cell in cells]
            assert set(scans) <= allowed
            assert as_turns(data[row])[-1][1] == " ".join(str(labels[i]) for i in scans)


def test_the_index_counts_what_is_there(digits_folder):
    data = Prepared(digits_folder, "train")
    assert len(data) == 64 and (data.index["image_sizes"] == 24).all() and len(data.index["image_sizes"]) == 64
    assert data.about["splits"]["validation"] == {"rows": 32, "images": 32}
    ends = data.index["turn_offsets"][1:] - 1
    # Answers and end pieces: nine digits read, and five one-piece answers where there are other turns.
    assert set(data.index["turn_supervised"][ends]) <= {10, 20}


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
