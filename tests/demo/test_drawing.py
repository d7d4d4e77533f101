"""A drawing is a picture with paths over it: the numbers of `regions`, and no word of a visitor as markup."""

import re

import numpy as np
import pytest
from PIL import Image

from lmm_jax.config import load_config, visual_layout
from lmm_jax.demo.drawing import COLOURS, caption, colour, draw
from lmm_jax.demo.regions import figures


@pytest.fixture(scope="module")
def drawn():
    visual = visual_layout(load_config("configs/digits.py:recipe=deepstack"))
    return figures(visual, (60, 36), 9)


def rectangles(svg, kind):
    """The areas of a path of a drawing, or of several of its kind."""
    number = r"(-?[\d.]+)"
    data = "".join(re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', svg))
    return np.array(re.findall(rf"M{number} {number}H{number}V{number}H[-\d.]+Z", data), float).reshape(-1, 4)


def test_the_paths_are_the_areas(drawn):
    names = [f"stack <{n}>" for n in range(4)]
    for figure in drawn:
        svg = draw(Image.new("RGB", (60, 36)), figure, names)
        np.testing.assert_allclose(rectangles(svg, "token"), figure.tokens, atol=0.01)
        np.testing.assert_allclose(rectangles(svg, "tile"), figure.tiles, atol=0.01)
        boxes = np.concatenate([np.zeros((0, 4)), *(boxes for _, boxes in figure.stacks)])
        np.testing.assert_allclose(rectangles(svg, "stack"), boxes, atol=0.01)
        assert 'viewBox="0 0 60 36"' in svg and svg.count("data:image/png;base64,") == 1
    assert "stack &lt;3&gt;" in svg and "<3>" not in svg
    assert all(f"fill:{colour(number)}" in svg for number in range(4)) and colour(4) not in svg


def test_captions_count(drawn):
    assert [caption(figure) for figure in drawn] == [
        "The whole picture: 9 visual tokens in the sequence",
        "2 × 2 tiles: 4 stacks added over the tokens",
    ]
    unpadded = visual_layout(load_config("configs/llava.py:view=next"))
    assert [caption(figure) for figure in figures(unpadded, (640, 400), 576)] == [
        "The whole picture: 576 visual tokens in the sequence",
        "2 × 2 tiles: 1,440 visual tokens in the sequence, 30 newlines at the ends of their rows, "
        "what is dimmed is left out",
    ]


def test_a_large_picture_is_shrunk_for_the_page(drawn):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1500, 3), np.uint8)
    svg = draw(Image.fromarray(noise), drawn[0], [])
    assert 'width="1500" height="900"' in svg and len(svg) < 1_500_000


def test_colours_begin_again():
    assert colour(len(COLOURS)) == colour(0) and len(set(COLOURS)) == len(COLOURS)
