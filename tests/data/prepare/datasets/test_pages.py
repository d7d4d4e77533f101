"""The pages: the same each time, each split in print of its own, answers true to the picture."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from lmm_jax import cli
from lmm_jax.data.prepare.datasets import pages
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns

CELL = pages.PIXELS // pages.SIDE


def digits_told(turns):
    """Digits by place `(row, column)` from the top left, as the turns tell them."""
    told = {}
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        question, digits = question.text.removeprefix("<image>\n"), answer.text.split()
        if question == "read all":
            places = list(np.ndindex(4, 4))
        elif question.startswith("line "):
            places = [(4 - int(question[5]), column) for column in range(4)]
        else:
            where = question.removeprefix("digit at ").removesuffix("?")
            places = [(4 - int(where[1]), "abcd".index(where[0]))]
        for place, digit in zip(places, digits, strict=True):
            assert told.setdefault(place, int(digit)) == int(digit)
    return told


@pytest.mark.parametrize("split", pages.ROWS)
def test_the_same_rows_come_each_time(split):
    first, again = list(pages.records(None, split, 4)), list(pages.records(None, split, 3))
    assert first[:3] == again
    assert len({record["images"][0] for record in first}) == 4
    assert Image.open(io.BytesIO(first[0]["images"][0])).size == (64, 64)


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
    assert families == {"train": {"De", "ST"}, "validation": {"cm"}, "test": {"cm"}}


def test_a_digit_stands_in_its_cell_alone():
    fonts = [name for names in pages.FONTS.values() for name in names]
    for seed in range(100):
        digits = np.random.default_rng(seed).integers(0, 10, 16)
        other = digits.copy()
        other[seed % 16] = (other[seed % 16] + 5) % 10
        before, after = (np.asarray(pages.page(n, fonts, np.random.default_rng(seed))) for n in (digits, other))
        rows, columns = np.nonzero(before != after)
        assert set(rows // CELL * 4 + columns // CELL) == {seed % 16}


def test_paper_is_even_and_light_and_ink_is_dark_at_any_resolution():
    page = pages.page(np.ones(16, int), pages.FONTS["test"], np.random.default_rng(0))
    for side in (64, 32):
        picture = np.asarray(page.resize((side, side), Image.Resampling.BOX)).astype(int)
        cells = picture.reshape(4, side // 4, 4, side // 4).swapaxes(1, 2).reshape(16, -1)
        assert len(set(cells.max(axis=1))) == 1 and cells.max() >= 215
        assert (cells.min(axis=1) < cells.max(axis=1) - 60).all()


def test_answers_are_true_and_each_is_told_alike(pages_folder):
    seen = set()
    for number, split in enumerate(pages.ROWS):
        data = Prepared(pages_folder, split)
        for row in range(len(data)):
            turns = as_turns(data[row])
            told = digits_told(turns)
            rng = np.random.default_rng((number, row))
            truth = rng.integers(0, 10, 16).reshape(4, 4)
            assert all(truth[place] == value for place, value in told.items())
            assert len({turn.text for turn in turns if turn.role == "user"}) == len(turns) // 2
            drawn = pages.page(truth.ravel(), pages.FONTS[split], rng)
            assert (np.asarray(as_pictures(data[row])[0].convert("L")) == np.asarray(drawn)).all()
            seen.add((split, len(turns), len(told)))
    # Three cells, two lines and the whole page, or the whole alone; of a test page always all.
    others = {(split, turns, 16) for split in ("train", "validation") for turns in (2, 12)}
    assert seen == others | {("test", 12, 16)}


def test_a_digit_is_a_piece_and_so_is_a_cell(pages_folder):
    tokenizer = Prepared(pages_folder, "train").tokenizer
    assert len(tokenizer.encode("4 7 1 2 0 3")) == 6
    assert len(tokenizer.encode("digit at b2?")) <= 4


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pages.load_font.cache_clear()
    assert cli.main(["prepare", "--dataset", "pages", "--out", str(tmp_path / "data")]) == 2
    assert (
        "lmm: error: pages are printed in matplotlib's fonts: pip install 'lmm_jax[plots]'" in capsys.readouterr().err
    )
