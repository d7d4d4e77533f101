"""Pictures to views: what the encoder is given, uint8, resized by Pillow as the reference codes do.

First the geometry, from sizes alone, so that a plan needs no pictures; then the pixels.
"""

import math

import numpy as np
from PIL import Image

from lmm_jax.data.images import MAX_PIXELS

STRIP = 256  # rows of a tall picture that are padded at a time


def choose_canvas(sizes, canvases) -> np.ndarray:
    """The canvas that keeps most of each picture (LLaVA-NeXT's and DeepStack's rule).

    What a canvas keeps is the area of the picture fitted into it, sides truncated, at most the picture's own area.
    Among equals the one with the least area to spare wins, then the earlier one.

    Args:
      sizes: `[n, 2]` (width, height) of pictures, pixels.
      canvases: `(width, height)`; their order decides ties.

    Returns:
      `[n]` numbers of canvases.
    """
    pictures, canvases = np.asarray(sizes, np.int64)[:, None], np.asarray(canvases, np.int64)  # [n, 1, 2], [m, 2]
    scale = (canvases / pictures).min(axis=-1, keepdims=True)
    kept = np.minimum((pictures * scale).astype(np.int64).prod(axis=-1), pictures.prod(axis=-1))
    spare = canvases.prod(axis=-1) - kept
    most = kept == kept.max(axis=1, keepdims=True)
    return np.where(most, spare, np.iinfo(np.int64).max).argmin(axis=1)  # the first of the least


def select_best_resolution(width, height, resolutions) -> tuple[int, int]:
    """The canvas `(width, height)` that `choose_canvas` chooses for one picture."""
    return tuple(resolutions[choose_canvas([(width, height)], resolutions)[0]])


def select_tiling(width, height, size, tilings) -> tuple[int, int]:
    """`(columns, rows)` of tiles for a picture, by `select_best_resolution`.

    Args:
      width, height: of the picture, pixels.
      size: side of a tile, pixels.
      tilings: `(columns, rows)` to choose from; LLaVA-NeXT's are its pinpoints divided by `size`, DeepStack's are
        `deepstack_tilings`.
    """
    columns, rows = select_best_resolution(width, height, [(c * size, r * size) for c, r in tilings])
    return columns // size, rows // size


def deepstack_tilings(num_crops) -> list[tuple[int, int]]:
    """Every `(columns, rows)` of 2 … `num_crops` tiles, in DeepStack's order: by columns, then rows.

    For small pictures the order makes (1, 2) win over (2, 1), also where the picture is wide, as in the reference.
    DeepStack-V and the reference's `2xsample` have the single tiling (n, n), n = isqrt(num_crops).
    """
    pairs = [(c, r) for c in range(1, num_crops + 1) for r in range(1, num_crops // c + 1)]
    return pairs[1:]  # without (1, 1)


def fit(width, height, canvas_width, canvas_height) -> tuple[int, int]:
    """The size of a picture fitted into a canvas with its aspect ratio kept, the shorter side rounded up.

    The products are taken in the order of the reference, whose rounding they share.
    """
    across, down = canvas_width / width, canvas_height / height
    if across < down:
        return canvas_width, min(math.ceil(height * across), canvas_height)
    return min(math.ceil(width * down), canvas_width), canvas_height


def short_side(width, height, size) -> tuple[int, int]:
    """The size of a picture whose shorter side is made `size`, the longer one truncated (CLIP's processor).

    Raises:
      ValueError: the result has more than `MAX_PIXELS`.
    """
    w, h = _with_short_side(width, height, size)
    if w * h > MAX_PIXELS:
        raise ValueError(f"a picture of {width} x {height} pixels is too long to give its short side {size} pixels")
    return w, h


def size_on_canvas(width, height, size, canvas_width, canvas_height) -> tuple[int, int]:
    """The size of a picture at its own aspect ratio: the shorter side `size` if that fits the canvas, else `fit`."""
    w, h = _with_short_side(width, height, size)
    return (w, h) if w <= canvas_width and h <= canvas_height else fit(width, height, canvas_width, canvas_height)


def _with_short_side(width, height, size):
    long = int(size * max(width, height) / min(width, height))
    return (size, long) if width <= height else (long, size)


def resize(picture, width, height):
    """Bicubic on uint8, as a picture."""
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def resize_padded(picture, width, height, colour):
    """Centres a picture on a square of its longer side in an RGB `colour`, and resizes that (LLaVA's "pad").

    Pillow resizes along rows, rounds to uint8, and then along columns. Padding between the two gives the same bits
    for a wide picture and never builds the square; a tall one, whose rows are padded, goes in strips.
    """
    w, h = picture.size
    side = max(w, h)
    left, top = (side - w) // 2, (side - h) // 2
    narrow = Image.new("RGB", (width, side), colour)
    if w >= h:
        narrow.paste(resize(picture, width, h), (0, top))
    else:
        for y in range(0, h, STRIP):
            rows = picture.crop((0, y, w, min(y + STRIP, h)))
            strip = Image.new("RGB", (side, rows.height), colour)
            strip.paste(rows, (left, 0))
            narrow.paste(resize(strip, width, rows.height), (0, y))
    return resize(narrow, width, height)


def resize_fitted(picture, width, height):
    """Fits a picture into a black canvas, centred, its aspect ratio kept (LLaVA-NeXT's any-resolution)."""
    w, h = fit(*picture.size, width, height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(resize(picture, w, h), ((width - w) // 2, (height - h) // 2))
    return canvas


def resize_cropped(picture, width, height):
    """The centre square of a picture whose shorter side is made `width` (CLIP's processor, LLaVA's "square").

    Raises:
      ValueError: the canvas is not square, or the picture too long; see `short_side`.
    """
    if width != height:
        raise ValueError(f"data.aspect 'square' needs a square tiling, got a canvas of {width} x {height} pixels")
    w, h = short_side(*picture.size, width)
    left, top = (w - width) // 2, (h - width) // 2
    return resize(picture, w, h).crop((left, top, left + width, top + width))


def resize_short_side(picture, size) -> np.ndarray:
    """The whole picture at its own aspect ratio (ConvLLaVA, section 4.3): `[h, w, 3]` uint8, min(h, w) = `size`.

    Raises:
      ValueError: see `short_side`.
    """
    return np.asarray(resize(picture, *short_side(*picture.size, size)))


def resize_on_canvas(picture, size, width, height) -> np.ndarray:
    """A picture resized to `size_on_canvas`, at the top left of a black canvas: `[height, width, 3]` uint8."""
    w, h = size_on_canvas(*picture.size, size, width, height)
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[:h, :w] = np.asarray(resize(picture, w, h))
    return canvas


# aspect: how the whole picture is brought to a canvas, and how the tiled one
_RESIZE = {
    "pad": (resize_padded, resize_padded),
    "stretch": (resize, resize),
    "square": (resize_cropped, resize_cropped),
    "anyres": (resize, resize_fitted),
}
ASPECTS = (*_RESIZE, "own")  # "own": `resize_on_canvas`


def make_views(picture, size, aspect="pad", tiling=(), zoom=1, padding=(0, 0, 0)) -> np.ndarray:
    """What the encoder sees of one picture.

    | reference | aspect | tiling | zoom |
    |---|---|---|---|
    | LLaVA-1.5, M3, ConvLLaVA | pad | () | 1 |
    | their "square" | square | () | 1 |
    | LLaVA-NeXT | anyres | chosen by `select_tiling` | 1 |
    | DeepStack-L | stretch, or anyres for its aspect-keeping flags | chosen by `select_tiling` | 1 |
    | DeepStack-V | stretch | (n, n), n = isqrt(num_crops) | 1 |
    | DeepStack-L-HD | stretch | chosen by `select_tiling` | n |

    The view of aspect "own" is `resize_on_canvas`.

    Args:
      picture: an RGB `PIL.Image`.
      size: side of a view, pixels.
      aspect: "pad" keeps the aspect ratio by padding to a square, "stretch" does not keep it, "square" crops to the
        centre, "anyres" stretches the whole picture and fits the tiled one into a black canvas.
      tiling: `(columns, rows)` of tiles that the picture is cut into at higher resolution, or () for none.
      zoom: every view so far is followed up by zoom · zoom tiles at `zoom` times its resolution, if more than 1.
      padding: RGB 0 … 255 of what stands beside the picture in its square, of aspect "pad"; LLaVA's is the mean of
        the encoder's normalisation.

    Returns:
      `[(1 + columns · rows) · (1 + zoom² if zoom > 1), size, size, 3]` uint8: the whole picture, its tiles row by
      row, then in this order the zoomed tiles of each, row by row.

    Raises:
      ValueError: an unknown aspect, or one that the picture or the tiling does not allow.
    """
    if aspect not in _RESIZE:
        raise ValueError(f"data.aspect must be one of {sorted(_RESIZE)}, got '{aspect}'")
    seen = []
    for factor in (1, zoom) if zoom > 1 else (1,):
        canvases = [(1, 1), tuple(tiling)] if tiling else [(1, 1)]
        for (columns, rows), to_canvas in zip(canvases, _RESIZE[aspect], strict=False):
            colour = {"colour": padding} if to_canvas is resize_padded else {}
            canvas = to_canvas(picture, columns * factor * size, rows * factor * size, **colour)
            cells = np.asarray(canvas).reshape(rows, factor, size, columns, factor, size, 3)
            seen.append(cells.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, size, size, 3))
    return np.concatenate(seen)


def margins(rows, columns, width, height):
    """Rows above and below, and columns left and right, of a canvas that its picture leaves (LLaVA-NeXT).

    The reference's roundings are kept: a cell of padding may stay, and of a small picture at a coarse scale nothing.

    Args:
      rows, columns: of the canvas, in tokens.
      width, height: of the original picture, in pixels; `resize_fitted` has centred it. Or arrays of them.

    Returns:
      `(rows, columns)` on each side, int or arrays.
    """
    wide = width / height > columns / rows
    above = (rows - (height * (columns / width)).astype(np.int64)) // 2
    left = (columns - (width * (rows / height)).astype(np.int64)) // 2
    return np.where(wide, above, 0), np.where(wide, 0, left)


def unpad(rows, columns, width, height) -> tuple[slice, slice]:
    """The cells of a canvas that show its picture, see `margins`: `(row slice, column slice)`, possibly empty."""
    above, left = map(int, margins(rows, columns, np.float64(width), np.float64(height)))
    return slice(above, rows - above), slice(left, columns - left)
