"""Pictures to views: what the encoder is given, uint8, resized by Pillow as the reference codes do.

First the geometry, from sizes alone, so that a plan needs no pictures; then the pixels.
"""

import math

import numpy as np
from PIL import Image

from lmm_jax.data.images import MAX_PIXELS

LONGEST_NATIVE = 200  # times as long as wide, of aspect "native"
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


def choose_by_ratio(sizes, tilings, size) -> np.ndarray:
    """The tiling whose shape is nearest to each picture's (InternVL's and Granite-Docling's rule).

    Tilings are looked at by rising number of tiles. Of equally near ones, a later one wins if the picture has more
    than half as many pixels as its tiles.

    Args:
      sizes: `[n, 2]` (width, height) of pictures, pixels.
      tilings: `(columns, rows)`; the order decides ties of as many tiles.
      size: side of a tile, pixels.

    Returns:
      `[n]` numbers of tilings.
    """
    width, height = np.asarray(sizes, np.int64).reshape(-1, 2).T
    best, nearest = np.zeros(len(width), np.int64), np.full(len(width), np.inf)
    for number in sorted(range(len(tilings)), key=lambda i: math.prod(tilings[i])):
        columns, rows = tilings[number]
        away = np.abs(width / height - columns / rows)
        large = width * height > 0.5 * size * size * columns * rows
        best = np.where((away < nearest) | ((away == nearest) & large), number, best)
        nearest = np.minimum(away, nearest)
    return best


def sizes_by_longest(sizes, size, most) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of pictures whose longer side is made `most` tiles long (SmolVLM's and Idefics3's rule).

    Args:
      sizes: `[n, 2]` (width, height) of pictures, pixels.
      size: side of a tile, pixels.
      most: tiles.

    Returns:
      `[n, 2]` (width, height) of the pictures, the shorter side truncated and made even, and `[n, 2]` (columns, rows)
      of the tiles that hold them.
    """
    pixels, sizes = most * size, np.asarray(sizes, np.int64).reshape(-1, 2)
    width, height = sizes.T
    wide, ratio = width >= height, width / height
    short = np.where(wide, pixels / ratio, pixels * ratio).astype(np.int64)
    short = np.maximum(short + short % 2, 1)
    width, height = np.where(wide, pixels, short), np.where(wide, short, pixels)
    # Each picture is brought to whole tiles by its longer side again, whose product is rounded once more.
    wide, ratio = width >= height, width / height
    across, down = -(-width // size), -(-height // size)
    rows = -(-(across * size / ratio).astype(np.int64) // size)
    columns = -(-(down * size * ratio).astype(np.int64) // size)
    tiles = np.where(wide, across, columns), np.where(wide, rows, down)
    return np.stack([width, height], axis=1), np.stack(tiles, axis=1)


def longest_tilings(most) -> tuple[tuple[int, int], ...]:
    """Every `(columns, rows)` of `sizes_by_longest`."""
    sides = range(1, most + 1)
    return (*((most, rows) for rows in sides), *((columns, most) for columns in sides[:-1]))


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


def native_size(width, height, step, least, most) -> tuple[int, int]:
    """The size of a picture whose sides are made multiples of `step`, pixels within bounds (Qwen's processors).

    Each side is rounded on its own, so that the shape is kept about. (0, 0) for a picture that is more than
    `LONGEST_NATIVE` times as long as wide, which they refuse.

    Args:
      width, height: of the picture, pixels.
      step: pixels.
      least, most: pixels of the whole; a picture of fewer is enlarged, one of more made smaller.
    """
    if max(width, height) > LONGEST_NATIVE * min(width, height):
        return 0, 0
    sides = [round(side / step) * step for side in (width, height)]
    if math.prod(sides) > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(step, math.floor(side / shrink / step) * step) for side in (width, height)]
    elif math.prod(sides) < least:
        enlarge = math.sqrt(least / (height * width))
        sides = [math.ceil(side * enlarge / step) * step for side in (width, height)]
    return sides[0], sides[1]


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


def resize_on_canvas(picture, w, h, width, height) -> np.ndarray:
    """A picture resized to w × h, at the top left of a black canvas: `[height, width, 3]` uint8."""
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[:h, :w] = np.asarray(resize(picture, w, h))
    return canvas


def make_longest_views(picture, size, tiling) -> np.ndarray:
    """The views of aspect "longest": `[1 + columns · rows, size, size, 3]` uint8, of a single tile `[1, …]`.

    The picture is resized three times, by Lanczos' filter as SmolVLM's processor does: until its longer side is whole
    tiles long, then to whole tiles, and from these to the view of the whole.
    """
    columns, rows = tiling or (1, 1)
    (scaled,), _ = sizes_by_longest([picture.size], size, max(columns, rows))
    for shape in (scaled.tolist(), (columns * size, rows * size)):
        picture = picture.resize(shape, Image.Resampling.LANCZOS)
    whole = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))[None]
    cells = np.asarray(picture).reshape(rows, size, columns, size, 3)
    tiles = cells.transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)
    return np.concatenate([whole, tiles]) if tiling else whole


# aspect: how the whole picture is brought to a canvas, and how the tiled one
_RESIZE = {
    "pad": (resize_padded, resize_padded),
    "stretch": (resize, resize),
    "square": (resize_cropped, resize_cropped),
    "anyres": (resize, resize_fitted),
}
# Views of these are canvases, which pictures of any shape stand on, see `resize_on_canvas`: "own" at
# `size_on_canvas`, "native" at `native_size`.
ON_CANVAS = ("own", "native")
LONGEST = "longest"  # of which tilings a picture has says how long its longer side becomes
ASPECTS = (*_RESIZE, LONGEST, *ON_CANVAS)


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
    | SmolVLM | longest | by `sizes_by_longest` | 1 |

    The view of an aspect of `ON_CANVAS` is `resize_on_canvas`.

    Args:
      picture: an RGB `PIL.Image`.
      size: side of a view, pixels.
      aspect: "pad" keeps the aspect ratio by padding to a square, "stretch" does not keep it, "square" crops to the
        centre, "anyres" stretches the whole picture and fits the tiled one into a black canvas; "longest" is
        `make_longest_views`.
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
    if aspect == LONGEST:
        return make_longest_views(picture, size, tiling)
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


def margins(rows, columns, width, height, rounded=False):
    """Rows above and below, and columns left and right, of a canvas that its picture leaves (LLaVA-NeXT).

    The reference's roundings are kept: a cell of padding may stay, and of a small picture at a coarse scale nothing.

    Args:
      rows, columns: of the canvas, in tokens.
      width, height: of the original picture, in pixels; `resize_fitted` has centred it. Or arrays of them.
      rounded: to seven digits before what is behind the point is cut off, as transformers' classes do and the
        reference does not.

    Returns:
      `(rows, columns)` on each side, int or arrays.
    """
    wide = width / height > columns / rows
    seen_height, seen_width = height * (columns / width), width * (rows / height)
    if rounded:
        seen_height, seen_width = np.round(seen_height, 7), np.round(seen_width, 7)
    above = (rows - seen_height.astype(np.int64)) // 2
    left = (columns - seen_width.astype(np.int64)) // 2
    return np.where(wide, above, 0), np.where(wide, 0, left)


def unpad(rows, columns, width, height, rounded=False) -> tuple[slice, slice]:
    """The cells of a canvas that show its picture, see `margins`: `(row slice, column slice)`, possibly empty."""
    above, left = map(int, margins(rows, columns, np.float64(width), np.float64(height), rounded))
    return slice(above, rows - above), slice(left, columns - left)
