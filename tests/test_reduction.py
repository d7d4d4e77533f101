"""How many, and which: pooling and VisionZip against loops, any reduction alike on the host and on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lmm_jax.config import ConfigError, save_config, visual_layout
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.visual_layout import NEWLINE, VisualLayout
from lmm_jax.generation.model import Model, load
from lmm_jax.hf.write_config import architecture
from lmm_jax.models.lmm import build
from lmm_jax.models.visual_tokens import bank
from lmm_jax.reduction import REDUCTIONS, AveragePool, Random, Reduction, Zip, find_reduction

POOL = REDUCTIONS["pool"]
CHOICES = ("random", "strided", "zip")


class EveryOther(Reduction):
    """Keeps every cell, or every other one of each row, so that its tokens are twice as wide as they are high."""

    def valid(self, side):
        return sorted({side * (side // 2), side * side} - {0})

    def shape(self, rows, columns, side, scale):
        return rows, columns // self._step(side, scale)

    def __call__(self, grids, scale, side):
        step, (h, w, D) = self._step(side, scale), grids.shape[-3:]
        return grids[..., : w // step * step : step, :].reshape(*grids.shape[:-3], h * (w // step), D)

    def _step(self, side, scale):
        self.check(side, scale)
        return side * side // scale


@pytest.fixture
def every_other(monkeypatch):
    monkeypatch.setitem(REDUCTIONS, "every_other", EveryOther())


def layout_of(visual, views, scales):
    return PackLayout(visual, scales, views, rows=1, length=9999, targets=9, template="qa", too_long="refuse")


def pooled_by_loop(grid, k):
    rows, columns = len(grid) // k, len(grid[0]) // k
    windows = [grid[r * k : (r + 1) * k, c * k : (c + 1) * k] for r in range(rows) for c in range(columns)]
    return np.array([window.mean((0, 1)) for window in windows])


@pytest.mark.parametrize("shape", [(6, 6), (6, 10), (5, 7)])
@pytest.mark.parametrize(("scale", "k"), [(1, 6), (4, 3), (9, 2), (36, 1)])
def test_pooling_equals_a_loop_over_windows(shape, scale, k):
    grid = np.random.default_rng(0).normal(size=(*shape, 5)).astype(np.float32)
    want = pooled_by_loop(grid, k).reshape(-1, 5)
    for array in (grid, jnp.asarray(grid)):
        tokens = POOL(array, scale, 6)
        np.testing.assert_allclose(tokens, want, atol=1e-6)
    assert len(want) == np.prod(POOL.shape(*shape, 6, scale))


def test_pooling_in_steps_equals_pooling_at_once():
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(24, 24, 5)), jnp.float32)
    in_steps = POOL(POOL(grid, 144, 24).reshape(12, 12, 5), 9, 12)
    np.testing.assert_allclose(in_steps, POOL(grid, 9, 24), atol=1e-6)


def test_pooling_averages_in_float32_and_keeps_the_dtype():
    assert POOL(jnp.ones((6, 6, 2), jnp.bfloat16), 4, 6).dtype == jnp.bfloat16
    many = jnp.ones((64, 64, 1), jnp.bfloat16).at[0, 0].set(1024.0)  # 5,120 together; in bfloat16, 256 + 1 is 256
    assert float(POOL(many, 1, 64)[0, 0]) == 1.25


@pytest.mark.parametrize("scale", [0, -4, 2, 16, 25, 49, 100, 1000])
def test_scales_that_do_not_tile_are_refused_with_the_valid_ones(scale):
    message = rf"{scale} tokens do not tile a 6×6 grid; valid scales are \[1, 4, 9, 36\]"
    visual = VisualLayout(size=84, cell=14, canvas=(84, 84))
    for half in (
        lambda: POOL(jnp.zeros((6, 6, 2)), scale, 6),
        lambda: POOL.shape(6, 6, 6, scale),
        lambda: bank(jnp.zeros((1, 1, 6, 6, 2)), (scale,), 6, POOL),
        lambda: visual.slots((), scale, (9, 9)),
    ):
        with pytest.raises(ValueError, match=message):
            half()


@pytest.mark.parametrize("reduction", [POOL, EveryOther()])
@pytest.mark.parametrize("side", [1, 2, 6, 24])
def test_a_scale_counts_the_tokens_of_a_square_grid(reduction, side):
    for scale in reduction.valid(side):
        rows, columns = reduction.shape(side, side, side, scale)
        assert rows * columns == scale
        assert reduction(np.zeros((2, side, side, 3), np.float32), scale, side).shape == (2, scale, 3)


@pytest.mark.parametrize("reduction", [POOL, EveryOther()])
def test_a_part_of_a_canvas_has_the_first_of_its_tokens(reduction):
    canvas = np.random.default_rng(0).normal(size=(8, 11, 2)).astype(np.float32)
    h, w = np.random.default_rng(1).integers(0, (9, 12), (20, 2)).T
    for scale in reduction.valid(6):
        tokens = reduction(canvas, scale, 6).reshape(*reduction.shape(8, 11, 6, scale), 2)
        rows, columns = reduction.shape(h, w, 6, scale)
        for i in range(len(h)):
            part = reduction(canvas[: h[i], : w[i]], scale, 6)
            np.testing.assert_array_equal(part, tokens[: rows[i], : columns[i]].reshape(-1, 2))


@pytest.mark.parametrize(
    ("name", "scale", "size", "cells"),
    [  # rows and columns of a 6 × 10 canvas that the picture covers whole
        ("pool", 9, (140, 84), (6, 10)),
        ("pool", 9, (100, 84), (6, 6)),  # 7 cells wide, of which a window covers two
        ("pool", 4, (300, 400), (6, 3)),
        ("every_other", 18, (140, 84), (6, 10)),
        ("every_other", 18, (100, 84), (6, 6)),
        ("every_other", 36, (100, 84), (6, 7)),
    ],
)
def test_slots_of_a_canvas_name_the_cells_of_its_picture(every_other, name, scale, size, cells):
    visual = VisualLayout(size=84, cell=14, canvas=(84, 140), aspect="own", reduction=name)
    layout = layout_of(visual, 2, (36, scale))
    first, second = layout.place([(84, 84), size])
    numbers = np.arange(120, dtype=np.float32).reshape(1, 2, 6, 10, 1)
    on_device = bank(numbers, layout.scales, 6, find_reduction(name))[0, :, 0]
    rows, columns = cells
    want = find_reduction(name)(numbers[0, 1, :rows, :columns], scale, 6)[:, 0]
    np.testing.assert_array_equal(on_device[layout.slots(second, scale)], want)
    assert visual.tokens([size], scale) == len(want) and first.first_grid == 0


def test_tokens_that_are_wider_than_high_stand_row_by_row_in_a_mosaic(every_other):
    fields = {"aspect": "anyres", "tilings": ((2, 1),), "newline": True, "reduction": "every_other"}
    visual = VisualLayout(84, 14, (84, 84), sequence="grid", **fields)
    numbers = np.arange(3 * 36).reshape(3, 6, 6, 1)
    tokens = EveryOther()(numbers, 18, 6).reshape(-1)
    slots = visual.slots((2, 1), 18, (200, 100))
    whole, lines = slots[:18], slots[18:].reshape(6, 7)
    np.testing.assert_array_equal(tokens[whole], numbers[0, :, ::2, 0].reshape(-1))
    assert (lines[:, -1] == NEWLINE).all()
    np.testing.assert_array_equal(tokens[lines[:, :-1]], np.concatenate(numbers[1:, :, ::2, 0], axis=1))
    cut = VisualLayout(84, 14, (84, 84), sequence="unpad", **fields)
    assert cut.token_grid(36) == (6, 6)
    with pytest.raises(ValueError, match=r"'unpad' cuts squares .*'every_other' gives 6 rows of 3 at scale 18"):
        cut.token_grid(18)


@pytest.mark.parametrize(("recipe", "side"), [("deepstack", 3), ("qwen3vl_style", 6)])
def test_the_model_keeps_the_same_cells_for_bank_and_stacks(setup, every_other, recipe, side):
    """Stacks from tiles and from levels of the encoder: what stands at each slot, beside the model with all cells."""
    s = setup(1, recipe=recipe)
    batch = s.host_batch(0)
    at_slots = {}
    for name, scale in (("pool", side * side), ("every_other", side * (side // 2))):
        model = s.program.model.clone(reduction=name)
        see = jax.jit(functools.partial(model.apply, scales=(scale,), method="visual_tokens"))
        visual, stacks = see({"params": s.state.params}, batch["pixels"], batch.get("gather"))
        of_pictures = dataclasses.replace(s.packs.layout.visual, reduction=name)
        layout = dataclasses.replace(s.packs.layout, scales=(scale,), visual=of_pictures)
        (placed,) = layout.place([(24, 24)])
        slots = layout.slots(placed, scale)
        assert len(slots) == scale and layout.visual.tokens([(24, 24)], scale) == scale
        at_slots[name] = np.concatenate([visual[None], stacks])[:, :, slots]
    all_cells = at_slots["pool"].reshape(*at_slots["pool"].shape[:2], side, side, -1)
    want = all_cells[..., : side // 2 * 2 : 2, :].reshape(at_slots["every_other"].shape)
    np.testing.assert_allclose(at_slots["every_other"], want, atol=1e-6)
    assert len(want) > 1 and (np.abs(want).max((1, 2, 3)) > 1e-3).all()  # a bank and stacks, none of them empty


def test_a_config_names_a_reduction_that_exists_and_its_scales(tiny, every_other):
    known = "pool, random, strided, zip, every_other"
    with pytest.raises(ConfigError, match=f"model.reduction='shuffle' .*: expected one of {known}"):
        tiny("model.reduction=shuffle")
    with pytest.raises(ConfigError, match=r"9 tokens do not tile a 6×6 grid; valid scales are \[18, 36\]"):
        tiny("model.reduction=every_other", "model.scales=(9,18)")
    config = tiny("model.reduction=every_other", "model.scales=(18,36)")
    assert build(config.model).reduction == visual_layout(config).reduction == "every_other"
    with pytest.raises(ValueError, match="model.reduction='every_other' cannot be exported, 'pool' can"):
        architecture(config)


def test_a_reduction_that_lacks_a_half_cannot_be_made():
    half = type("Half", (Reduction,), {"valid": AveragePool.valid, "shape": AveragePool.shape})
    with pytest.raises(TypeError, match="__call__"):
        half()


def seen(rng, *lead, side=6, stacks=2, D=5):
    """Random grids `[1 + S, ..., side, side, D]` and importance `[..., side, side]`."""
    grids = rng.normal(size=(1 + stacks, *lead, side, side, D)).astype(np.float32)
    return grids, rng.dirichlet(np.ones(side * side), lead).reshape(*lead, side, side).astype(np.float32)


def chosen(name, grids, importance, scale):
    reduction = find_reduction(name)
    return reduction(grids, scale, grids.shape[-2], *((importance,) if reduction.needs_importance else ()))


def zipped_by_loop(grids, importance, k):
    """VisionZip of one picture, as one would write it down: grids `[1 + S, n, D]`, importance `[n]`."""
    bank, n = grids[0], len(importance)
    contextual = round(k * 5 / 32) if k < n else 0
    dominant = sorted(sorted(range(n), key=lambda cell: -importance[cell])[: k - contextual])
    others = [cell for cell in range(n) if cell not in dominant]
    targets = [others[-(-i * len(others) // contextual)] for i in range(contextual)]
    groups = {cell: [cell] for cell in (*dominant, *targets)}
    for cell in others:
        if targets and cell not in targets:
            like = [bank[cell] @ bank[t] / np.linalg.norm(bank[cell]) / np.linalg.norm(bank[t]) for t in targets]
            groups[targets[int(np.argmax(like))]].append(cell)
    return np.stack([[grid[groups[cell]].mean(axis=0) for cell in sorted(groups)] for grid in grids])


@pytest.mark.parametrize("k", [1, 2, 4, 9, 10, 20, 35, 36])
def test_zip_equals_the_paper_s_procedure_written_down_plainly(k):
    grids, importance = seen(np.random.default_rng(k), 3)
    want = [zipped_by_loop(grids[:, n].reshape(3, 36, 5), importance[n].reshape(-1), k) for n in range(3)]
    found = chosen("zip", grids, importance, k)
    assert found.shape == (3, 3, k, 5)
    np.testing.assert_allclose(found, np.stack(want, axis=1), atol=1e-6)


def test_zip_merges_as_many_tokens_as_the_paper():
    assert [Zip().contextual(k) for k in (64, 128, 192)] == [10, 20, 30]
    assert Zip().contextual(1) == 0  # the one token is the cell that is attended to most


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("k", [1, 5, 9, 32, 36])
def test_a_choice_is_the_same_of_numpy_s_and_of_jax_s_arrays(name, k):
    grids, importance = seen(np.random.default_rng(0), 2, 3)
    host = chosen(name, grids, importance, k)
    device = jax.jit(functools.partial(chosen, name, scale=k))(grids, importance)
    assert host.shape == (3, 2, 3, k, 5) and host.dtype == device.dtype == np.float32
    np.testing.assert_allclose(host, device, atol=1e-6)
    half = chosen(name, jnp.asarray(grids, jnp.bfloat16), jnp.asarray(importance), k)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("side", [1, 2, 6])
def test_any_number_of_cells_can_be_chosen_and_they_stand_in_reading_order(name, side):
    reduction = find_reduction(name)
    assert reduction.valid(side) == list(range(1, side * side + 1))
    numbers = np.arange(side * side, dtype=np.float32).reshape(1, side, side, 1)
    importance = np.random.default_rng(0).random((side, side)).astype(np.float32)
    for k in reduction.valid(side):
        assert reduction.shape(side, side, side, k) == (1, k)
        tokens = chosen(name, numbers, importance, k)[0, :, 0]
        if not reduction.needs_importance:  # others are means
            assert (np.diff(tokens) > 0).all() and set(tokens) <= set(range(side * side))
    np.testing.assert_array_equal(chosen(name, numbers, importance, side * side), numbers.reshape(1, -1, 1))


def test_the_most_important_cells_stand_in_reading_order_whatever_their_importance():
    numbers = np.arange(36, dtype=np.float32).reshape(1, 6, 6, 1)
    importance = np.zeros((6, 6), np.float32)
    importance.reshape(-1)[[30, 2, 17]] = (0.3, 0.1, 0.2)
    np.testing.assert_array_equal(chosen("zip", numbers, importance, 3)[0, :, 0], [2, 17, 30])
    np.testing.assert_array_equal(chosen("zip", numbers, 0 * importance, 2)[0, :, 0], [0, 1])


def test_random_cells_are_the_same_for_a_seed_and_nested():
    cells = Random(3).cells(6, 9)
    np.testing.assert_array_equal(cells, Random(3).cells(6, 9))
    assert len(set(cells)) == 9 and set(cells) < set(Random(3).cells(6, 12))
    assert not np.array_equal(cells, Random(4).cells(6, 9))


def test_strided_cells_are_evenly_spaced():
    strided = find_reduction("strided")
    np.testing.assert_array_equal(strided.cells(6, 4), [4, 13, 22, 31])
    for k in range(1, 37):
        gaps = np.diff(strided.cells(6, k))
        assert k == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_refused_where_it_has_no_meaning(name):
    square, reduction = VisualLayout(84, 14, (84, 84), reduction=name), find_reduction(name)
    grids, importance = np.zeros((1, 6, 6, 2), np.float32), np.ones((6, 6), np.float32)
    for scale in (0, -1, 37):
        message = rf"{scale} tokens cannot be chosen among the cells of a 6×6 grid; valid scales are 1 to 36"
        for half in (lambda s=scale: chosen(name, grids, importance, s), lambda s=scale: square.slots((), s, (9, 9))):
            with pytest.raises(ValueError, match=message):
                half()
    assert [reduction.shape(*part, 6, 5) for part in ((6, 6), (6, 5), (0, 0))] == [(1, 5), (0, 0), (0, 0)]
    with pytest.raises(ValueError, match=rf"'{name}' chooses among .* data.aspect='own' .*; 'pool' can be asked for"):
        VisualLayout(size=84, cell=14, canvas=(84, 140), aspect="own", reduction=name)


def test_importance_is_refused_where_none_is_given(tiny):
    with pytest.raises(ConfigError, match=r"'zip' .*encoder='convnext' has no class token; 'pool' or 'random' or"):
        tiny("model.reduction=zip", recipe="hybrid")
    with pytest.raises(ValueError, match="'zip' chooses among cells of a picture.*data.sequence='blank'"):
        VisualLayout(84, 14, (84, 84), sequence="blank", stacks="whole", reduction="zip")


@pytest.mark.parametrize(
    ("recipe", "scale", "overrides"),
    [
        ("deepstack", 5, ()),
        ("qwen3vl_style", 10, ()),
        pytest.param("deepstack_v", 5, ("model.vision.depth=2",), marks=pytest.mark.long),
    ],
)
def test_the_model_zips_bank_and_stacks_by_the_class_token_s_attention(setup, recipe, scale, overrides):
    """With stacks from tiles, from the encoder's levels, and with tiles inside the encoder: against the loop."""
    s = setup(1, *overrides, recipe=recipe)
    batch = s.host_batch(0)
    model = s.program.model.clone(reduction="zip")
    given = {"params": s.state.params}, batch["pixels"], batch.get("gather")
    (grids,), importance, _ = jax.jit(functools.partial(model.apply, method="weighed_grids"))(*given)
    bank_slots, stacks = jax.jit(functools.partial(model.apply, scales=(scale,), method="visual_tokens"))(*given)
    found = np.concatenate([bank_slots[None], *([] if stacks is None else [stacks])])
    grids, importance = np.stack(grids), np.asarray(importance)
    S, G, U, h, w, D = grids.shape
    assert importance.shape == (G, U, h, w) and (importance > 0).all()
    assert np.ptp(importance, axis=(2, 3)).min() > 0
    for g in range(min(G, 2)):
        want = zipped_by_loop(grids[:, g, 0].reshape(S, h * w, D), importance[g, 0].reshape(-1), scale)
        np.testing.assert_allclose(found[:, g, :scale], want, atol=1e-5)


@pytest.mark.parametrize("name", CHOICES)
def test_a_model_that_is_loaded_with_a_choice_answers_from_what_it_chose(setup, digits_folder, tmp_path, name):
    """The engine's host half and the model's device half give the same vectors at the same positions."""
    s = setup(1)
    tokenizer = Prepared(digits_folder, "test").tokenizer
    Model(s.program, s.state.params, tokenizer).save(tmp_path / "run")
    model = load(tmp_path / "run", reduction=name)
    picture = Image.effect_noise((24, 24), 99)
    prompt = model.request(picture, "read all", 7).prompt
    assert prompt.visual == model.visual_tokens(picture, 7) == 7
    vectors = model.engine.pictures.vectors(prompt.pictures, 7, prompt.slot, prompt.newline)
    batch = model.batch(picture, "read all", 7)
    see = jax.jit(functools.partial(model.program.model.apply, scales=(7,), method="visual_tokens"))
    on_device, _ = see({"params": model.params}, batch["pixels"])
    np.testing.assert_allclose(vectors[0][prompt.slot >= 0], on_device[0], atol=1e-5)
    other = load(tmp_path / "run").engine.pictures.vectors(prompt.pictures, 9, prompt.slot, prompt.newline)
    assert np.abs(vectors - other).max() > 1e-3


def test_loading_with_a_reduction_that_cannot_be_is_refused(tiny, digits_folder, tmp_path):
    tokenizer = Prepared(digits_folder, "test").tokenizer
    for recipe, reduction, message in (
        ("m3", "shuffle", "model.reduction='shuffle' is none of 'pool', 'random', 'strided', 'zip'"),
        ("hybrid", "zip", "model.encoder='convnext' has no class token"),
    ):
        (tmp_path / recipe).mkdir()
        save_config(tiny(recipe=recipe), tmp_path / recipe / "config.json")
        tokenizer.save(tmp_path / recipe)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / recipe, reduction=reduction)
