"""The pages: the same each time, each split in print of its own, answers true to the picture."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from lmm_jax import cli
from lmm_jax.data.datasets import pages
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns

CELL = pages.PIXELS // pages.SIDE


def numbers_told(turns):
    """Numbers by place `(row, column)` from the top left, as the turns tell them."""
    told = {}
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        *_, where = question.split()
        places = list(np.ndindex(4, 4)) if where == "all" else [(4 - int(where[1]), "abcd".index(where[0]))]
        digits = answer.split()
        assert len(digits) == 3 * len(places)
        for n, place in enumerate(places):
            number = int("".join(digits[3 * n : 3 * n + 3]))
            assert told.setdefault(place, number) == number
    return told


@pytest.mark.parametrize("split", pages.ROWS)
def test_the_same_rows_come_each_time(split):
    first, again = list(pages.records(split, 4)), list(pages.records(split, 3))
    assert first[:3] == again
    assert len({record["images"][0] for record in first}) == 4
    assert Image.open(io.BytesIO(first[0]["images"][0])).size == (128, 128)


def test_splits_share_no_family_and_every_font_has_ten_digits():
    families = {}
    for split, names in pages.FONTS.items():
        assert len(set(names)) == len(names)
        for name in names:
            font = pages.load_font(name, 32)
            families.setdefault(split, set()).add(font.getname()[0][:2])
            shapes = [font.getmask(digit) for digit in "0123456789"]
            assert len({bytes(shape) for shape in shapes}) == 10, name
            assert all(np.max(shape) > 0 and abs(shape.size[1] - 32) <= 5 for shape in shapes[:4]), name
    assert families == {"train": {"De"}, "validation": {"ST"}, "test": {"cm"}}


def test_a_number_stands_in_its_cell_alone():
    fonts = [name for names in pages.FONTS.values() for name in names]
    for seed in range(100):
        numbers = np.random.default_rng(seed).integers(100, 1000, 16)
        other = numbers.copy()
        other[seed % 16] = 1099 - other[seed % 16]
        before, after = (np.asarray(pages.page(n, fonts, np.random.default_rng(seed))) for n in (numbers, other))
        rows, columns, _ = np.nonzero(before != after)
        assert set(rows // CELL * 4 + columns // CELL) == {seed % 16}


def test_a_cell_has_its_tint_and_dark_ink_at_any_resolution():
    page = pages.page(np.full(16, 111), pages.FONTS["test"], np.random.default_rng(0))
    for side in (128, 64):
        picture = np.asarray(page.resize((side, side), Image.Resampling.BOX)).astype(int)
        cells = picture.reshape(4, side // 4, 4, side // 4, 3).swapaxes(1, 2).reshape(4, 4, -1, 3)
        paper = cells.max(axis=2)
        light = paper[..., 1]
        assert (light == light[0, 0]).all() and light[0, 0] >= 215
        assert (light - paper[..., 0] == pages.TINT * np.arange(4)).all()
        assert (light - paper[..., 2] == pages.TINT * np.arange(4)[:, None]).all()
        assert (cells.min(axis=2) < paper - 60).all()


def test_answers_are_true_and_told_once(pages_folder):
    seen = set()
    for number, split in enumerate(pages.ROWS):
        data = Prepared(pages_folder, split)
        for row in range(len(data)):
            turns = as_turns(data[row])
            told = numbers_told(turns)
            rng = np.random.default_rng((number, row))
            truth = rng.integers(100, 1000, 16).reshape(4, 4)
            assert all(truth[place] == value for place, value in told.items())
            assert len({question for role, question in turns if role == "user"}) == len(turns) // 2
            drawn = pages.page(truth.ravel(), pages.FONTS[split], rng)
            assert (np.asarray(as_pictures(data[row])[0]) == np.asarray(drawn)).all()
            seen.add((split, len(turns), len(told)))
    # Ten cells, or the whole page; of a test page both a cell and the whole.
    others = {("train", 20, 10), ("train", 2, 16), ("validation", 20, 10), ("validation", 2, 16)}
    assert seen == others | {("test", 4, 16)}


def test_a_digit_is_a_piece_and_so_is_a_cell(pages_folder):
    tokenizer = Prepared(pages_folder, "train").tokenizer
    assert len(tokenizer.encode("4 7 1 2 0 3")) == 6
    assert len(tokenizer.encode("read b2")) == 2


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pages.load_font.cache_clear()
    assert cli.main(["prepare", "--dataset", "pages", "--out", str(tmp_path / "data")]) == 2
    assert (
        "lmm: error: pages are printed in matplotlib's fonts: pip install 'lmm_jax[plots]'" in capsys.readouterr().err
    )
