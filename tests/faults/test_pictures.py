"""Pictures: fuzzed ones are taken or refused by name, unusual ones have one documented result."""

import io
import json

import numpy as np
import pytest
from PIL import ExifTags, Image

from lmm_jax.data.images import open_picture
from tests.faults.rows import row

CASES = 500  # pictures that a process reads


@row(16, few=1, full=20, cases=CASES)
def test_fuzzed_pictures_are_taken_or_refused_by_name(trials, server, tmp_path):
    """Ten thousand, by processes of which each reads and prepares some; memory and time are theirs."""

    def check(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = (folder, number, CASES)
        with server.start(*words, module="tests.faults.read_pictures", plain=True) as process:
            assert process.wait(300) == 0, process.said()[-2000:]
            found = json.loads(process.said().splitlines()[-1])
        assert not found["faults"], found
        assert found["taken"] > 50 and found["refused"] > 50, found
        assert found["slowest"] < 2 and found["peak"] < 2**30, found

    trials.each(check)


def encoded(image, kind="png", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def grey(levels, mode="L"):
    levels = np.array(levels)
    return Image.fromarray(levels.astype(np.uint16) if mode == "I;16" else levels.astype(np.uint8))


def colours(*pixels, mode="RGB"):
    """A picture of one row."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(list(pixels))
    return image


def palette(indexes, table):
    image = Image.new("P", (len(indexes), 1))
    image.putpalette([value for colour in table for value in colour])
    image.putdata(list(indexes))
    return image


def turned(orientation):
    """Three pixels in a row, stored with an orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(colours(RED, GREEN, BLUE), exif=exif)


def bits(values):
    image = Image.new("1", (len(values), 1))
    image.putdata([255 * value for value in values])
    return image


BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)
HALF = (128, 128, 128)


def row_of(*pixels):
    return [list(pixels)]


def column_of(*pixels):
    return [[pixel] for pixel in pixels]


def same(value):
    return (value, value, value)


# A file, and the pixels that it always is: rows of (red, green, blue), written down by hand.
GOLDEN = {
    "RGB": (lambda: encoded(colours(RED, GREEN, BLUE)), row_of(RED, GREEN, BLUE)),
    "one bit, PNG": (lambda: encoded(bits([1, 0, 1])), row_of(WHITE, BLACK, WHITE)),
    "one bit, TIFF": (lambda: encoded(bits([1, 0, 0]), "tiff"), row_of(WHITE, BLACK, BLACK)),
    "one bit, BMP": (lambda: encoded(bits([0, 1, 1]), "bmp"), row_of(BLACK, WHITE, WHITE)),
    "grey": (lambda: encoded(grey([[0, 128, 255]])), row_of(BLACK, HALF, WHITE)),
    "grey of 16 bits": (lambda: encoded(grey([[0, 32768, 65535]], "I;16")), row_of(BLACK, HALF, WHITE)),
    "grey of 16 bits keeps high bytes": (
        lambda: encoded(grey([[255, 256, 511]], "I;16")),
        row_of(same(0), same(1), same(1)),
    ),
    "grey of 16 bits, TIFF": (lambda: encoded(grey([[0, 32768, 65535]], "I;16"), "tiff"), row_of(BLACK, HALF, WHITE)),
    "palette": (lambda: encoded(palette([1, 0, 2], [RED, GREEN, BLUE])), row_of(GREEN, RED, BLUE)),
    "palette, GIF": (lambda: encoded(palette([1, 0, 2], [RED, GREEN, BLUE]), "gif"), row_of(GREEN, RED, BLUE)),
    "palette with a hole": (
        lambda: encoded(palette([1, 0, 2], [RED, GREEN, BLUE]), transparency=0),
        row_of(GREEN, WHITE, BLUE),
    ),
    "grey and alpha": (
        lambda: encoded(colours((0, 255), (0, 0), (0, 128), mode="LA")),
        row_of(BLACK, WHITE, same(127)),
    ),
    "colour and alpha": (
        lambda: encoded(colours((*RED, 255), (*RED, 0), (*RED, 51), mode="RGBA")),
        row_of(RED, WHITE, (255, 204, 204)),
    ),
    "colour and alpha, WebP": (
        lambda: encoded(
            colours((*BLUE, 255), (*RED, 0), (*GREEN, 51), mode="RGBA"), "webp", lossless=True, exact=True
        ),
        row_of(BLUE, WHITE, (204, 255, 204)),
    ),
    "CMYK, TIFF": (
        lambda: encoded(colours((0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), mode="CMYK"), "tiff"),
        row_of(WHITE, (0, 255, 255), RED),
    ),
    "CMYK black, TIFF": (
        lambda: encoded(colours((0, 0, 0, 255), (0, 0, 0, 0), (255, 255, 0, 0), mode="CMYK"), "tiff"),
        row_of(BLACK, WHITE, BLUE),
    ),
    "CMYK, JPEG": (
        lambda: encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "jpeg", quality=100),
        row_of(RED, RED),
    ),
    "floats, TIFF": (
        lambda: encoded(Image.fromarray(np.array([[0.0, 128.9, 300.0]], np.float32)), "tiff"),
        row_of(BLACK, HALF, WHITE),
    ),
    "WebP": (lambda: encoded(colours(RED, GREEN, BLUE), "webp", lossless=True), row_of(RED, GREEN, BLUE)),
    "PPM": (lambda: b"P3 3 1 255 255 0 0 0 255 0 0 0 255\n", row_of(RED, GREEN, BLUE)),
    "PGM": (lambda: b"P2 3 1 255 0 128 255\n", row_of(BLACK, HALF, WHITE)),
    "an animation": (
        lambda: encoded(colours(RED, RED), "gif", save_all=True, append_images=[colours(BLUE, GREEN)]),
        row_of(RED, RED),
    ),
    "one pixel": (lambda: encoded(colours(GREEN)), row_of(GREEN)),
    "1 × 3": (
        lambda: encoded(colours(RED, GREEN, BLUE).transpose(Image.Transpose.ROTATE_270)),
        column_of(RED, GREEN, BLUE),
    ),
    "orientation 1": (lambda: turned(1), row_of(RED, GREEN, BLUE)),
    "orientation 2": (lambda: turned(2), row_of(BLUE, GREEN, RED)),
    "orientation 3": (lambda: turned(3), row_of(BLUE, GREEN, RED)),
    "orientation 4": (lambda: turned(4), row_of(RED, GREEN, BLUE)),
    "orientation 5": (lambda: turned(5), column_of(RED, GREEN, BLUE)),
    "orientation 6": (lambda: turned(6), column_of(RED, GREEN, BLUE)),
    "orientation 7": (lambda: turned(7), column_of(BLUE, GREEN, RED)),
    "orientation 8": (lambda: turned(8), column_of(BLUE, GREEN, RED)),
    "orientation of no meaning": (lambda: turned(9), row_of(RED, GREEN, BLUE)),
}


@row(17, few=len(GOLDEN), full=len(GOLDEN))
def test_unusual_pictures_have_one_result(trials):
    """By hand, without Pillow's own conversions, which `data/test_images.py` compares with."""

    def check(number):
        name, (file, expected) = list(GOLDEN.items())[number]
        found = np.asarray(open_picture(file()))
        np.testing.assert_array_equal(found, np.array(expected, np.uint8), name)

    trials.each(check)


@pytest.mark.parametrize("orientation, first", [(5, RED), (6, RED), (7, BLUE), (8, BLUE)])
def test_a_column_of_a_picture_that_was_turned_begins_where_it_should(orientation, first):
    assert open_picture(turned(orientation)).size == (1, 3)
    assert open_picture(turned(orientation)).getpixel((0, 0)) == first
