"""Pages of small print: a 3-digit number somewhere in each of 3×3 cells, readable only at high resolution.

Pictures are drawn by Pillow in the fonts that matplotlib ships; train, validation and test pages use different
families, so that a test page is in unseen print. Cells are named as those of `datasets.digits`.
"""

import functools
import importlib.util
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 4
CELLS = tuple(f"{column}{row}" for row in (4, 3, 2, 1) for column in "abcd")  # reading order, top left first
PIXELS = 128  # side of a page
HEIGHT = (7.0, 9.0)  # of a digit, pixels
JITTER = 2  # pixels that a number is off its cell's centre, at most
PAPER = (205, 256)  # grey levels
INK = (0, 90)
FINER = 4  # pages are drawn so many times as large, then averaged: positions and heights are fractions of a pixel

KINDS = ("cell", "row")
PAGES = {"train": 30_000, "validation": 500, "test": 3_000}
FONTS = {
    "train": tuple(
        f"DejaVu{family}{style}"
        for family, slant in (("Sans", "Oblique"), ("SansMono", "Oblique"), ("Serif", "Italic"))
        for style in ("", "-Bold", f"-{slant}", f"-Bold{slant}")
    ),
    "validation": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "test": ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
}


def font_folder():
    """Where matplotlib keeps its fonts.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the pages are printed in matplotlib's fonts: pip install 'lmm_jax[plots]'")
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf")


@functools.cache
def load_font(folder, name, height):
    """The font whose digit 0 is `height` pixels high."""
    path, unit = os.path.join(folder, f"{name}.ttf"), 1000
    basic = ImageFont.Layout.BASIC  # the same wherever, with Raqm or without
    _, rows = ImageFont.truetype(path, unit, layout_engine=basic).getmask("0").size
    return ImageFont.truetype(path, unit * height / rows, layout_engine=basic)


def page(numbers, fonts, rng) -> Image.Image:
    """Prints nine numbers, in reading order, each in its cell; a grey picture of `PIXELS` × `PIXELS`.

    Args:
      numbers: `[9]` int.
      fonts: names to choose from.
      rng: decides font, height, place and grey levels.
    """
    cell, folder = PIXELS * FINER // SIDE, font_folder()
    picture = Image.new("L", (SIDE * cell, SIDE * cell), int(rng.integers(*PAPER)))
    draw = ImageDraw.Draw(picture)
    for n, number in enumerate(numbers):
        height = int(rng.integers(HEIGHT[0] * FINER, HEIGHT[1] * FINER, endpoint=True))
        font = load_font(folder, fonts[rng.integers(len(fonts))], height)
        off = rng.integers(-JITTER * FINER, JITTER * FINER, 2, endpoint=True)
        left, top = (cell - np.array(font.getmask(str(number)).size)) // 2 + off
        place = int(n % SIDE * cell + left), int(n // SIDE * cell + top)
        draw.text(place, str(number), int(rng.integers(*INK)), font, anchor="lt")
    return picture.reduce(FINER)


def questions(numbers, split, rng):
    """Question, answer and kind of each turn; no answer is told by the turns before it."""
    rows = [
        (f"read row {SIDE - r}", " ".join(map(str, numbers[r * SIDE : (r + 1) * SIDE])), "row")
        for r in rng.permutation(SIDE)
    ]
    cells = [(f"read {CELLS[i]}", str(numbers[i]), "cell") for i in rng.permutation(len(numbers))]
    if split == "test":
        return [cells[0], rows[0]]
    return cells[:10] if rng.random() < 1 / 2 else rows


def records(split, rows):
    """Yields `rows` conversations about pages of `split`, as `datasets.conversations` stores them."""
    for i in range(rows):
        rng = np.random.default_rng((list(PAGES).index(split), i))
        numbers = rng.integers(100, 1000, SIDE * SIDE)
        file = io.BytesIO()
        page(numbers, FONTS[split], rng).save(file, "png")
        turns = []
        for n, (question, answer, kind) in enumerate(questions(numbers, split, rng)):
            tag = "<image>\n" if n == 0 else ""
            turns.append({"role": "user", "text": tag + question, "kind": kind})
            turns.append({"role": "assistant", "text": answer, "kind": kind})
        yield {"id": f"{split}-{i}", "images": [file.getvalue()], "turns": turns}
