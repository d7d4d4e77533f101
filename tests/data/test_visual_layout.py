"""Layouts of visual tokens against mosaics that are put together by hand, as the references describe them."""

import dataclasses
import itertools
import math
import re

import numpy as np
import pytest

from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.segments import TEXT
from lmm_jax.data.views import deepstack_tilings, select_best_resolution
from lmm_jax.data.visual_layout import NEWLINE, VisualLayout

DEEPSTACK = tuple(deepstack_tilings(4))
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
LINE = np.array([7.0, -7.0])  # the newline's vector

# name: fields beside the sizes; the table of the module, once more as code
RECIPES = {
    "llava": {},
    "flat": {"tilings": NEXT, "aspect": "anyres", "sequence": "flat"},
    "spatial": {"tilings": NEXT, "aspect": "anyres", "sequence": "grid"},
    "unpad": {"tilings": NEXT, "aspect": "anyres", "sequence": "unpad", "newline": True},
    "L": {"tilings": DEEPSTACK, "aspect": "stretch", "stacks": "samples"},
    "L 1d": {"tilings": DEEPSTACK, "aspect": "stretch", "stacks": "samples", "sampling": "1d"},
    "L grid": {"tilings": DEEPSTACK, "aspect": "anyres", "stacks": "samples", "sampling": "grid"},
    "dummy_local": {"tilings": DEEPSTACK, "aspect": "stretch", "stacks": "copies"},
    "only_global": {"aspect": "stretch", "sequence": "blank", "stacks": "whole"},
    "global_and_local": {"tilings": DEEPSTACK, "aspect": "stretch", "sequence": "blank", "stacks": "whole+samples"},
    "string_woglobal": {"tilings": DEEPSTACK, "aspect": "stretch", "sequence": "samples"},
    "string_withglobal": {"tilings": DEEPSTACK, "aspect": "stretch", "sequence": "whole+samples"},
    "HD": {
        "tilings": DEEPSTACK,
        "aspect": "stretch",
        "zoom": 2,
        "sequence": "grid",
        "stacks": "zoom",
        "newline": True,
    },
    "HD flat": {"tilings": DEEPSTACK, "aspect": "stretch", "zoom": 3, "sequence": "flat", "stacks": "zoom"},
    "zoomed": {"aspect": "stretch", "zoom": 2, "stacks": "zoom"},
}
# size -> tiling by each of the two sets of tilings; the small wide picture ties and takes the portrait one
SIZES = {
    (300, 290): ((2, 2), (2, 2)),
    (50, 310): ((1, 4), (1, 3)),
    (200, 60): ((3, 1), (3, 1)),
    (30, 9): ((1, 2), (1, 2)),
}


def visual(name, grid=6):
    return VisualLayout(size=grid * 14, cell=14, canvas=(grid * 14, grid * 14), **RECIPES[name])


def expected(name, views, tiling, scale, size):
    """What stands in the sequence `[n, C]` and what is added over it `[S, n, C]`, from the picture's own views."""
    tiles = math.prod(tiling) if tiling else 0

    def pooled(grid):
        m, k = math.isqrt(scale), len(grid) // math.isqrt(scale)
        return grid.reshape(m, k, m, k, -1).mean((1, 3))

    def joined(grids, columns):
        lines = [np.concatenate(grids[i : i + columns], axis=1) for i in range(0, len(grids), columns)]
        return np.concatenate(lines, axis=0)

    def samples(grids, columns, sampling="2d"):
        whole, rows = joined(grids, columns), len(grids) // columns
        if sampling == "2d":
            return [whole[i::rows, j::columns] for i in range(rows) for j in range(columns)]
        if sampling == "1d":
            flat = whole.reshape(-1, whole.shape[-1])
            return [flat[k :: len(grids)].reshape(grids[0].shape) for k in range(len(grids))]
        return list(grids)

    def flat(grids):
        return np.concatenate([pooled(g).reshape(-1, 2) for g in grids])

    def merged(grids, newline=True, cut=False):
        canvas = joined([pooled(g) for g in grids[1:]], tiling[0])
        rows, columns = canvas.shape[:2]
        w, h = size
        if cut and w / h > columns / rows:
            p = (rows - int(h * (columns / w))) // 2
            canvas = canvas[p : rows - p]
        elif cut:
            p = (columns - int(w * (rows / h))) // 2
            canvas = canvas[:, p : columns - p]
        lines = [np.concatenate([line, [LINE]]) if newline else line for line in canvas]
        return np.concatenate([flat(grids[:1]), *lines])

    whole, local, zero = views[0], views[1 : 1 + tiles], np.zeros_like(views[0])
    if name == "llava":
        return flat([whole]), []
    if name == "flat":
        return flat(views), []
    if name == "spatial":
        return merged(views, newline=False), []
    if name == "unpad":
        return merged(views, cut=True), []
    if name in ("L", "L 1d", "L grid"):
        found = samples(local, tiling[0], name.removeprefix("L ").replace("L", "2d"))
        return flat([whole]), [flat([s]) for s in [*found, *[zero] * (4 - len(found))]]
    if name == "dummy_local":
        return flat([whole]), [flat([whole])] * 4
    if name == "only_global":
        return flat([zero]), [flat([whole])]
    if name == "global_and_local":
        found = samples(local, tiling[0])
        return flat([zero]), [flat([s]) for s in [whole, *found, *[zero] * (4 - len(found))]]
    if name == "string_woglobal":
        return flat(samples(local, tiling[0])), []
    if name == "string_withglobal":
        return flat([whole, *samples(local, tiling[0])]), []
    n = {"HD": 2, "HD flat": 3, "zoomed": 2}[name]
    zoomed = views[1 + tiles :].reshape(1 + tiles, n * n, *whole.shape)
    layers = list(zip(*[samples(list(of_unit), n) for of_unit in zoomed], strict=True))
    if name == "HD":
        return merged(views[: 1 + tiles]), [merged(layer) for layer in layers]
    return flat(views[: 1 + tiles]), [flat(layer) for layer in layers]


def on_device(layout, features, source):
    """Bank `[P, C]` and stacks `[S, P, C]`: gathered, pooled per scale, laid end to end, the newline last."""
    table = features.reshape(-1, features.shape[-1])
    grids = features[None] if source is None else np.where((source >= 0)[..., None], table[source], 0)
    out = []
    for of_stack in grids:
        parts = []
        for scale in layout.scales:
            k = layout.visual.size // layout.visual.cell // math.isqrt(scale)
            rows, columns = (side // k for side in layout.visual.view_grid)
            cut = of_stack[:, : rows * k, : columns * k].reshape(-1, rows, k, columns, k, features.shape[-1])
            parts.append(cut.mean((2, 4)).reshape(-1, features.shape[-1]))
        out.append(np.concatenate([*parts, [LINE]]))
    return out[0], np.array(out[1:])


def layout_of(a, views, scales):
    return PackLayout(a, scales, views, rows=1, length=9999, targets=9, template="qa", too_long="refuse")


@pytest.fixture(scope="module")
def tokenizer(digits_folder):
    return Prepared(digits_folder, "train").tokenizer


@pytest.mark.parametrize("name", RECIPES)
def test_packs_of_pictures_hold_what_is_put_together_by_hand(name, tokenizer):
    a, scales = visual(name), (36, 4, 1)
    tilings = {size: a.tiling(*size) for size in SIZES}
    if a.tilings and a.stacks != "copies":
        assert tilings == {size: pair[a.tilings == NEXT] for size, pair in SIZES.items()}
    counts = [a.views_of_tiling(t) for t in tilings.values()]
    layout = layout_of(a, sum(counts) + 3, scales)
    features = np.random.default_rng(0).normal(size=(layout.views, *a.view_grid, 2))
    seen = [(size, np.zeros((n, *a.canvas, 3), np.uint8)) for size, n in zip(SIZES, counts, strict=True)]
    out = layout.assemble([], seen)
    assert ("gather" in out) != a.direct and "extent" not in out
    bank, stacks = on_device(layout, features, out.get("gather"))
    assert len(stacks) == a.added
    turns = [("user", "<image>" * len(SIZES))]
    for scale, segment in zip(scales, layout.segments(turns, list(SIZES), tokenizer, scales), strict=True):
        of_pictures = np.split(np.arange(layout.views), np.cumsum(counts))
        wanted = [
            expected(name, features[views], tiling, scale, size)
            for (size, tiling), views in zip(tilings.items(), of_pictures, strict=False)
        ]
        slot = segment.slot[segment.slot >= 0]
        np.testing.assert_allclose(bank[slot], np.concatenate([sequence for sequence, _ in wanted]), atol=1e-12)
        for s in range(a.added):
            np.testing.assert_allclose(stacks[s][slot], np.concatenate([added[s] for _, added in wanted]), atol=1e-12)
        np.testing.assert_array_equal(a.tokens(list(SIZES), scale), [len(sequence) for sequence, _ in wanted])


def test_published_numbers_of_tokens():
    hd = visual("HD", 24)
    published = {(1, 2): 1776, (2, 1): 1752, (1, 3): 2376, (3, 1): 2328, (2, 2): 2928, (1, 4): 2976, (4, 1): 2904}
    assert {tiling: len(hd.slots(tiling, 576, (1, 1))) for tiling in DEEPSTACK} == published
    assert [hd.views_of_tiling(tiling) for tiling in ((1, 2), (2, 2))] == [15, 25]
    unpad = visual("unpad", 24)
    assert unpad.tokens([(672, 672)], 576).tolist() == [576 + 48 * 49]
    assert unpad.tiling(40, 9) == (1, 2)  # small and wide, on the portrait canvas
    assert unpad.tokens([(40, 9)], 1).tolist() == [1]  # of which nothing is left at the coarsest scale
    assert len(unpad.slots((), 576, (40, 9))) == 577 and unpad.slots((), 576, (40, 9))[-1] == NEWLINE


@pytest.mark.parametrize("name", [*RECIPES, "own"])
def test_counting_many_pictures_equals_laying_each_out(name):
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 900, (60, 2)) // rng.integers(1, 40, (60, 1)) + 1
    a = VisualLayout(84, 14, (84, 140), "own") if name == "own" else visual(name)
    for scale in (36, 9, 4, 1):
        tokens = a.tokens(sizes, scale)
        assert tokens.tolist() == [len(a.slots(a.tiling(*size), scale, size)) for size in sizes.tolist()]
    assert a.views_of(sizes).tolist() == [a.views_of_tiling(a.tiling(*size)) for size in sizes.tolist()]
    assert all(a.views_of_tiling(a.tiling(*size)) % a.views_step == 0 for size in sizes.tolist())


def test_the_chosen_canvas_follows_the_rule_as_it_is_written():
    def plain(w, h, canvases):
        best = None
        for W, H in canvases:
            r = min(W / w, H / h)
            kept = min(int(w * r) * int(h * r), w * h)
            if best is None or kept > best[0] or (kept == best[0] and W * H - kept < best[1]):
                best = kept, W * H - kept, (W, H)
        return best[2]

    canvases = [(c * 336, r * 336) for c, r in DEEPSTACK]
    for w, h in np.random.default_rng(0).integers(1, 2000, (500, 2)).tolist():
        assert select_best_resolution(w, h, canvases) == plain(w, h, canvases)


@pytest.mark.parametrize("name", ["L", "string_woglobal", "HD", "flat", "dummy_local"])
def test_a_pack_has_room_for_the_units_of_any_pictures(name):
    a = visual(name)
    tilings = [()] if name == "dummy_local" else a.tilings
    kinds = sorted({(a.views_of_tiling(tiling), a.grids_of_tiling(tiling)) for tiling in tilings})
    for views in (0, 2, 7, 13, 30):
        most = views if a.direct else 0
        for counts in itertools.product(*(range(views // v + 1) for v, _ in kinds)):
            if sum(n * v for n, (v, _) in zip(counts, kinds, strict=True)) <= views:
                most = max(most, sum(n * u for n, (_, u) in zip(counts, kinds, strict=True)))
        assert a.most_grids(views) == most
    assert visual("L").most_grids(15) == 5 and visual("flat").most_grids(15) == 15


def test_tiles_inside_the_encoder_leave_whole_pictures():
    a = VisualLayout(84, 14, (84, 84), "stretch", ((2, 2),), stacks="encoder")
    assert a.direct and a.added == 0 and (a.views_step, a.most_grids(15)) == (5, 3)
    placed = layout_of(a, 15, (36,)).place([(50, 50), (90, 20), (20, 90)])
    assert [(p.first_view, p.first_grid) for p in placed] == [(0, 0), (5, 1), (10, 2)]


OWN = VisualLayout(size=84, cell=14, canvas=(84, 140), aspect="own")


@pytest.mark.parametrize("size", [(84, 84), (140, 84), (100, 84), (400, 300), (300, 400), (1000, 84), (60, 50)])
def test_windows_of_a_canvas_lie_inside_its_picture(size, tokenizer):
    layout = layout_of(OWN, 3, (36, 9, 4))
    (height, width) = OWN.extents([size])[0]
    assert height <= 84 and width <= 140 and abs(width / height - size[0] / size[1]) < 0.03 * size[0] / size[1]
    assert min(height, width) == 84 or height == 84 or width == 140
    seen = np.zeros((6, 10), bool)
    seen[: height // 14, : width // 14] = True
    for number, (scale, k) in enumerate(((36, 1), (9, 2), (4, 3))):
        inside = seen[: 6 // k * k, : 10 // k * k].reshape(6 // k, k, 10 // k, k).all((1, 3))
        before = 3 * sum((6 // j) * (10 // j) for j in (1, 2, 3)[:number])
        want = before + 2 * inside.size + np.flatnonzero(inside)
        sizes = [(84, 84), (84, 84), size]
        turns = [("user", "<image>" * 3)]
        if not inside.any():
            with pytest.raises(
                ValueError, match=rf"too thin to have a visual token at scale {scale}; .*data\.canvas"
            ):
                layout.segments(turns, sizes, tokenizer, (scale,))
            continue
        (segment,) = layout.segments(turns, sizes, tokenizer, (scale,))
        np.testing.assert_array_equal(segment.slot[segment.slot >= 0][-len(want) :], want)


NATIVE = VisualLayout(size=96, cell=4, canvas=(64, 96), aspect="native", shuffle=(2,), pixels=(256, 4096))


@pytest.mark.parametrize(
    ("size", "extent"), [((50, 30), (32, 48)), ((10, 6), (16, 24)), ((900, 300), (32, 104)), ((64, 48), (48, 64))]
)
def test_a_picture_of_its_native_size_has_a_token_for_each_step(size, extent, tokenizer):
    rows, columns = extent[0] // 8, extent[1] // 8
    if columns * 8 > 96:  # by itself it would fit, but not this canvas
        assert not NATIVE.extents([size]).any() and NATIVE.tokens([size], 144).tolist() == [0]
        with pytest.raises(ValueError, match="104 x 32 by data.max_pixels=4096, does not fit a canvas"):
            layout_of(NATIVE, 1, (144,)).segments([("user", "<image>")], [size], tokenizer, (144,))
        assert "does not fit a canvas of 96 x 64 (data.canvas)" in NATIVE.no_token
    held = NATIVE.holding([size])
    assert held.extents([size]).tolist() == [list(extent)] and held.shown(size, 144) == (rows, columns)
    assert held.slots((), 144, size).tolist() == list(range(rows * columns))  # its canvas is as large as it is
    assert held.shown(size, 36) == (rows // 2, columns // 2)  # budgets pool what the projector gives
    assert held.tokens([size], 144).tolist() == [rows * columns]


def test_pictures_without_a_native_size_are_refused_and_those_of_a_prompt_share_a_canvas(tokenizer):
    long = NATIVE.holding([(2010, 10)])
    assert not long.extents([(2010, 10)]).any()
    with pytest.raises(ValueError, match="2010 x 10 pixels is more than 200 times as long as wide"):
        layout_of(long, 1, (144,)).segments([("user", "<image>")], [(2010, 10)], tokenizer, (144,))
    both = NATIVE.holding([(900, 300), (48, 48)])
    assert both.canvas == (48, 104) and both.extents([(900, 300), (48, 48)]).tolist() == [[32, 104], [48, 48]]
    assert NATIVE.holding([]).canvas == (8, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"canvas": (64, 92)}, "data.canvas=(64, 92): expected (height, width) in pixels, multiples of 8"),
        ({"pixels": (32, 4096)}, "data.min_pixels=32, data.max_pixels=4096: expected as many pixels as a token"),
        ({"pixels": (4096, 256)}, "the second not below the first"),
        ({"reduction": "random"}, "data.aspect='native' does not give"),
        ({"sequence": "blank", "stacks": "whole"}, "data.aspect='native' goes with data.sequence='whole'"),
    ],
)
def test_native_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(NATIVE, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aspect": "squash"}, "data.aspect='squash' is none of 'pad'"),
        ({"sequence": "mosaic"}, "data.sequence='mosaic' is none of"),
        ({"stacks": "tiles"}, "data.stacks='tiles' is none of"),
        ({"sampling": "3d"}, "data.sampling='3d' is none of"),
        ({"tilings": ((2, 0),), "stacks": "samples"}, r"data.tilings=\(\(2, 0\),\): expected"),
        ({"tilings": NEXT, "stacks": "samples"}, "does not follow; set data.aspect"),
        ({"tilings": ((2, 2),), "sequence": "unpad", "newline": True}, "'unpad' needs data.aspect='anyres'"),
        ({"zoom": 2}, "data.zoom=2: more than 1 goes with data.stacks='zoom'"),
        ({"stacks": "zoom"}, "data.zoom=1: more than 1 goes with"),
        ({"stacks": "samples"}, "data.tilings is empty"),
        ({"tilings": ((2, 2),)}, "are not used by data.sequence='whole'"),
        ({"tilings": ((2, 2),), "sequence": "grid", "stacks": "samples"}, "goes with data.stacks '' or 'zoom', got"),
        ({"sequence": "blank"}, "data.sequence='blank' goes with"),
        ({"tilings": ((2, 1),), "stacks": "encoder"}, r"needs a single data.tilings=\(\(n, n\),\)"),
        ({"canvas": (84, 140)}, "goes with data.aspect='own'"),
        ({"canvas": (84, 141), "aspect": "own"}, "multiples of 14"),
        ({"canvas": (70, 140), "aspect": "own"}, "not below model.vision.image_size=84"),
        ({"aspect": "own", "sequence": "blank", "stacks": "whole"}, "data.aspect='own' goes with"),
        ({"sequence": "tiles"}, "data.sequence='tiles': data.tilings is empty"),
        ({"canvas": (84, 84), "canvases": ((84, 84),)}, "go with data.aspect='own'"),
        ({"aspect": "own", "canvases": ((84, 84), (84, 90))}, r"data.canvas=\(84, 90\): expected"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VisualLayout(**{"size": 84, "cell": 14, "canvas": (84, 84)} | fields)


class Marker:
    """A tokenizer of control pieces and single characters, as far as marks ask one."""

    def markup(self, text):
        return [500 + len(piece) if piece.startswith("<") else piece for piece in re.findall(r"<[^>]+>|[^<]+", text)]

    def encode(self, text, prefix=True):
        assert not prefix
        return [ord(c) for c in text]


def tiled(**fields):
    tilings = tuple((columns, rows) for columns in (1, 2, 3) for rows in (1, 2, 3) if columns * rows <= 4)
    made = {"size": 84, "cell": 14, "canvas": (84, 84), "aspect": "stretch", "sequence": "tiles", "choice": "ratio"}
    return VisualLayout(**made | {"tilings": tilings, "marks": "granite_docling", "shuffle": (2, 1)} | fields)


def test_tiles_stand_with_their_marks_and_the_whole_picture_comes_last():
    layout = tiled().with_marks(Marker())
    slots = layout.slots((2, 1), 9, (200, 100))
    fake, tile, whole = (
        TEXT - (500 + len(x)) for x in ("<fake_token_around_image>", "<row_1_col_1>", "<global-img>")
    )
    newline = TEXT - ord("\n")
    first, second, overview = ([*range(n * 9, n * 9 + 9)] for n in (1, 2, 0))
    want = [fake, tile, *first, fake, tile, *second, newline, newline, fake, whole, *overview, fake]
    assert slots.tolist() == want
    assert layout.slots((), 9, (84, 84)).tolist() == [
        fake,
        tile,
        *range(9),
        newline,
    ]  # seen whole, it is the first tile
    assert layout.tokens([(200, 100), (84, 84)], 9).tolist() == [len(want), 12]
    assert layout.tokens([(200, 100)], 36).tolist() == [len(want) + 3 * 27]


def test_ids_of_marks_have_to_be_known():
    with pytest.raises(ValueError, match="the ids of its text are not known"):
        tiled().slots((2, 1), 9, (200, 100))
    plain = tiled(marks="")
    assert plain.with_marks(Marker()) is plain and len(plain.slots((2, 1), 9, (200, 100))) == 27


def test_scales_are_those_of_the_paths_of_the_projector():
    assert tiled().valid_scales == [1, 9, 36]  # the 3×3 of the coarse path, the 6×6 of the fine one
    assert tiled(shuffle=(2,)).valid_scales == [1, 9] and tiled(shuffle=(1,)).valid_scales == [1, 4, 9, 36]
    with pytest.raises(ValueError, match=r"36 tokens do not tile a 3×3 grid; valid scales are \[1, 9\]"):
        tiled(shuffle=(2,)).token_grid(36)
    with pytest.raises(ValueError, match=r"shuffle=\(4,\) does not divide the 6×6 features"):
        tiled(shuffle=(4,))


@pytest.mark.parametrize(
    ("size", "tiling"),
    [((150, 150), (2, 2)), ((40, 40), ()), ((300, 100), (3, 1)), ((90, 200), (1, 2)), ((260, 100), (3, 1))],
)
def test_the_tiling_of_the_nearest_shape(size, tiling):
    """Of equally near ones the larger, if the picture has more than half as many pixels as its tiles."""
    assert tiled().tiling(*size) == tiling


def test_a_picture_goes_to_the_smallest_canvas_that_shows_most_of_it():
    layout = VisualLayout(
        size=28, cell=14, canvas=(56, 56), aspect="own", canvases=((28, 28), (28, 56), (56, 28), (56, 56))
    )
    sizes = [(10, 10), (20, 10), (10, 20), (100, 10), (15, 10)]
    assert layout.choose_buckets(sizes, np.arange(5), 5).tolist() == [0, 1, 2, 1, 1]
    # Two pictures of a record share a canvas; a record without pictures goes where most of the others are.
    assert layout.choose_buckets(sizes[1:3], np.array([0, 0]), 2).tolist() == [3, 3]
    assert [bucket.canvas for bucket in layout.buckets] == [(28, 28), (28, 56), (56, 28), (56, 56)]
    for number, bucket in enumerate(layout.buckets):
        assert bucket.buckets == (bucket,), number


def shrunk(features, most, side):
    """A map `[rows, columns, C]` made smaller bilinearly if it has over 1.21 times as many cells as `most` views."""
    rows, columns = features.shape[:2]
    ratio = math.sqrt(rows * columns / (most * side * side))
    if ratio <= 1.1:
        return features
    height, width = max(int(rows // ratio), 1), max(int(columns // ratio), 1)
    out = np.zeros((height, width, features.shape[2]))
    for i, j in itertools.product(range(height), range(width)):
        y, x = max((i + 0.5) * rows / height - 0.5, 0), max((j + 0.5) * columns / width - 0.5, 0)
        top, left = int(y), int(x)
        for row, down in ((top, 1 - (y - top)), (min(top + 1, rows - 1), y - top)):
            for column, across in ((left, 1 - (x - left)), (min(left + 1, columns - 1), x - left)):
                out[i, j] += down * across * features[row, column]
    return out


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("scale", [1, 4, 9, 36])
def test_a_mosaic_of_many_tokens_is_shrunk_at_every_scale(scale, most):
    layout = dataclasses.replace(visual("unpad"), shrink=most)
    plain, side, smaller = visual("unpad"), math.isqrt(scale), 0
    for size in SIZES:
        tiling = layout.tiling(*size)
        table = np.random.default_rng(0).normal(size=((1 + math.prod(tiling)) * scale + 1, 2))  # the newline is last
        slots, shares = layout.blends(tiling, scale, size)
        np.testing.assert_array_equal(slots[:, 0], layout.slots(tiling, scale, size))
        assert layout.tokens([size], scale).tolist() == [len(slots)]
        unshrunk = table[plain.slots(tiling, scale, size)][scale:]
        rows = int((plain.slots(tiling, scale, size) == NEWLINE).sum())
        if not rows:
            continue
        mosaic = unshrunk.reshape(rows, -1, 2)[:, :-1]
        want = shrunk(mosaic, most, side)
        lines = np.repeat(table[None, -1:], len(want), axis=0)
        want = np.concatenate([table[:scale], np.concatenate([want, lines], axis=1).reshape(-1, 2)])
        np.testing.assert_allclose((table[slots] * shares[..., None]).sum(axis=1), want, atol=1e-5)
        smaller += len(slots) < len(unshrunk) + scale
    assert bool(smaller) == (most < 4)


def test_pictures_that_are_not_alone_have_a_layout_of_their_own():
    layout = dataclasses.replace(visual("unpad"), tiled_alone=True)
    alone, several = layout.buckets
    assert alone == layout and several.buckets == (several,)
    assert (several.aspect, several.tilings) == ("pad", ())
    assert several.tokens([(300, 290), (50, 310)], 36).tolist() == [37, 37]
    assert several.slots((), 36, (50, 310)).tolist() == [*range(36), NEWLINE]
    assert several.views_of([(300, 290)]).tolist() == [1]
    sizes, of_group = np.array([(300, 290)] * 6), np.array([0, 2, 2, 3, 3, 3])
    assert layout.choose_buckets(sizes, of_group, 4).tolist() == [0, 0, 1, 1]
    assert layout.most_grids(7) == several.most_grids(7)
