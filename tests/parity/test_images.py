"""Preprocessing against the references' own numbers: pixels to the bit, floats within each set's tolerance."""

import json
import math
import re

import numpy as np
import pytest

from lmm_jax.data import views as v
from lmm_jax.data.images import open_picture
from lmm_jax.data.views import unpad


class Golden:
    """The preprocessing part of one set: config, arrays, and pictures by name."""

    def __init__(self, folder, mean, std):
        self.folder, self.mean, self.std = folder, np.float32(mean), np.float32(std)
        self.padding = tuple(int(255 * level) for level in mean)
        with np.load(folder / "preprocess.npz") as arrays:
            self.arrays = dict(arrays)

    def check(self, seen, floats, tolerance):
        """`seen`: uint8 `[…, H, W, 3]`; `floats`: normalised `[…, 3, H, W]`, invertible to uint8."""
        floats = np.moveaxis(floats, -3, -1)
        np.testing.assert_array_equal(seen, np.rint((floats * self.std + self.mean) * 255).astype(np.uint8))
        np.testing.assert_allclose(self.normalise(seen), floats, rtol=0, atol=tolerance)

    def normalise(self, seen):
        """As the device does, in float32."""
        return (seen.astype(np.float32) / 255 - self.mean) / self.std


@pytest.fixture(scope="module")
def m3(golden):
    config = json.loads((golden / "m3/config.json").read_text())
    out = Golden(golden / "m3", config["image_mean"], config["image_std"])
    out.size, out.pinpoints = config["vision"]["image_size"], config["mm"]["image_grid_pinpoints"]
    out.meta = json.loads((out.folder / "preprocess_meta.json").read_text())
    out.pictures = {name: open_picture(out.folder / f"images/{name}.png") for name in out.meta["images"]}
    return out


def test_m3_views(m3):
    tilings = [(w // m3.size, h // m3.size) for w, h in m3.pinpoints]
    kinds = set()
    for key, floats in m3.arrays.items():
        aspect, name = key.split("__")
        picture = m3.pictures[name]
        tiling = v.select_tiling(*picture.size, m3.size, tilings) if aspect == "anyres" else ()
        seen = v.make_views(picture, m3.size, aspect, tiling, padding=m3.padding)
        m3.check(seen if aspect == "anyres" else seen[0], floats, 1e-5)
        kinds.add(aspect)
    assert kinds == {"pad", "square", "anyres"}


def test_m3_grids(m3):
    tilings = [(w // m3.size, h // m3.size) for w, h in m3.pinpoints]
    for name, picture in m3.meta["images"].items():
        assert m3.pictures[name].size == tuple(picture["size_wh"])
        assert v.select_best_resolution(*picture["size_wh"], m3.pinpoints) == tuple(picture["best_resolution_wh"])
        assert v.select_tiling(*picture["size_wh"], m3.size, tilings) == tuple(picture["grid_wh"])
    assert m3.meta["select_best_resolution"]
    for case in m3.meta["select_best_resolution"]:
        assert v.select_best_resolution(*case["size_wh"], m3.meta["real_pinpoints"]) == tuple(case["best_wh"])


def test_m3_unpad(m3):
    assert m3.meta["unpad"]
    for case in m3.meta["unpad"]:
        rows, columns = case["grid_hw"]
        kept = np.arange(rows * columns).reshape(rows, columns)[unpad(rows, columns, *case["orig_wh"])]
        assert kept.shape == tuple(case["out_hw"]), case
        assert (kept[0, 0] if kept.size else None) == case.get("first_index"), case


@pytest.fixture(scope="module")
def deepstack(golden):
    config = json.loads((golden / "deepstack/config.json").read_text())
    out = Golden(golden / "deepstack", config["image_mean"], config["image_std"])
    out.size, out.crops = config["vision_config"]["image_size"], config["llm_config"]["num_crops"]
    return out


def test_deepstack_views(deepstack):
    side = math.isqrt(deepstack.crops)
    modes = set()
    for key, grid in deepstack.arrays.items():
        if not key.endswith("grid_wh"):
            continue
        mode, name, _ = key.split("/")
        kind, digits, flags = re.fullmatch(r"(L|HD|V)(\d*)(.*)", mode).groups()
        size = int(digits or deepstack.size)
        picture = open_picture(deepstack.folder / f"{name}.png")
        tilings = [(side, side)] if kind == "V" else v.deepstack_tilings(deepstack.crops)
        tiling = v.select_tiling(*picture.size, size, tilings)
        assert tiling == tuple(grid), key
        aspect, zoom = "anyres" if flags else "stretch", side if kind == "HD" else 1
        seen = v.make_views(picture, size, aspect, tiling, zoom)
        if f"{mode}/{name}/pixel_values" in deepstack.arrays:
            deepstack.check(seen, deepstack.arrays[f"{mode}/{name}/pixel_values"], 1e-6)
        else:
            deepstack.check(seen[:, ::16, ::16], deepstack.arrays[f"{mode}/{name}/pixel_values_sub16"], 1e-6)
            floats = deepstack.normalise(seen).astype(np.float64)
            for stored, ours in (("crop_mean", floats.mean((1, 2))), ("crop_std", floats.std((1, 2)))):
                np.testing.assert_allclose(ours, deepstack.arrays[f"{mode}/{name}/{stored}"], rtol=0, atol=1e-6)
        modes.add(mode)
    assert modes >= {"L", "HD", "V", "L_anyres_unpad"}


@pytest.fixture(scope="module")
def convllava(golden):
    config = json.loads((golden / "convllava/config.json").read_text())
    processor = config["image_processor"]
    out = Golden(golden / "convllava", processor["image_mean"], processor["image_std"])
    out.size = config["resolution"]
    return out


def test_convllava_views(convllava):
    assert tuple(convllava.arrays["background_rgb"]) == convllava.padding
    kinds = set()
    for key, stored in convllava.arrays.items():
        if not key.startswith("img"):
            continue
        name, kind = key.split("/")
        (path,) = convllava.folder.glob(f"{name}_*.png")
        picture = open_picture(path)
        if kind == "pad":
            convllava.check(v.make_views(picture, convllava.size, "pad", padding=convllava.padding)[0], stored, 1e-5)
        elif kind == "padded_square_rgb":
            side = max(picture.size)
            np.testing.assert_array_equal(np.asarray(v.resize_padded(picture, side, side, convllava.padding)), stored)
        elif kind.endswith("_u8_chw"):
            ours = {
                "pad_u8_chw": lambda p: v.make_views(p, convllava.size, "pad", padding=convllava.padding)[0],
                "crop_u8_chw": lambda p: v.make_views(p, convllava.size, "square")[0],
                "shortside_u8_chw": lambda p: v.resize_short_side(p, convllava.size),
            }[kind](picture)
            np.testing.assert_array_equal(ours, np.moveaxis(stored, 0, -1))
        else:
            continue  # features, not pixels
        kinds.add(kind)
    assert kinds == {"pad", "padded_square_rgb", "pad_u8_chw", "crop_u8_chw", "shortside_u8_chw"}
