"""Any picture to RGB, or a refusal that names it."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from lmm_jax.data import images
from lmm_jax.data.images import image_size, open_picture


def picture(w, h):
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)
    return Image.fromarray(pixels)


def photo(w, h):
    """Smooth enough to be worth compressing."""
    y, x = np.mgrid[:h, :w]
    pixels = np.stack([128 + 100 * np.sin(x / 17 + c) * np.cos(y / 23 - c) for c in range(3)], -1)
    noise = np.random.default_rng(0).normal(0, 8, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def rgb(image):
    return np.asarray(open_picture(image))


def test_pictures_open_from_paths_bytes_and_images(tmp_path):
    picture(4, 4).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), encode(picture(4, 4), "png"), picture(4, 4)):
        np.testing.assert_array_equal(rgb(image), np.asarray(picture(4, 4)))
        assert image_size(image) == (4, 4)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.asarray(picture(16, 16))
ALPHA = np.asarray(picture(16, 16).getchannel("G"))
ON_WHITE = {
    name: np.rint(colour * (alpha / 255.0) + 255 - alpha).astype(np.uint8)
    for name, colour, alpha in (
        ("grey", GREY[..., None].repeat(3, -1), ALPHA[..., None]),
        ("colour", COLOUR, ALPHA[..., None]),
    )
}


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_alpha_lies_on_white(kind):
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]), "RGBA")
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    for image, expected in ((rgba, "colour"), (la, "grey")):
        np.testing.assert_array_equal(rgb(encode(image, kind)), ON_WHITE[expected])
        np.testing.assert_array_equal(rgb(image), ON_WHITE[expected])


def test_transparent_colours_lie_on_white():
    palette = Image.fromarray(COLOUR).quantize(8)
    plain = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(rgb(encode(palette, "png")), plain)
    hole = np.where((np.asarray(palette) == 3)[..., None], 255, plain)
    np.testing.assert_array_equal(rgb(encode(palette, "png", transparency=3)), hole)
    np.testing.assert_array_equal(rgb(encode(palette, "gif", transparency=3)), hole)
    key = tuple(int(c) for c in COLOUR[2, 5])
    hole = np.where(np.all(key == COLOUR, -1, keepdims=True), 255, COLOUR)
    np.testing.assert_array_equal(rgb(encode(Image.fromarray(COLOUR), "png", transparency=key)), hole)
    pa = Image.fromarray(COLOUR).quantize(8).convert("PA")
    pa.putalpha(Image.fromarray(ALPHA))
    expected = np.rint(plain * (ALPHA / 255.0)[..., None] + 255 - ALPHA[..., None])
    np.testing.assert_array_equal(rgb(pa), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_converted_as_the_references_do(mode):
    image = Image.fromarray(COLOUR).convert(mode)
    np.testing.assert_array_equal(rgb(image), np.asarray(image.convert("RGB")))
    kind = "jpeg" if mode == "CMYK" else "tiff"
    if mode != "HSV":  # which no file holds
        data = encode(image, kind)
        np.testing.assert_array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_deep_greys_are_scaled_not_clipped():
    levels = np.array([[0, 255, 256, 257], [32768, 40000, 65279, 65535]], np.uint16)
    expected = (levels >> 8).astype(np.uint8)[..., None].repeat(3, -1)
    deep = Image.fromarray(levels)
    assert deep.mode == "I;16"
    for image in (deep, encode(deep, "png"), encode(deep, "tiff"), Image.fromarray(levels.astype(np.int32))):
        np.testing.assert_array_equal(rgb(image), expected)
    big_endian = Image.frombytes("I;16B", (4, 2), levels.astype(">u2").tobytes())
    np.testing.assert_array_equal(rgb(big_endian), expected)
    np.testing.assert_array_equal(rgb(Image.fromarray(np.array([[-5, 70000]], np.int32)))[..., 0], [[0, 255]])


def test_floats_are_grey_levels():
    levels = np.array([[-np.inf, -3.0, 0.0, 7.9], [254.2, 300.0, np.inf, np.nan]], np.float32)
    for image in (Image.fromarray(levels), encode(Image.fromarray(levels), "tiff")):
        np.testing.assert_array_equal(rgb(image)[..., 1], [[0, 0, 0, 7], [254, 255, 255, 0]])


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind, orientation):
    stored = np.asarray(photo(24, 16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "webp" else {}
    plain, turned = (encode(Image.fromarray(stored), kind, **options, **e) for e in ({}, {"exif": exif}))
    upright = {  # the stored array, read so that its first row and column are where EXIF says
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a[:, ::-1].swapaxes(0, 1),
    }[orientation]
    np.testing.assert_array_equal(rgb(turned), upright(rgb(plain)))
    assert image_size(turned) == open_picture(turned).size == ((24, 16) if orientation < 5 else (16, 24))
    np.testing.assert_array_equal(rgb(open_picture(turned)), rgb(turned))  # not turned twice
    np.testing.assert_array_equal(rgb(Image.open(io.BytesIO(turned))), rgb(turned))


def test_unreadable_exif_counts_as_upright():
    data = encode(picture(8, 4), "jpeg", exif=b"Exif\0\0nonsense")
    assert image_size(data) == open_picture(data).size == (8, 4)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(rgb(data), np.asarray(frames[0]))


def png_header(w, h):
    """A PNG that says it is w x h, and has hardly any pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("w, h", [(8000, 8001), (10_000, 10_000), (60_000, 60_000), (20_001, 1), (1, 2**31 - 1)])
def test_bombs_are_refused_by_their_header(w, h):
    for function in (open_picture, image_size):
        with pytest.raises(ValueError, match=r"\d+ bytes: .*(megapixels|exceeds limit)"):
            function(png_header(w, h))


def test_the_limit_itself_is_a_picture():
    assert image_size(png_header(8000, 8000)) == (8000, 8000)
    assert image_size(png_header(1, 20_000)) == (1, 20_000)


def test_what_cannot_be_read_is_named(tmp_path):
    bad = {"text": b"not a picture", "empty": b"", "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}
    bad |= {f"cut_{kind}": encode(photo(64, 64), kind)[:-600] for kind in ("png", "jpeg", "webp", "tiff", "bmp")}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: \S"):
            open_picture(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{len(data)} bytes: \S"):
            open_picture(data)
    for nothing in (tmp_path / "nowhere.png", tmp_path):
        with pytest.raises(ValueError, match=str(nothing)):
            open_picture(nothing)
    with pytest.raises(ValueError, match="from None"):
        open_picture(None)
    (tmp_path / "cut_png").rename(tmp_path / "cut.png")
    with pytest.raises(ValueError, match=r"cut\.png"):
        open_picture(Image.open(tmp_path / "cut.png"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF headers
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
def test_damage_is_refused_or_read_but_never_more(kind):
    rng = np.random.default_rng(0)
    data = np.frombuffer(encode(photo(40, 30), kind), np.uint8)
    for i in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, 200 if i % 2 else len(data), 1 + i % 4)] = rng.integers(0, 256)
        try:
            size = image_size(damaged.tobytes())
            assert open_picture(damaged.tobytes()).size == size
        except ValueError as error:
            assert f"{len(data)} bytes" in str(error)


JPEGS = {
    "4:2:0": (photo(97, 61), {"quality": 90}),
    "4:2:2": (photo(97, 61), {"quality": 75, "subsampling": "4:2:2"}),
    "4:4:4": (photo(61, 97), {"quality": 95, "subsampling": "4:4:4"}),
    "progressive": (photo(130, 70), {"progressive": True}),
    "noise": (picture(33, 47), {"quality": 30}),
    "grey": (photo(40, 30).convert("L"), {}),
    "RGB": (photo(40, 30), {"keep_rgb": True}),
    "CMYK": (photo(40, 30).convert("CMYK"), {}),
    "restarts": (photo(64, 64), {"restart_marker_blocks": 2}),
}


@pytest.mark.parametrize("name", JPEGS)
def test_simplejpeg_changes_no_bit(name, monkeypatch):
    pytest.importorskip("simplejpeg")
    image, options = JPEGS[name]
    whole = encode(image, "jpeg", **options)
    rng = np.random.default_rng(0)
    cases = [whole, whole + b"trailing", *(whole[:-n] for n in (1, 2, 3, 10, 200))]
    for _ in range(30):  # damaged scans, where decoders could disagree
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole) // 2, len(whole))] = rng.integers(0, 256)
        cases.append(bytes(damaged))

    def outcome(data):
        try:
            return rgb(data).tobytes()
        except ValueError as error:
            return str(error)

    fast = [outcome(data) for data in cases]
    monkeypatch.setattr(images, "simplejpeg", None)
    assert fast == [outcome(data) for data in cases]


def test_simplejpeg_is_used_where_it_can_be():
    pytest.importorskip("simplejpeg")
    for name, (image, options) in JPEGS.items():
        data = encode(image, "jpeg", **options)
        decoded = images._decode_jpeg(Image.open(io.BytesIO(data)), data)
        assert (decoded is None) == (name == "CMYK"), name


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("F", "tiff"), ("I", "tiff"), ("P", "png")]
)
def test_a_picture_is_converted_in_strips_as_it_is_whole(mode, kind, monkeypatch):
    options = {"transparency": 3} if mode == "P" else {}
    data = encode(photo(61, 43).convert("RGBA" if mode == "RGBA" else "L").convert(mode), kind, **options)
    whole = rgb(data)
    monkeypatch.setattr(images, "STRIP", 200)
    np.testing.assert_array_equal(rgb(data), whole)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_formats_whose_readers_take_more_memory_have_lower_limits(kind, monkeypatch):
    monkeypatch.setattr(images, "FEWER_PIXELS", {kind: 99})
    assert rgb(encode(picture(11, 9), kind)).shape == (9, 11, 3)
    with pytest.raises(ValueError, match=f"10 x 10 pixels, more than 0 megapixels in {kind} of mode RGB"):
        open_picture(encode(picture(10, 10), kind))
    assert rgb(encode(picture(10, 10), "PNG")).shape == (10, 10, 3)


def scans(count, between=b"", after=b""):
    """A progressive JPEG with its last scan as often, and what stands before each and behind the end."""
    data = encode(photo(64, 64), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (between + data[last:-2]) * count + data[-2:] + after


@pytest.mark.parametrize(
    "between",
    [*(b"", b"x", b"\xff\xff", b"\xff\x01", b"\xff\xd0"), *(b"\xff\xfe\0\0", b"\xff\xfe\0\4\xff\xd9")],
)
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(between):
    for function in (open_picture, image_size):
        with pytest.raises(ValueError, match="it has more than 100 scans"):
            function(scans(100, between))  # beside those that it had


def test_a_jpeg_of_some_scans_is_read_whatever_lies_behind_its_end():
    film = b"\xff\xda" * 1000
    np.testing.assert_array_equal(rgb(scans(1, after=film)), rgb(scans(1)))
    assert rgb(scans(20)).shape == (64, 64, 3)
    whole = scans(1)
    for end in range(2, len(whole), 7):  # segments that end early
        for length in (b"\0\0", b"\xff\xff"):
            assert not images._has_too_many_scans(whole[:end] + length)


def tiled(width, height):
    """A TIFF of 16 x 16 pixels in a tile of that size, by its header."""
    data = zlib.compress(bytes(256)).ljust(64, b"\0")
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height, 324: 8, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 72) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize("sides", [(60_000, 60_000), (2**31 - 16, 16), (16, 2**31 - 16), (8_000, 6_016)])
def test_a_tile_may_be_no_larger_than_a_picture(sides):
    assert rgb(tiled(16, 16)).shape == (16, 16, 3)
    for function in (open_picture, image_size):
        with pytest.raises(ValueError, match=f"tiles of {sides[0]} x {sides[1]} pixels, more than 48 megapixels"):
            function(tiled(*sides))


def test_a_large_picture_takes_less_than_a_gibibyte():
    """64 megapixels with transparency, of which a process that opens it holds what stands in the header and more."""
    code = (
        "import io, re; from PIL import Image; from lmm_jax.data.images import open_picture; "
        "f = io.BytesIO(); Image.MAX_IMAGE_PIXELS = None; Image.new('LA', (8000, 8000), (9, 7)).save(f, 'png', "
        "compress_level=1); assert open_picture(f.getvalue()).size == (8000, 8000); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"  # kiB, of this process alone
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(told.stdout) < 900 * 1024
