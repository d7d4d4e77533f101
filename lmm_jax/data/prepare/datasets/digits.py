"""Real handwriting at the smallest useful size: 3×3 mosaics of scanned digits, with questions of several grains.

The 1,797 scans are the UCI optical-recognition set (CC BY 4.0, see digits.LICENSE.txt). Train, validation and test
mosaics use different scans. Cells are named as on a chess board: columns a to c from the left, rows 1 to 3 from
the bottom.
"""

import importlib.resources
import io

import numpy as np
from PIL import Image

SIDE = 3
CELLS = tuple(f"{column}{row}" for row in (3, 2, 1) for column in "abc")  # reading order, top left first
KINDS = ("cell", "count", "exists", "largest", "read")

# Scans and mosaics (one a row) of each split.
SCANS = {"train": 1300, "validation": 197, "test": 300}
ROWS = {"train": 40_000, "validation": 500, "test": 3_000}


def load_scans():
    """The bundled scans: images `[1797, 8, 8]` uint8 in 0..16 and labels `[1797]` uint8."""
    with importlib.resources.files(__package__).joinpath("digits.npz").open("rb") as f:
        data = np.load(f)
        return data["images"], data["labels"]


def split_scans():
    """Index arrays of the scans of each split; a fixed permutation, so that splits never share a scan."""
    order = np.random.default_rng(0).permutation(sum(SCANS.values()))
    ends = np.cumsum(list(SCANS.values()))
    return dict(zip(SCANS, np.split(order, ends[:-1]), strict=True))


def mosaic(scans) -> np.ndarray:
    """`[9, 8, 8]` scans in reading order to a `[24, 24]` uint8 picture, ink dark on white paper."""
    rows = scans.reshape(SIDE, SIDE, *scans.shape[1:]).swapaxes(1, 2).reshape(SIDE * 8, SIDE * 8)
    return (255 - rows.astype(np.int32) * 255 // 16).astype(np.uint8)


def questions(digits, rng):
    """Question, answer and kind of each turn about nine digits in reading order; the last turn reads them all."""
    turns = []
    for cell in rng.choice(9, 2, replace=False):
        turns.append((f"digit at {CELLS[cell]}?", str(digits[cell]), "cell"))
    asked = rng.choice(digits) if rng.random() < 0.5 else rng.integers(10)
    turns.append((f"how many {asked}s", str(int((digits == asked).sum())), "count"))
    absent = np.setdiff1d(np.arange(10), digits)
    asked = rng.choice(absent) if rng.random() < 0.5 else rng.choice(digits)
    turns.append((f"is there a {asked}?", "yes" if asked in digits else "no", "exists"))
    turns.append(("largest digit", str(digits.max()), "largest"))
    turns = [turns[i] for i in rng.permutation(len(turns))]
    return [*turns, ("read all", " ".join(map(str, digits)), "read")]


def check(source):
    """What is wrong with a source: that there is one."""
    return [] if source is None else [f"data set digits is bundled and takes no source, but was given {source}"]


def records(source, split, rows):
    """Yields `rows` conversations about mosaics of `split`; `source` is None, as the scans are bundled."""
    images, labels = load_scans()
    scans = split_scans()[split]
    for i in range(rows):
        rng = np.random.default_rng((list(SCANS).index(split), i))
        chosen = rng.choice(scans, SIDE * SIDE, replace=False)
        asked = questions(labels[chosen], rng)
        if rng.random() > 5 / 6 and split != "test":
            asked = asked[-1:]  # reading must not need the turns before it
        turns = []
        for n, (question, answer, kind) in enumerate(asked):
            tag = "<image>\n" if n == 0 else ""
            turns.append({"role": "user", "text": tag + question, "kind": kind})
            turns.append({"role": "assistant", "text": answer, "kind": kind})
        picture = io.BytesIO()
        Image.fromarray(mosaic(images[chosen])).save(picture, "png")
        yield {"id": f"{split}-{i}", "images": [picture.getvalue()], "turns": turns}
