"""Any picture to RGB: one documented result for each image mode and orientation, or a refusal that names the picture.

The Pillow conversion of each mode is that of the reference codes (`convert("RGB")`) where it loses nothing.
"""

import contextlib
import io
import os
import re

import numpy as np
from etils import epath
from PIL import ExifTags, Image

try:  # the fast-jpeg extra: the same bits, a little sooner
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 64_000_000  # of a picture, by its header; decoded this is 256 MB
# Of a format or mode whose decoder takes several times the memory, or the time, of others: with these limits no
# picture takes 1 GiB.
FEWER_PIXELS = {
    "JPEG2000": 16_000_000,
    "WEBP": 32_000_000,
    "AVIF": 32_000_000,
    "TIFF": 48_000_000,
    "F": 32_000_000,
    "I": 32_000_000,
}
STRIP = 1 << 20  # pixels that are converted at a time, where a conversion makes several copies
MAX_SCANS = 100  # of a JPEG; encoders write some ten, and each is decoded over the whole picture
MAX_SIDE = 20_000  # pixels; padding a tall picture to a square takes time with the square of its height
# Named, so that no other of Pillow's readers sees foreign bytes: one of them runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
# Of JPEG, but for those that no segment follows; also those that restart a scan, in the midst of its data.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(image):
    """An upright RGB picture.

    | mode | result |
    |---|---|
    | RGB | as it is; 16-bit colour keeps its high bytes |
    | 1, L, P, YCbCr, HSV, LAB | Pillow's `convert("RGB")` |
    | CMYK | Pillow's `convert("RGB")`, colour profiles are ignored |
    | LA, PA, RGBA, La, RGBa, or a transparent colour | composited on white; the references drop the alpha channel |
    | I;16, I | grey of 16 bits: clipped to 0 … 65535, high byte; the references clip to 0 … 255 |
    | F | grey levels 0 … 255, clipped, truncated, not-a-number is 0 |

    An orientation in the EXIF header is applied, which the references do not do; an unreadable header counts as
    upright, and so does a PNG's that follows the pixels. Of an animation the first frame is taken.

    Args:
      image: a path, encoded bytes, or a `PIL.Image`.

    Returns:
      a loaded `PIL.Image` of mode RGB; `image` itself if there is nothing to change.

    Raises:
      ValueError: naming what cannot be read as a picture, and why: missing, empty, truncated, of no known format,
        of more pixels than `MAX_PIXELS` or `FEWER_PIXELS` allow, or a side of more than `MAX_SIDE`, or a JPEG of more
        than `MAX_SCANS` scans (decided by the headers, before decoding).
    """
    with _refusals(image):
        picture, data = _header(image)
        transpose = _UPRIGHT.get(_orientation(picture))
        picture = _decode_jpeg(picture, data) or _to_rgb(picture)
        if transpose is not None:
            picture = picture.transpose(transpose)
            picture.info = {}  # opened once more, it must not be turned once more
        return picture


def image_size(image) -> tuple[int, int]:
    """`(width, height)` in pixels that `open_picture` will give, from the header alone.

    Args:
      image: a path, encoded bytes, or a `PIL.Image`.

    Raises:
      ValueError: naming what cannot be read as a picture; damage after the header is not seen.
    """
    with _refusals(image):
        picture, _ = _header(image)
        width, height = picture.size
        return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)


@contextlib.contextmanager
def _refusals(image):
    try:
        yield
    except Exception as error:  # Pillow raises many kinds for a damaged file: OSError, SyntaxError, struct.error, …
        if isinstance(image, bytes):
            what = f"{len(image)} bytes"
        elif isinstance(image, Image.Image):
            what = getattr(image, "filename", "") or "a PIL image"
        else:
            what = image
        reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"cannot read a picture from {what}: {reason}") from error


def _header(image):
    """`(PIL image, encoded bytes or None)`, not decoded yet and not too large."""
    if isinstance(image, Image.Image):
        picture, data = image, None
    else:
        if not isinstance(image, bytes) and os.path.exists(image) and not os.path.isfile(image):
            raise ValueError("it is no file but a folder or a device")
        data = image if isinstance(image, bytes) else epath.Path(image).read_bytes()
        if not data:
            raise ValueError("it is empty")
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = picture.size
    most = min(FEWER_PIXELS.get(kind, MAX_PIXELS) for kind in (picture.format, picture.mode))
    if width * height > most or max(width, height) > MAX_SIDE:
        kind = "" if most == MAX_PIXELS else f" in {picture.format or 'a picture'} of mode {picture.mode}"
        raise ValueError(
            f"{width} x {height} pixels, more than {most // 10**6} megapixels{kind} or a side of {MAX_SIDE}"
        )
    if picture.format == "TIFF":
        _check_tiles(picture, most)
    if picture.format in ("JPEG", "MPO") and data is not None and _has_too_many_scans(data):
        raise ValueError(f"it has more than {MAX_SCANS} scans; save it anew")
    return picture, data


def _check_tiles(picture, most):
    """Raises ValueError for tiles of a TIFF that take more memory than a picture may: each is decoded whole."""
    sides = [picture.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
    if not all(isinstance(side, int) for side in sides) or sides[0] * sides[1] > most:
        raise ValueError(f"tiles of {sides[0]} x {sides[1]} pixels, more than {most // 10**6} megapixels")


def _has_too_many_scans(data):
    """Whether a JPEG has more than `MAX_SCANS` scans; of a damaged one as far as its segments can be followed.

    As its decoder does, this looks for the next marker behind each segment, whatever stands between. Behind the end
    of the image anything may follow, as phones append a film or a second picture, and is not looked at.
    """
    scans, found = 0, _MARKER.search(data, 2)  # behind the start of the image
    while found and found[0][1] != _END_OF_IMAGE and scans <= MAX_SCANS:
        scans += found[0][1] == _START_OF_SCAN
        at = found.end()
        found = _MARKER.search(data, at + max(2, int.from_bytes(data[at : at + 2], "big")))
    return scans > MAX_SCANS


def _orientation(picture):
    """The EXIF orientation 1 … 8 that is still to be applied."""
    if picture.format == "TIFF":  # Pillow applies it, in size and pixels
        return 1
    try:
        return Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)  # PNG's own getexif would decode
    except Exception:  # Pillow raises many kinds for a damaged header, which counts as upright
        return 1


def _decode_jpeg(picture, data):
    """The RGB picture by simplejpeg, or None if it is not there or has anything to say about the data."""
    is_jpeg = picture.format in ("JPEG", "MPO") and picture.mode in ("L", "RGB")  # not CMYK
    if simplejpeg is None or data is None or not is_jpeg:
        return None
    try:
        return Image.fromarray(simplejpeg.decode_jpeg(data))
    except ValueError:  # it is strict; what to accept is for Pillow to say
        return None


def _to_rgb(picture):
    if picture.mode.startswith("I"):
        return _by_strips(picture, lambda part: _grey(np.clip(np.asarray(part), 0, 65535) >> 8))
    if picture.mode == "F":
        return _by_strips(picture, lambda part: _grey(np.clip(np.nan_to_num(np.asarray(part)), 0, 255)))
    if picture.has_transparency_data:
        return _by_strips(picture, _on_white)
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # a copy costs as much as decoding


def _by_strips(picture, convert):
    """A picture converted strip by strip, as copies of a whole one would take several times its memory."""
    width, height = picture.size
    rows, out = max(1, STRIP // width), Image.new("RGB", picture.size)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        out.paste(convert(picture.crop(box)), box)
    return out


def _on_white(picture):
    picture = picture.convert("LA") if picture.mode == "La" else picture  # which has no way to RGBA
    picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def _grey(levels):
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
