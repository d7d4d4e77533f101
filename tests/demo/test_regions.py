"""What is drawn over a picture is what stands in the sequence and in the stacks, cell for cell."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from lmm_jax.config import load_config, visual_layout
from lmm_jax.data.views import make_views
from lmm_jax.data.visual_layout import VisualLayout
from lmm_jax.demo.regions import figures, stack_features, token_windows, view_areas
from lmm_jax.models.encoders import make_encoder

CONFIGS = (
    *("digits.py", "digits.py:recipe=deepstack", "digits.py:recipe=deepstack_v", "llava.py:view=next"),
    *("deepstack.py", "deepstack.py:recipe=hd", "deepstack.py:recipe=v", "convllava.py", "hybrid.py"),
)
SIZES = ((640, 400), (300, 900), (24, 24))


@functools.cache
def layout(name):
    config = load_config(f"configs/{name}")
    return visual_layout(config), make_encoder(config.model).level_strides


def area(boxes):
    return ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_figures_hold_as_many_tokens_as_the_sequence(name, size):
    visual, strides = layout(name)
    for scale in visual.valid_scales[-3:]:
        drawn = figures(visual, size, scale, strides)
        assert sum(figure.in_sequence + figure.newlines for figure in drawn) == visual.tokens([size], scale)[0]
        for figure in drawn:  # every part of every view is a token, a stack or left out; none twice
            of_stacks = sum(area(boxes) for _, boxes in figure.stacks)
            whole = area(np.array([figure.box]))
            np.testing.assert_allclose(area(figure.tiles), whole, rtol=1e-6)
            if figure.in_sequence:
                np.testing.assert_allclose(area(figure.tokens) + area(figure.unused), whole, rtol=1e-6)
            if figure.stacks:
                np.testing.assert_allclose(of_stacks, whole, rtol=1e-6)


def test_a_padded_square_has_its_grid_over_the_square():
    visual, _ = layout("digits.py")
    (figure,) = figures(visual, (60, 36), 9)
    assert figure.box == (0, -12, 60, 48) and figure.in_sequence == 9 and not figure.stacks
    assert figure.tokens[0].tolist() == [0, -12, 20, 8] and figure.tokens[5].tolist() == [40, 8, 60, 28]
    (pooled,) = figures(visual, (60, 36), 1)
    assert pooled.tokens.tolist() == [[0, -12, 60, 48]]


def test_stacks_lie_in_tiles_under_their_tokens():
    """DeepStack-L as the glossary draws it: slot 0 has features 9, 10, 12 and 13."""
    visual, _ = layout("digits.py:recipe=deepstack")
    assert stack_features(visual, (2, 2))[:, 0, 0, 0].tolist() == [9, 10, 12, 13]
    whole, tiles = figures(visual, (60, 36), 9)
    assert (whole.in_sequence, tiles.in_sequence, len(tiles.tiles)) == (9, 0, 4)
    assert [boxes[0].tolist() for _, boxes in tiles.stacks] == [
        [0, 0, 10, 6], [10, 0, 20, 6], [0, 6, 10, 12], [10, 6, 20, 12],
    ]  # fmt: skip
    np.testing.assert_allclose(tiles.tokens, whole.tokens)  # the four lie under the token
    inside, _ = layout("digits.py:recipe=deepstack_v")
    in_encoder = figures(inside, (60, 36), 9)[1]
    for (number, boxes), (same, others) in zip(in_encoder.stacks, tiles.stacks, strict=True):
        assert number == same
        np.testing.assert_allclose(boxes, others)


def test_finer_maps_of_the_encoder_follow_the_stacks_of_tiles():
    visual, strides = layout("hybrid.py")
    assert strides == (2,)
    (figure,) = figures(visual, (24, 24), 36, strides)
    assert [(number, boxes[0].tolist()) for number, boxes in figure.stacks] == [
        (0, [0, 0, 2, 2]), (1, [2, 0, 4, 2]), (2, [0, 2, 2, 4]), (3, [2, 2, 4, 4]),
    ]  # fmt: skip


def test_samples_in_the_sequence_have_their_features_apart():
    visual = dataclasses.replace(layout("digits.py:recipe=deepstack")[0], sequence="samples", stacks="")
    (figure,) = figures(visual, (60, 36), 9)
    assert figure.in_sequence == 36 and len(figure.tokens) == 36
    (pooled,) = figures(visual, (60, 36), 1)  # each of four tokens has nine features, none beside another
    assert pooled.in_sequence == 4 and len(pooled.tokens) == 36


def test_a_canvas_shows_the_pictures_own_extent():
    visual = VisualLayout(size=8, cell=2, canvas=(8, 16), aspect="own")
    (figure,) = figures(visual, (30, 20), 16)  # 12 × 8 pixels of the canvas
    assert figure.box == (0, 0, 30, 20) and figure.in_sequence == 24
    assert figure.tokens[-1].tolist() == [25, 15, 30, 20]
    (coarse,) = figures(visual, (30, 20), 4)
    assert coarse.in_sequence == visual.tokens([(30, 20)], 4)[0] == 6


@pytest.mark.parametrize("aspect", ["pad", "stretch", "square", "anyres"])
@pytest.mark.parametrize("size", [(64, 32), (32, 64), (50, 32)], ids=str)
def test_areas_are_what_the_views_show(aspect, size):
    """A picture whose red and green say where a pixel lies: the views' pixels say it back."""
    side, tiling, zoom = 16, (2, 2), 2
    visual = VisualLayout(side, 4, (side, side), aspect, (tiling,), zoom, sequence="grid", stacks="zoom")
    width, height = size
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([40 + 3 * x, 40 + 3 * y, np.full_like(x, 255)], axis=-1).astype(np.uint8)
    views = make_views(Image.fromarray(ramp), side, aspect, tiling, zoom)
    areas = view_areas(visual, size)
    assert len(areas) == len(views) == visual.views_of_tiling(tiling)
    centre = (np.arange(side) + 0.5) / side
    checked = 0
    for (left, top, right, bottom), view in zip(areas, views, strict=True):
        across, down = left + (right - left) * centre, top + (bottom - top) * centre
        x, y = (2.5 * max(1, step) for step in ((right - left) / side, (bottom - top) / side))
        rows = (down > y) & (down < height - y)  # away from where bicubic sees the edge
        columns = (across > x) & (across < width - x)
        seen = view[rows][:, columns].astype(float)
        red, green = 40 + 3 * (across[columns] - 0.5), 40 + 3 * (down[rows, None] - 0.5)
        np.testing.assert_allclose(seen[..., 0], np.broadcast_to(red, seen.shape[:2]), atol=3)  # a pixel
        np.testing.assert_allclose(seen[..., 1], np.broadcast_to(green, seen.shape[:2]), atol=3)
        checked += seen.size
    assert checked > 2000


def test_windows_are_whole_grids_cut_without_gaps():
    visual, _ = layout("deepstack.py")
    windows, newlines = token_windows(visual, (640, 480), 144)
    assert len(windows) == 144 and newlines == 0
    assert windows[0] == (0, slice(0, 2), slice(0, 2)) and windows[-1] == (0, slice(22, 24), slice(22, 24))


def test_a_token_that_is_blended_stands_for_the_cells_of_all_its_parts():
    visual = VisualLayout(84, 14, (84, 84), "anyres", ((3, 3),), sequence="unpad", newline=True, shrink=2)
    size = (300, 290)
    windows, newlines = token_windows(visual, size, 9)
    slots, shares = visual.blends((3, 3), 9, size)
    kept = slots[:, 0] >= 0
    assert len(windows) == kept.sum() and newlines == (~kept).sum() > 0
    cells = np.arange(10 * 36).reshape(10, 6, 6)
    for window, some, share in zip(windows, slots[kept], shares[kept], strict=True):
        of_slots = {divmod(slot, 9) for slot in some[share > 0].tolist()}
        want = {(g, 2 * (t // 3) + i, 2 * (t % 3) + j) for g, t in of_slots for i in (0, 1) for j in (0, 1)}
        assert sorted(cells[window].reshape(-1)) == sorted(cells[cell] for cell in want)
    assert {figure.views for figure in figures(visual, size, 9)} == {"the whole picture", "3 × 3 tiles"}
