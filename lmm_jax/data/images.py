"""Pictures to views: what the encoder is given, uint8, resized by Pillow as the reference codes do."""

import io

import numpy as np
from PIL import Image

MEAN_COLOUR = (122, 116, 104)  # int(255 · mean of CLIP's normalisation), LLaVA's padding


def open_picture(image):
    """An RGB picture from a path, encoded bytes, or a `PIL.Image`.

    Raises:
      ValueError: naming what cannot be read as a picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        what = f"{len(image)} bytes" if isinstance(image, bytes) else image
        raise ValueError(f"cannot read a picture from {what}: {error}") from error


def pad_to_square(picture):
    """Centres an RGB picture on a square of its longer side, in `MEAN_COLOUR`."""
    w, h = picture.size
    side = max(w, h)
    canvas = Image.new("RGB", (side, side), MEAN_COLOUR)
    canvas.paste(picture, ((side - w) // 2, (side - h) // 2))
    return canvas


def resize(picture, width, height) -> np.ndarray:
    """Bicubic on uint8: `[height, width, 3]`."""
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def views(picture, size, aspect="pad", tiling=()) -> np.ndarray:
    """What the encoder sees of one picture.

    Args:
      picture: an RGB `PIL.Image`.
      size: side of a view, pixels.
      aspect: "pad" keeps the aspect ratio by padding to a square, "stretch" does not keep it.
      tiling: `(columns, rows)` of tiles that the picture is cut into at higher resolution, or () for none.

    Returns:
      `[1 + columns · rows, size, size, 3]` uint8: the whole picture, then the tiles row by row.

    Raises:
      ValueError: an unknown aspect.
    """
    if aspect not in ("pad", "stretch"):
        raise ValueError(f"data.aspect must be 'pad' or 'stretch', got '{aspect}'")
    picture = pad_to_square(picture) if aspect == "pad" and picture.width != picture.height else picture
    whole = resize(picture, size, size)[None]
    if not tiling:
        return whole
    columns, rows = tiling
    large = resize(picture, columns * size, rows * size)
    tiles = large.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
    return np.concatenate([whole, tiles])
