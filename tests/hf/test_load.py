"""Folders in LLaVA's original layout: told by their config alone, read whole or not at all."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.hf import configs, load
from lmm_jax.training.state import abstract_params, make_program

PREFIX = "model.vision_tower.vision_tower."


@pytest.fixture
def m3(golden, tmp_path):
    """M3's golden set as a folder; `edit(**keys)` changes its config."""
    about = json.loads((golden / "m3/config.json").read_text())
    folder = tmp_path / "some-convllava-deepstack-name"  # which must say nothing
    (folder / "tower").mkdir(parents=True)
    keys = about["text"] | about["mm"] | {"matryoshka_vis_token_scale": about["scales"], "mm_vision_tower": "tower"}
    keys |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "tower/config.json").write_text(json.dumps(about["vision"] | {"model_type": "clip_vision_model"}))
    shutil.copyfile(golden / "m3/weights.safetensors", folder / "model.safetensors")
    shutil.copyfile(golden / "m3/tokenizer.model", folder / "tokenizer.model")
    return folder


def edit(path, **keys):
    content = json.loads(path.read_text())
    content.update(keys)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def read(folder, mesh=None, devices=1):
    config = configs.read_config(folder)
    program = make_program(config, sharding.make_mesh(mesh or {}, jax.devices()[:devices]))
    return load.load_params(folder, program.model, abstract_params(program)), program


def test_lmm_load_generates_at_every_budget(m3):
    model = lmm.load(m3)
    assert model.scales == (1, 9, 36, 144, 576)
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    text = model.generate([Image.fromarray(picture)], "What is it?", scale=9, max_new_tokens=4)
    assert isinstance(text, str)


def test_parameters_are_sharded_as_planned_and_equal(m3):
    (whole, _), _ = read(m3)
    (params, _), program = read(m3, {"fsdp": 4, "tensor": 2}, 8)
    sharding.assert_sharded(params, program.shardings.params, "loaded parameters")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(params))
    assert len(params["decoder"]["table"].sharding.device_set) == 8


def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded(m3):
    weights = load_file(m3 / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.mlp.experts.weight"] = np.zeros((2, 2), np.float32)
    weights["model.norm.weight"] = np.zeros(3, np.float32)
    save_file(weights, m3 / "model.safetensors")
    with pytest.raises(configs.LoadError) as error:
        read(m3)
    text = str(error.value)
    assert "3 tensors do not fit, nothing was loaded" in text
    assert "missing model.layers.1.mlp.up_proj.weight (128, 64)" in text
    assert "unexpected model.layers.0.mlp.experts.weight (2, 2)" in text
    assert "model.norm.weight is (3,), expected (64,)" in text


def test_a_tower_s_weights_may_lie_in_its_own_folder(m3):
    (together, _), _ = read(m3)
    weights = load_file(m3 / "model.safetensors")
    tower = {name.removeprefix(PREFIX): x for name, x in weights.items() if name.startswith(PREFIX)}
    tower["text_model.final_layer_norm.weight"] = np.zeros(3, np.float32)  # of a whole CLIP
    save_file(tower, m3 / "tower/model.safetensors")
    save_file({n: x for n, x in weights.items() if not n.startswith(PREFIX)}, m3 / "model.safetensors")
    (apart, _), _ = read(m3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(together), jax.device_get(apart))


def test_shards_with_an_index_are_one_model(m3):
    (whole, _), _ = read(m3)
    weights = load_file(m3 / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({n: weights[n] for n in some}, m3 / file)
    (m3 / "model.safetensors").unlink()
    index = {"weight_map": {n: file for file, some in halves.items() for n in some}}
    (m3 / "model.safetensors.index.json").write_text(json.dumps(index))
    (sharded, _), _ = read(m3)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(sharded))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, 'silu' is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio"),
        ({"mm_vision_tower": "google/siglip"}, "vision tower 'google/siglip' is neither a folder nor known"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[100, 96]]}, "not multiples of 96"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints"),
        ({"image_aspect_ratio": "deepstack", "deepstack_args_for_ablation": "2xsample+what"}, "'what'"),
    ],
)
def test_keys_that_cannot_be_reproduced_are_named(m3, keys, message):
    edit(m3 / "config.json", **keys)
    with pytest.raises(configs.LoadError, match="config.json") as error:
        configs.read_config(m3)
    assert message in str(error.value)


def test_pinpoints_may_be_text_as_released_configs_have_them(m3):
    edit(m3 / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="[(96, 192), (192, 96)]")
    edit(m3 / "config.json", mm_patch_merge_type="spatial_unpad")
    config = configs.read_config(m3)
    assert config.data.tilings == ((1, 2), (2, 1))
    assert config.data.sequence == "unpad" and config.model.newline


def test_released_deepstack_hd_keys(m3):
    """The released HD config has merge type flat, no start and no interval, and a newline all the same."""
    edit(m3 / "config.json", image_aspect_ratio="deepstack", is_anyres_deepstack=True, num_crops=4)
    edit(m3 / "config.json", mm_patch_merge_type="flat", matryoshka_vis_token_scale=None)
    config = configs.read_config(m3)
    assert (config.data.sequence, config.data.stacks, config.data.zoom) == ("grid", "zoom", 2)
    assert config.model.newline and config.model.decoder.inject_layers == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors, which is not there"),
        ({"weight_map": {"a": "model.safetensors"}}, "promises 1 tensors"),
        ({"tensors": []}, "no weight_map"),
    ],
)
def test_bad_indices_are_refused(m3, index, message):
    (m3 / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read(m3)


def test_bad_files_are_refused(m3, tmp_path):
    weights = (m3 / "model.safetensors").read_bytes()
    (m3 / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="not a sound safetensors file"):
        read(m3)
    (m3 / "model.safetensors").unlink()
    (m3 / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is a pickle"):
        read(m3)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(weights)
    (m3 / "model.safetensors").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        read(m3)


def test_a_name_in_two_files_is_refused(m3):
    weights = load_file(m3 / "model.safetensors")
    save_file({"model.norm.weight": weights["model.norm.weight"]}, m3 / "more.safetensors")
    with pytest.raises(ValueError, match=r"tensor model.norm.weight is in"):
        read(m3)
