"""Views of a picture: geometry from sizes, pixels by Pillow."""

import numpy as np
import pytest
from PIL import Image

from lmm_jax.data import views as v

COLOUR = (122, 116, 104)


def picture(w, h):
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels)


def test_padding_centres_the_picture():
    padded = np.asarray(v.resize_padded(picture(10, 5), 10, 10, COLOUR))
    assert padded.shape == (10, 10, 3)
    np.testing.assert_array_equal(padded[2:7], np.asarray(picture(10, 5)))
    assert (padded[:2] == COLOUR).all() and (padded[7:] == COLOUR).all()


@pytest.mark.parametrize("w, h", [(97, 61), (61, 97), (40, 40), (1, 300), (300, 1), (31, 700), (640, 480), (20, 30)])
def test_padding_between_the_passes_of_a_resize_changes_no_bit(w, h):
    square = Image.new("RGB", (max(w, h),) * 2, COLOUR)
    square.paste(picture(w, h), ((square.width - w) // 2, (square.height - h) // 2))
    for width, height in ((48, 48), (336, 336), (96, 192), (max(w, h), 40)):
        expected = square.resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(
            np.asarray(v.resize_padded(picture(w, h), width, height, COLOUR)), np.asarray(expected)
        )


def test_tiles_are_the_larger_picture_cut_row_by_row():
    seen = v.make_views(picture(24, 16), 8, "stretch", (3, 2))
    assert seen.shape == (7, 8, 8, 3) and seen.dtype == np.uint8
    whole = np.asarray(picture(24, 16))
    for i in range(6):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(seen[1 + i], whole[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8])


def test_zoomed_tiles_follow_their_view():
    seen = v.make_views(picture(48, 16), 8, "stretch", (3, 1), zoom=2)
    assert len(seen) == 4 * 5
    np.testing.assert_array_equal(seen[:4], v.make_views(picture(48, 16), 8, "stretch", (3, 1)))
    np.testing.assert_array_equal(seen[4:8], v.make_views(picture(48, 16), 8, "stretch", (2, 2))[1:])
    whole = np.asarray(picture(48, 16))
    for cell in range(3):
        for i in range(2):
            for j in range(2):
                y, x = i * 8, (cell * 2 + j) * 8
                np.testing.assert_array_equal(seen[8 + 4 * cell + 2 * i + j], whole[y : y + 8, x : x + 8])


def test_anyres_squeezes_the_whole_and_fits_the_tiles():
    seen = v.make_views(picture(20, 10), 10, "anyres", (2, 2))
    np.testing.assert_array_equal(seen[0], np.asarray(v.resize(picture(20, 10), 10, 10)))
    canvas = seen[1:].reshape(2, 2, 10, 10, 3).swapaxes(1, 2).reshape(20, 20, 3)
    np.testing.assert_array_equal(canvas[5:15], np.asarray(picture(20, 10)))
    assert not canvas[:5].any() and not canvas[15:].any()


def test_square_is_the_centre_of_the_short_side():
    whole = v.resize_short_side(picture(31, 20), 20)
    assert whole.shape == (20, 31, 3)
    np.testing.assert_array_equal(v.make_views(picture(31, 20), 20, "square")[0], whole[:, 5:25])
    assert v.resize_short_side(picture(20, 33), 10).shape == (16, 10, 3)


def test_ties_between_grids():
    assert v.deepstack_tilings(4) == [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert v.select_tiling(20, 10, 336, v.deepstack_tilings(4)) == (
        1,
        2,
    )  # small and wide: portrait, as the reference
    assert v.select_tiling(2000, 1000, 336, v.deepstack_tilings(4)) == (2, 1)
    assert v.select_best_resolution(10, 10, [(30, 30), (20, 20), (10, 40)]) == (20, 20)


@pytest.mark.parametrize("w, h, canvas", [(1, 20_000, (336, 336)), (20_000, 1, (672, 336)), (7, 3, (21, 9))])
def test_fitted_sides_are_never_empty_or_outside(w, h, canvas):
    width, height = v.fit(w, h, *canvas)
    assert 1 <= width <= canvas[0] and 1 <= height <= canvas[1]


@pytest.mark.parametrize("aspect", ["pad", "stretch", "anyres"])
@pytest.mark.parametrize("w, h", [(1, 2000), (2000, 1), (1, 1)])
def test_thin_pictures_have_views(aspect, w, h):
    assert v.make_views(picture(w, h), 16, aspect, (2, 1)).shape == (3, 16, 16, 3)


def test_refusals():
    with pytest.raises(ValueError, match="data.aspect"):
        v.make_views(picture(4, 4), 4, "squash")
    with pytest.raises(ValueError, match="square tiling"):
        v.make_views(picture(4, 4), 4, "square", (2, 1))
    with pytest.raises(ValueError, match="20000 x 1 .* too long"):
        v.resize_short_side(picture(20_000, 1), 336)
