"""Views of a picture."""

import io

import numpy as np
import pytest
from PIL import Image

from lmm_jax.data.images import MEAN_COLOUR, open_picture, pad_to_square, views


def picture(w, h):
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels)


def test_padding_centres_the_picture():
    padded = np.asarray(pad_to_square(picture(10, 5)))
    assert padded.shape == (10, 10, 3)
    np.testing.assert_array_equal(padded[2:7], np.asarray(picture(10, 5)))
    assert (padded[:2] == MEAN_COLOUR).all() and (padded[7:] == MEAN_COLOUR).all()


def test_tiles_are_the_larger_picture_cut_row_by_row():
    seen = views(picture(24, 16), 8, "stretch", (3, 2))
    assert seen.shape == (7, 8, 8, 3)
    whole = np.asarray(picture(24, 16))
    for i in range(6):
        row, column = divmod(i, 3)
        np.testing.assert_array_equal(seen[1 + i], whole[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8])


def test_pictures_open_from_paths_bytes_and_images(tmp_path):
    picture(4, 4).save(tmp_path / "a.png")
    out = io.BytesIO()
    picture(4, 4).save(out, "png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), out.getvalue(), picture(4, 4)):
        np.testing.assert_array_equal(np.asarray(open_picture(image)), np.asarray(picture(4, 4)))


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"bad\.png"):
        open_picture(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        open_picture(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="data.aspect"):
        views(picture(4, 4), 4, "squash")
