"""Pages of small print: 4 lines of 4 digits, to be read only at high resolution.

Pictures are drawn by Pillow in the fonts that matplotlib ships; validation and test pages are in families that
training never sees. The same seed gives the same pixels with the same FreeType. Cells are named as on a chess board:
columns a to d from the left, lines 1 to 4 from the bottom.
"""

import functools
import io
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 4
CELLS = tuple(f"{column}{row}" for row in (4, 3, 2, 1) for column in "abcd")  # reading order, top left first
KINDS = ("cell", "line", "read")

PIXELS = 64  # side of a page
HEIGHT = (7, 9)  # of a digit, pixels
JITTER = 2  # pixels that a digit stands off the middle of its cell, at most
PAPER = (215, 256)  # levels of light, the last not among them
INK = (165, 256)  # levels of light that are taken away, of 255
FINER = 4  # pages are drawn so many times as large, then averaged: places and heights are fractions of a pixel

ROWS = {"train": 40_000, "validation": 500, "test": 2_000}
FONTS = {
    "train": (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
        *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
        *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    ),
    "validation": ("cmss10", "cmtt10"),
    "test": ("cmr10", "cmb10", "cmti10"),
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


def page(digits, fonts, rng) -> Image.Image:
    """Prints digits into their cells: a grey picture of `PIXELS` × `PIXELS`.

    Args:
      digits: `[16]` int in reading order.
      fonts: names to choose from, for each digit.
      rng: also decides heights, places and grey levels.
    """
    cell = PIXELS * FINER // SIDE
    ink = Image.new("L", (SIDE * cell, SIDE * cell))
    draw = ImageDraw.Draw(ink)
    for n, digit in enumerate(digits):
        height = int(rng.integers(HEIGHT[0] * FINER, HEIGHT[1] * FINER, endpoint=True))
        font = load_font(fonts[rng.integers(len(fonts))], height)
        across, down = rng.integers(-JITTER * FINER, JITTER * FINER, 2, endpoint=True)
        middle = n % SIDE * cell + cell // 2 + int(across)
        top = n // SIDE * cell + (cell - height) // 2 + int(down)
        draw.text((middle, top), str(digit), int(rng.integers(*INK)), font, anchor="mt")
    left = 1 - np.asarray(ink.reduce(FINER)) / 255
    return Image.fromarray((rng.integers(*PAPER) * left).round().astype(np.uint8))


def questions(digits, rng):
    """Question, answer and kind of each turn about 16 digits in reading order; the last turn reads them all."""
    cells = [(f"digit at {CELLS[n]}?", str(digits[n]), "cell") for n in rng.permutation(SIDE * SIDE)[:3]]
    lines = [
        (f"line {SIDE - n}", " ".join(map(str, digits[n * SIDE : (n + 1) * SIDE])), "line")
        for n in rng.permutation(SIDE)[:2]
    ]
    asked = [*cells, *lines]
    asked = [asked[i] for i in rng.permutation(len(asked))]
    return [*asked, ("read all", " ".join(map(str, digits)), "read")]


def check(source):
    """What is wrong: a source, as there is none to read, and missing fonts."""
    faults = [] if source is None else [f"data set pages is drawn and takes no source, but was given {source}"]
    try:
        load_font(FONTS["train"][0], HEIGHT[0])
    except ImportError as error:
        faults.append(str(error))
    return faults


def records(source, split, rows):
    """Yields `rows` conversations about pages of `split`; `source` is None, as they are drawn."""
    for i in range(rows):
        rng = np.random.default_rng((list(ROWS).index(split), i))
        digits = rng.integers(0, 10, SIDE * SIDE)
        picture = io.BytesIO()
        page(digits, FONTS[split], rng).save(picture, "png")
        asked = questions(digits, rng)
        if rng.random() > 1 / 2 and split != "test":
            asked = asked[-1:]  # reading must not need the turns before it
        turns = []
        for n, (question, answer, kind) in enumerate(asked):
            tag = "<image>\n" if n == 0 else ""
            turns.append({"role": "user", "text": tag + question, "kind": kind})
            turns.append({"role": "assistant", "text": answer, "kind": kind})
        yield {"id": f"{split}-{i}", "images": [picture.getvalue()], "turns": turns}
