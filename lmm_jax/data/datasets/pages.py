"""Pages of small print: a 3-digit number in each of 4×4 cells, to be read only at high resolution.

Pictures are drawn by Pillow in the fonts that matplotlib ships, a family a split, so that validation and test pages
are in unseen print. The same seed gives the same pixels with the same FreeType. Cells are named as on a chess board:
columns a to d from the left, rows 1 to 4 from the bottom.
"""

import functools
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 4
CELLS = tuple(f"{column}{row}" for row in (4, 3, 2, 1) for column in "abcd")  # reading order, top left first
KINDS = ("cell", "read")

PIXELS = 128  # side of a page
HEIGHT = (7, 9)  # of a digit, pixels
JITTER = 2  # pixels that a number stands off the middle of its cell, at most
PAPER = (215, 256)  # levels of light, the last not among them
TINT = 16  # levels of red that each column has less than the one before, and of blue each row
INK = (165, 256)  # levels of light that are taken away, of 255
FINER = 4  # pages are drawn so many times as large, then averaged: places and heights are fractions of a pixel

ROWS = {"train": 20_000, "validation": 500, "test": 2_000}
FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    ),
    "validation": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "test": ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
}


@functools.cache
def load_font(name, height):
    """The font in which the digit 0 is `height` pixels high.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pages are printed in matplotlib's fonts: pip install 'lmm_jax[plots]'") from error
    path, size = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), 1000
    basic = ImageFont.Layout.BASIC  # the same with and without Raqm
    rows = ImageFont.truetype(path, size, layout_engine=basic).getmask("0").size[1]
    return ImageFont.truetype(path, size * height / rows, layout_engine=basic)


def page(numbers, fonts, rng) -> Image.Image:
    """Prints numbers into their cells: an RGB picture of `PIXELS` × `PIXELS`.

    Columns have less and less red, rows less and less blue, so that cells can be told apart at any resolution.

    Args:
      numbers: `[16]` int in reading order.
      fonts: names to choose from, for each number.
      rng: also decides heights, places and grey levels.
    """
    cell = PIXELS * FINER // SIDE
    light, tint = rng.integers(*PAPER), TINT * np.repeat(np.arange(SIDE), PIXELS // SIDE)
    paper = np.full((PIXELS, PIXELS, 3), float(light))
    paper[..., 0] -= tint
    paper[..., 2] -= tint[:, None]
    ink = Image.new("L", (SIDE * cell, SIDE * cell))
    draw = ImageDraw.Draw(ink)
    for n, number in enumerate(numbers):
        height = int(rng.integers(HEIGHT[0] * FINER, HEIGHT[1] * FINER, endpoint=True))
        font = load_font(fonts[rng.integers(len(fonts))], height)
        across, down = rng.integers(-JITTER * FINER, JITTER * FINER, 2, endpoint=True)
        middle = n % SIDE * cell + cell // 2 + int(across)
        top = n // SIDE * cell + (cell - height) // 2 + int(down)
        draw.text((middle, top), str(number), int(rng.integers(*INK)), font, anchor="mt")
    left = 1 - np.asarray(ink.reduce(FINER))[..., None] / 255
    return Image.fromarray((paper * left).round().astype(np.uint8))


def questions(numbers, split, rng):
    """Question, answer and kind of each turn about 16 numbers in reading order; no turn tells a later one's answer.

    Ten cells in any order, or the whole; of a test page one cell and the whole. Digits stand apart, a piece each.
    """
    digits = [" ".join(str(number)) for number in numbers]
    cells = [(f"read {CELLS[n]}", digits[n], "cell") for n in rng.permutation(SIDE * SIDE)[:10]]
    whole = ("read all", " ".join(digits), "read")
    if split == "test":
        return [cells[0], whole]
    return cells if rng.random() < 1 / 2 else [whole]


def records(split, rows):
    """Yields `rows` conversations about pages of `split`, as `datasets.conversations` stores them."""
    for i in range(rows):
        rng = np.random.default_rng((list(ROWS).index(split), i))
        numbers = rng.integers(100, 1000, SIDE * SIDE)
        picture = io.BytesIO()
        page(numbers, FONTS[split], rng).save(picture, "png")
        turns = []
        for n, (question, answer, kind) in enumerate(questions(numbers, split, rng)):
            tag = "<image>\n" if n == 0 else ""
            turns.append({"role": "user", "text": tag + question, "kind": kind})
            turns.append({"role": "assistant", "text": answer, "kind": kind})
        yield {"id": f"{split}-{i}", "images": [picture.getvalue()], "turns": turns}
