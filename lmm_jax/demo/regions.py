"""Which part of a picture each visual token stands for, and each stack that is added over it.

Everything follows from the index arrays that the model itself is given, see `data.visual_layout`: a token is a window
of cells of a grid, a cell is a feature of a view, and a view shows an area of the picture. An area is `(left, top,
right, bottom)` in pixels of the upright picture; it reaches beyond the picture where its view is padding.
"""

import dataclasses
import itertools
import math

import numpy as np

from lmm_jax.data.views import LONGEST, fit
from lmm_jax.data.visual_layout import NEWLINE, mosaic, sample
from lmm_jax.reduction import find_reduction


@dataclasses.dataclass(frozen=True)
class Figure:
    """What is drawn over one way in which the encoder sees a picture: whole, in tiles, or in tiles of these views.

    Attributes:
      views: what the encoder sees, such as "2 × 2 tiles".
      in_sequence: tokens of the sequence whose features come from these views.
      newlines: newline tokens that end the rows of these tokens.
      box: the area that all views together show.
      tiles: `[n, 4]` area of each view.
      tokens: `[n, 4]` outlines of tokens, by their features or, where these are not of these views, by what is added
        over them; a token whose features lie apart has one for each.
      stacks: number of each stack that comes from these views, and the areas `[n, 4]` of its features.
      unused: `[n, 4]` areas of features that become part of neither.
    """

    views: str
    in_sequence: int
    newlines: int
    box: tuple[float, float, float, float]
    tiles: np.ndarray
    tokens: np.ndarray
    stacks: tuple[tuple[int, np.ndarray], ...]
    unused: np.ndarray


def figures(visual, size, scale, level_strides=()) -> list[Figure]:
    """What to draw over a picture, a figure for each way in which the encoder sees it.

    Args:
      visual: the `VisualLayout`.
      size: `(width, height)` of the picture, pixels.
      scale: visual tokens of a square view.
      level_strides: of the encoder, see `models.encoders`. The samples of its finer maps are stacks whose numbers
        follow those of `stack_features`; a map as coarse as the grid lies under the tokens as it stands, and is not
        drawn.

    Raises:
      ValueError: a scale that the grid cannot have.
    """
    tiling = visual.tiling(*size)
    areas, stacks = feature_areas(visual, size), stack_features(visual, tiling)
    bank = bank_features(visual, tiling)
    windows, newlines = token_windows(visual, size, scale)
    of_tokens = [bank[window].reshape(-1) for window in windows]
    over_tokens = [stacks[(slice(None), *window)].reshape(-1) for window in windows]
    used = np.concatenate([*of_tokens, stacks.reshape(-1)])
    last_seen = np.concatenate(of_tokens).max(initial=0) // math.prod(visual.view_grid)  # view with the last rows
    out = []
    for name, views in _ways_of_seeing(visual, tiling):
        first, last = (edge * math.prod(visual.view_grid) for edge in (views.start, views.stop))

        def here(features, first=first, last=last):
            return features[(features >= first) & (features < last)]

        tokens = [found for features in of_tokens if len(found := here(features))]
        shown = tokens or [found for features in over_tokens if len(found := here(features))]
        added = [(number, areas[here(stack)]) for number, stack in enumerate(stacks) if len(here(stack))]
        added += _finer(level_strides, len(stacks), areas[here(np.unique(bank))])
        if not (shown or added):
            continue
        tiles = areas[first:last].reshape(len(views), -1, 4)
        box = _around(tiles.reshape(-1, 4))
        if visual.on_canvas:  # the rest of the canvas is no part of the picture
            box = (0.0, 0.0, *map(float, size))
        figure = Figure(
            views=name,
            in_sequence=len(tokens),
            newlines=newlines if tokens and views.stop > last_seen else 0,
            box=box,
            tiles=np.array([_around(tile) for tile in tiles]),
            tokens=np.concatenate([np.zeros((0, 4)), *(_outline(areas[features]) for features in shown)]),
            stacks=tuple(added),
            unused=areas[np.setdiff1d(np.arange(first, last), used)],
        )
        out.append(figure)
    return out


def view_areas(visual, size) -> np.ndarray:
    """The area of a picture that each of its views shows, `[V, 4]`, in the order of `views.make_views`."""
    width, height = size
    if visual.on_canvas:
        (down, across), (canvas_height, canvas_width) = visual.extents([size])[0], visual.canvas
        return np.array([(0, 0, width * canvas_width / across, height * canvas_height / down)])
    tiling = visual.tiling(width, height)
    found = []
    for factor in (1, visual.zoom) if visual.zoom > 1 else (1,):
        for tiled, (columns, rows) in enumerate(((1, 1), tiling) if tiling else ((1, 1),)):
            pixels = columns * factor * visual.size, rows * factor * visual.size
            area = _canvas(visual.aspect, bool(tiled), width, height, *pixels)
            for tile in _divide(area, rows, columns):
                found += list(_divide(tile, factor, factor))
    return np.array(found)


def feature_areas(visual, size) -> np.ndarray:
    """The area of a picture that each feature of its views stands for, `[V · h · w, 4]`."""
    return np.concatenate([_divide(area, *visual.view_grid) for area in view_areas(visual, size)])


def bank_features(visual, tiling) -> np.ndarray:
    """Features `[grids, h, w]` behind the cells of a picture's grids, -1 for none."""
    if visual.direct:
        shape = (visual.grids_of_tiling(tiling), *visual.view_grid)
        return np.arange(math.prod(shape)).reshape(shape)
    return visual.gather(tiling)[0]


def stack_features(visual, tiling) -> np.ndarray:
    """Features `[S, grids, h, w]` that are added over these cells, -1 for none.

    In the decoder, as the layout says; or, of tiles that are stacked inside the encoder, there.
    """
    if visual.stacks == "encoder":
        return np.stack(sample(mosaic(*tiling, visual.view_grid, 1), *tiling, "2d"))[:, None]
    if visual.direct:
        return np.zeros((0, visual.grids_of_tiling(tiling), *visual.view_grid), int)
    return visual.gather(tiling)[1:]


def token_windows(visual, size, scale) -> tuple[list[tuple[int, slice, slice]], int]:
    """Of each visual token in the sequence its grid, and which rows and columns of cells it stands for.

    Those of a reduction that chooses stand for any cells of their grid. A token that is blended of several has those
    of all of them: three arrays of grids, rows and columns, a number for each cell.

    Returns:
      the tokens in order, newlines left out, and how many newlines there are.
    """
    slots = visual.slots(visual.tiling(*size), scale, size)
    newlines = int((slots == NEWLINE).sum())
    rows, columns = visual.token_grid(scale)
    side, reduction = visual.size // visual.cell, find_reduction(visual.reduction)
    height, width = visual.view_grid
    if reduction.chooses:
        grids = slots[slots != NEWLINE] // columns
        return [(grid, slice(0, height), slice(0, width)) for grid in grids.tolist()], newlines
    down = _edges([reduction.shape(n, width, side, scale)[0] for n in range(height + 1)])
    across = _edges([reduction.shape(height, n, side, scale)[1] for n in range(width + 1)])
    out = []
    tokens, shares = slots[:, None], np.ones((len(slots), 1))
    if visual.shrink:
        tokens, shares = visual.blends(visual.tiling(*size), scale, size)
    for some, share in zip(tokens[slots != NEWLINE], shares[slots != NEWLINE], strict=True):
        windows = []
        for slot in some[share > 0].tolist():
            grid, token = divmod(slot, rows * columns)
            row, column = divmod(token, columns)
            windows.append((grid, down[row], across[column]))
        out.append(windows[0] if len(windows) == 1 else _together(windows))
    return out, newlines


def _together(windows):
    """Several windows, each of a grid and slices of its rows and columns, as one index of their cells."""
    cells = [
        (grid, row, column)
        for grid, rows, columns in windows
        for row in range(rows.start, rows.stop)
        for column in range(columns.start, columns.stop)
    ]
    return tuple(np.array(cells).T)


def _edges(counts):
    """Slices of cells, one a token, from the number of tokens that the first 0, 1, 2, … cells make."""
    edges = [counts.index(n) for n in range(counts[-1] + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _ways_of_seeing(visual, tiling):
    """What to call each group of a picture's views, with their numbers."""
    tiles, zoomed = math.prod(tiling) if tiling else 0, visual.zoom**2 if visual.zoom > 1 else 0
    yield "the whole picture", range(1)
    if tiling:
        yield "{} × {} tiles".format(*tiling), range(1, 1 + tiles)
    if zoomed:
        end = 1 + tiles + zoomed
        yield f"the whole picture, {visual.zoom} × {visual.zoom} tiles of it", range(1 + tiles, end)
        if tiling:
            last = end + tiles * zoomed
            yield "{} × {} tiles, {} × {} tiles of each".format(*tiling, visual.zoom, visual.zoom), range(end, last)


def _canvas(aspect, tiled, width, height, canvas_width, canvas_height):
    """The area that a canvas of so many pixels shows of a picture, see the resizing functions of `data.views`."""
    if aspect in ("stretch", LONGEST) or (aspect == "anyres" and not tiled):
        return 0, 0, width, height
    if aspect == "anyres":
        w, h = fit(width, height, canvas_width, canvas_height)
        left, top = (canvas_width - w) // 2, (canvas_height - h) // 2
        x, y = width / w, height / h
        return -left * x, -top * y, (canvas_width - left) * x, (canvas_height - top) * y
    side = min(width, height) if aspect == "square" else max(width, height)
    left, top = (side - width) // 2, (side - height) // 2  # of the picture in its square, negative where it is cut
    return -left, -top, side - left, side - top


def _divide(area, rows, columns):
    """Areas `[rows · columns, 4]` of equal size, row by row."""
    left, top, right, bottom = area
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x[column], y[row], x[column + 1], y[row + 1]], axis=1)


def _finer(level_strides, first, areas):
    """Numbers of the stacks from the encoder's finer maps, with the areas of their features under those of a grid."""
    out = []
    for stride in level_strides:
        for row, column in np.ndindex(stride, stride):
            if stride > 1 and len(areas):
                under = np.array([_divide(area, stride, stride)[row * stride + column] for area in areas])
                out.append((first, under))
            first += 1
    return out


def _outline(areas):
    """Areas `[n, 4]` as their common outline `[1, 4]` where they fill it, else as they are."""
    sizes = (areas[:, 2] - areas[:, 0]) * (areas[:, 3] - areas[:, 1])
    left, top, right, bottom = around = _around(areas)
    return np.array([around]) if np.isclose(sizes.sum(), (right - left) * (bottom - top)) else areas


def _around(areas):
    """The area around areas `[n, 4]`."""
    return (*areas[:, :2].min(axis=0).tolist(), *areas[:, 2:].max(axis=0).tolist())
