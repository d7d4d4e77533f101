"""The papers' recipes at real size hold to what was published; shapes and plans alone, nothing is computed."""

import math
import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, flatten, visual_layout
from lmm_jax.data.packing import place_copies
from lmm_jax.training import optimizer
from lmm_jax.training.state import make_program

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SIZES = ("7b", "13b")
OPTIONS = {  # every combination of arguments that has a meaning
    "llava": ["stage=align", "stage=tune", "view=next"],
    "m3": [f"view={view},tower={tower}" for view in ("square", "next") for tower in ("frozen", "trained")],
    "deepstack": ["recipe=l,stage=align", "recipe=v,stage=align"]
    + [f"recipe={recipe},tower={tower}" for recipe in ("l", "hd", "v") for tower in ("frozen", "trained")],
    "convllava": [f"stage={stage},pixels={pixels}" for stage in (1, 2, 3) for pixels in (768, 1024, 1536)]
    + ["stage=1,head=trained,pixels=1536"],
}
ALL = [f"{name}:size={size},{o}" for name, options in OPTIONS.items() for size in SIZES for o in options]
SHAPED = [
    recipe for recipe in ALL if "pixels=768" not in recipe and "pixels=1024" not in recipe
]  # pixels shape nothing

DECODER = {"7b": 6_738_415_616, "13b": 13_015_864_320}  # LLaMA-2; its 32,000 pieces need no padding
WIDTH = {"7b": 4096, "13b": 5120}
# CLIP-L/14-336 has 303,507,456. LLaVA reads the state before the last block: 4 · (1024² + 1024) of attention,
# 2 · 1024 · 4096 + 4096 + 1024 of its MLP and three norms, the one behind it included, are not there.
VIT = 303_507_456 - 4 * (1024**2 + 1024) - (2 * 1024 * 4096 + 4096 + 1024) - 3 * 2048


def load(recipe, *arguments):
    name, _, argument = recipe.partition(":")
    return lmm.load_config(f"{CONFIGS}/{name}.py:{','.join(filter(None, [argument, *arguments]))}")


def mesh(**sizes):
    """A mesh of chips that are not there."""
    shape = tuple(sizes.get(axis, 1) for axis in sharding.MESH_AXES)
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.fixture(scope="module")
def boxed():
    """`boxed(config)`: abstract parameters with their axes, planned once for each model."""
    planned = {}

    def plan(config):
        key = tuple(sorted(flatten(config.model).items()))
        if key not in planned:
            planned[key] = make_program(config, mesh(fsdp=16)).boxed
        return planned[key]

    return plan


def sizes_of(boxed):
    """Elements of each parameter by path."""
    flat = flatten_dict(boxed, sep="/", is_leaf=lambda _, x: hasattr(x, "names"))
    return {path: math.prod(box.value.shape) for path, box in flat.items()}


def under(sizes, *prefixes):
    return sum(n for path, n in sizes.items() if path.startswith(prefixes))


def size(recipe):
    return "13b" if "size=13b" in recipe else "7b"


@pytest.mark.parametrize("recipe", SHAPED)
def test_parameters_are_as_many_as_published(recipe, boxed):
    sizes, width = sizes_of(boxed(load(recipe))), WIDTH[size(recipe)]
    convnext = recipe.startswith("convllava")
    features, newline = 3072 if convnext else 1024, "view=next" in recipe or "recipe=hd" in recipe
    assert under(sizes, "decoder/") == DECODER[size(recipe)]
    assert under(sizes, "projector/") == features * width + width + width**2 + width
    assert under(sizes, "image_newline") == newline * width
    if convnext:
        assert round(under(sizes, "vision/") / 1e6, 1) == 669.2
        assert round(under(sizes, "vision/stage_5/") / 1e6, 1) == 472.9
        # The four stages of ConvNeXt-L: 196.2 M with their last norm, which has no place before a fifth stage.
        four = under(sizes, "vision/") - under(sizes, "vision/stage_5/")
        assert four + 2 * 1536 == 196_230_336
        assert size(recipe) == "13b" or round(under(sizes, "projector/") / 1e6, 2) == 29.37
    else:
        assert under(sizes, "vision/") == VIT
        assert size(recipe) == "13b" or round(under(sizes, "projector/") / 1e6, 2) == 20.98
    assert sum(sizes.values()) == under(sizes, "decoder/", "projector/", "vision/", "image_newline")


# Peak rate by the longest prefix of a parameter, as published; see the configs for what is not.
ALIGN = {"vision": 0, "projector": 1e-3, "decoder": 0}
TUNE = {"vision": 0, "projector": 2e-5, "decoder": 2e-5}
NEWLINE = {"image_newline": 2e-5}
RATES = {
    "llava:stage=align": ALIGN,
    "llava:stage=tune": TUNE,
    "llava:view=next": TUNE | NEWLINE | {"vision": 2e-6},
    "m3:view=square,tower=frozen": TUNE,
    "m3:view=square,tower=trained": TUNE | {"vision": 2e-5},
    "m3:view=next,tower=frozen": {"vision": 0, "projector": 1e-5, "decoder": 1e-5, "image_newline": 1e-5},
    "m3:view=next,tower=trained": {"vision": 2e-5, "projector": 1e-5, "decoder": 1e-5, "image_newline": 1e-5},
    "deepstack:recipe=l,stage=align": ALIGN,
    "deepstack:recipe=v,stage=align": ALIGN,
    "deepstack:recipe=l,tower=frozen": TUNE,
    "deepstack:recipe=l,tower=trained": TUNE | {"vision": 2e-6},
    "deepstack:recipe=hd,tower=frozen": TUNE | NEWLINE,
    "deepstack:recipe=hd,tower=trained": TUNE | NEWLINE | {"vision": 2e-6},
    "deepstack:recipe=v,tower=frozen": TUNE,
    "deepstack:recipe=v,tower=trained": TUNE | {"vision": 2e-6},
    "convllava:stage=1,pixels=1536": {"vision": 0, "vision/stage_5": 3e-4, "projector": 3e-4, "decoder": 0},
    "convllava:stage=1,head=trained,pixels=1536": {
        "vision": 0,
        "vision/stage_5": 3e-4,
        "projector": 3e-4,
        "decoder": 0,
        "decoder/head": 3e-4,
    },
    "convllava:stage=2,pixels=1536": TUNE | {f"vision/stage_{n}": 2e-5 for n in (3, 4, 5)},
    "convllava:stage=3,pixels=1536": TUNE,
}


@pytest.mark.parametrize("recipe", SHAPED)
def test_exactly_the_stated_parts_train_at_their_rates(recipe, boxed):
    config, wanted = load(recipe), RATES[recipe.replace(f"size={size(recipe)},", "")]
    sizes = sizes_of(boxed(config))
    used = set()
    for path, rate in optimizer.rates(config.optimizer, sizes).items():
        prefix = max((p for p in wanted if path == p or path.startswith(p + "/")), key=len)
        assert rate == wanted[prefix], path
        used.add(prefix)
    assert used == wanted.keys()


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("llava:stage=align", 20.98),
        ("llava:stage=tune", 6738.42 + 20.98),
        ("convllava:stage=1,pixels=1536", 472.93 + 29.37),
        ("convllava:stage=1,head=trained,pixels=1536", 472.93 + 29.37 + 4096 * 32000 / 1e6),
        ("convllava:stage=2,pixels=1536", 669.16 - 4.83 + 29.37 + 6738.42),  # without stem and stages 1 and 2
    ],
)
def test_as_many_parameters_train(recipe, millions, boxed):
    config = load(recipe)
    sizes = sizes_of(boxed(config))
    rates = optimizer.rates(config.optimizer, sizes)
    assert sum(n for path, n in sizes.items() if rates[path]) / 1e6 == pytest.approx(millions, abs=0.02)


ROWS = {"llava_558k": 558_128, "llava_665k": 665_298, "llava_next_760k": 760_000}


@pytest.mark.parametrize("recipe", ALL)
def test_schedule_is_one_epoch_of_the_published_one(recipe):
    config = load(recipe)
    data, train, o = config.data, config.train, config.optimizer
    mixed = sum(weight for _, weight in data.mixture) * 1000
    rows = mixed or ROWS[pathlib.Path(data.path).name]
    first = "stage=align" in recipe or ("convllava" in recipe and "stage=3" not in recipe)
    assert train.steps == math.ceil(rows / (256 if first else 128))
    assert (o.b1, o.b2, o.weight_decay, o.warmup, o.final) == (0.9, 0.999, 0.0, 0.03, 0.0)
    assert o.clip == (1.0 if recipe.startswith("deepstack") else 0.0)
    assert data.template == ("plain" if "stage=align" in recipe else "vicuna_v1")
    published = 4096 if "next" in recipe or "recipe=hd" in recipe else 2048
    assert data.length == (2560 if "stage=align" in recipe else published)
    parts = [config.init[part] for part in ("from", "vision", "language") if config.init[part]]
    assert all(folder.startswith(("runs/", "models/")) for folder in parts) and len(parts) in (1, 2)
    assert config.model.dtype == "bfloat16"
    assert load(recipe, "data=/d").data.path in (None, f"/d/{pathlib.Path(data.path or '').name}")


def test_stages_of_convllava_differ_in_data_as_published():
    thousands = [dict(load(f"convllava:stage={stage}").data.mixture) for stage in (1, 2)]
    assert [sum(t.values()) for t in thousands] == [2000, 2890] and thousands[0].items() <= thousands[1].items()
    assert load("convllava:stage=2,data=/d").data.mixture[0] == ("/d/sharegpt4v_pt", 1200.0)
    assert load("convllava:stage=1").init.new == ("vision/stage_5", "projector")


@pytest.mark.parametrize(
    ("recipe", "picture", "tokens"),
    [
        ("llava:stage=align", (640, 480), {576: 576}),
        ("llava:stage=tune", (640, 480), {576: 576}),
        ("llava:view=next", (672, 672), {576: 2928}),
        ("llava:view=next", (640, 480), {576: 576 + 36 * 49}),  # 640 × 480 fills 672 × 504 of 672 × 672: 36 rows
        ("m3:view=square", (640, 480), {1: 1, 9: 9, 36: 36, 144: 144, 576: 576}),
        ("m3:view=next", (672, 672), {1: 1 + 6, 9: 9 + 42, 36: 36 + 156, 144: 144 + 600, 576: 2928}),
        ("convllava:pixels=768", (640, 480), {144: 144}),
        ("convllava:pixels=1024", (640, 480), {256: 256}),
        ("convllava:pixels=1536", (640, 480), {576: 576}),
        ("deepstack:recipe=l", (640, 480), {576: 576}),
        ("deepstack:recipe=v", (640, 480), {576: 576}),
        *(
            ("deepstack:recipe=hd", (columns * 336, rows * 336), {576: tokens})
            for columns, rows, tokens in (
                (1, 2, 1776),
                (2, 1, 1752),
                (1, 3, 2376),
                (3, 1, 2328),
                (2, 2, 2928),
                (1, 4, 2976),
                (4, 1, 2904),
            )
        ),
    ],
)
def test_a_picture_has_the_published_number_of_visual_tokens(recipe, picture, tokens):
    config = load(recipe)
    visual = visual_layout(config)
    assert {scale: int(visual.tokens([picture], scale)[0]) for scale in config.model.scales} == tokens


def test_banks_stacks_and_views_are_those_of_the_papers():
    def of(recipe):
        config = load(recipe)
        return config, visual_layout(config)

    config, m3 = of("m3:view=square")
    assert sum(map(m3.grid_tokens, config.model.scales)) == 766
    for recipe, views in (("l", {3, 4, 5}), ("hd", {15, 20, 25}), ("v", {5})):
        config, deepstack = of(f"deepstack:recipe={recipe}")
        assert {deepstack.views_of_tiling(tiling) for tiling in deepstack.tilings} == views
        assert deepstack.added == len(config.model.decoder.inject_layers) == (0 if recipe == "v" else 4)
        assert tuple(config.model.decoder.inject_layers) == (() if recipe == "v" else (1, 2, 3, 4))
    assert tuple(config.model.vision.regroup) == (12, 2)
    assert load("deepstack:recipe=v,block=19").model.vision.regroup == (19, 2)


def test_a_pack_of_m3_holds_the_copies_of_whatever_fits_a_row():
    for view, most in (("square", 2048 - 576), ("next", 4096 - 2928)):
        config = load(f"m3:view={view}")
        tokens = [int(visual_layout(config).tokens([(672, 672)], s)[0]) for s in config.model.scales]
        for text in range(1, most + 1, 13):
            copies = sorted((text + n for n in tokens), reverse=True)
            empty = np.full((1, config.data.rows), config.data.length)
            assert place_copies(copies, empty).fits[0], (view, text)


@pytest.mark.parametrize("recipe", ["llava:stage=tune", "m3", "deepstack", "deepstack:recipe=v", "convllava"])
@pytest.mark.parametrize("chips", [16, 64, 256])
def test_recipes_are_planned_on_16_64_and_256_chips(recipe, chips, boxed):
    """As the README says: fsdp up to the packs of a step, 64 for ConvNeXt, and the rest for tensor."""
    for parameters in SIZES:
        config = load(recipe, f"size={parameters}")
        fsdp = min(chips, config.train.batch_size, 64)
        tensor = chips // fsdp
        assert tensor <= 8 and config.train.batch_size % fsdp == 0
        for sizes in ({"fsdp": fsdp, "tensor": tensor}, {"fsdp": chips // 4, "tensor": 4}, {"fsdp": 2, "tensor": 8}):
            plan_is_even(config, boxed(config), mesh(**sizes))
        if "convllava" not in recipe:
            plan_is_even(config, boxed(config), mesh(fsdp=chips))


def plan_is_even(config, boxed, on):
    """No chip holds much more than its share: of ConvNeXt, depthwise kernels are replicated and the matrices between
    stages are not split over tensor; nothing else is."""
    placed = flatten_dict(sharding.param_shardings(boxed, on, config.rules), sep="/")
    flat = flatten_dict(boxed, sep="/", is_leaf=lambda _, x: hasattr(x, "names"))
    held = sum(math.prod(placed[path].shard_shape(box.value.shape)) for path, box in flat.items())
    assert held < 1.03 * sum(sizes_of(boxed).values()) / on.size + 4e6


def test_convnext_does_not_divide_over_256_and_says_so(boxed):
    config = load("convllava")
    with pytest.raises(ValueError, match=r"vision/stage_1/.* size 192 does not divide over \('fsdp',\) = 256"):
        sharding.param_shardings(boxed(config), mesh(fsdp=256), config.rules)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("llava:view=next,stage=align", "stage of view=next 'align' does not exist; choose from tune"),
        ("llava:size=70b", "size '70b' does not exist; choose from 7b, 13b"),
        ("m3:tower=thawed", "choose from frozen, trained"),
        ("deepstack:recipe=hd,stage=align", "stage of recipe=hd 'align' does not exist"),
        ("deepstack:recipe=xl", "choose from l, hd, v"),
        ("deepstack:stage=align,tower=trained", "tower at stage=align 'trained' does not exist"),
        ("convllava:pixels=512", "choose from 768, 1024, 1536"),
        ("convllava:stage=4", "choose from 1, 2, 3"),
    ],
)
def test_arguments_without_a_recipe_are_refused(recipe, message):
    with pytest.raises(ConfigError, match=message):
        load(recipe)
