"""The digits: real scans, disjoint splits, true answers, a preparation that can be interrupted."""

import collections

import numpy as np

from lmm_jax.data.prepare.datasets import digits
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
