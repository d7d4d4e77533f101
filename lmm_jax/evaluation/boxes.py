"""Boxes that a model writes as text: referring expressions (RefCOCO), as lmms-eval 0.7.3 scores them.

A box is (left, top, right, bottom), each 0 … 1 of the picture's width or height.
"""

import re

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\s*\]")


def read_box(text) -> tuple[float, float, float, float]:
    """The first "[a, b, c, d]" of a text, zeros where there is none."""
    found = _BOX.search(text)
    return tuple(map(float, found.groups())) if found else (0.0, 0.0, 0.0, 0.0)


def overlap(a, b) -> float:
    """Intersection over union of two boxes; 0 of two boxes without area, where lmms-eval divides by zero."""
    width, height = (max(0, min(a[2 + n], b[2 + n]) - max(a[n], b[n])) for n in (0, 1))
    common = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - common
    return common / union if union else 0.0


def within(truth, box) -> float:
    """Whether the middle of `box` lies in `truth`."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return float(truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3])
