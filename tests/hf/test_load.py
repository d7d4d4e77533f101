"""Folders in LLaVA's original layout: told by their config alone, read whole or not at all."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.hf import load
from lmm_jax.hf.read_config import LoadError, read_model_config
from lmm_jax.training.state import abstract_params, make_program
from tests.parity.test_convllava import released

PREFIX = "model.vision_tower.vision_tower."


def read(folder, mesh=None, devices=1):
    config = read_model_config(folder)
    program = make_program(config, sharding.make_mesh(mesh or {}, jax.devices()[:devices]))
    return load.load_params(folder, config.model, abstract_params(program)), program


def test_lmm_load_generates_at_every_budget(m3):
    model = lmm.load(m3)
    assert model.scales == (1, 9, 36, 144, 576)
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    text = model.generate([Image.fromarray(picture)], "What is it?", scale=9, max_new_tokens=4)
    assert isinstance(text, str)


def test_a_tokenizer_larger_than_the_table_is_told_and_no_prompt_reads_another_row(m3, golden, capsys):
    """The golden one has 1,200 pieces, and the table 256 rows."""
    shutil.copyfile(golden / "m3/tokenizer.model", m3 / "tokenizer.model")
    model = lmm.load(m3)
    err = capsys.readouterr().err
    assert "the tokenizer is larger than the table of its model" in err and "has 256 rows" in err
    with pytest.raises(ValueError, match=r"has the id \d+, and the model's table has 256 rows"):
        model.generate(prompt="What is it?", max_new_tokens=2)


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
    with pytest.raises(LoadError) as error:
        read(m3)
    text = str(error.value)
    assert "3 tensors do not fit, nothing was loaded" in text
    assert "missing model.layers.1.mlp.up_proj.weight (128, 64)" in text
    assert "unexpected model.layers.0.mlp.experts.weight (2, 2)" in text
    assert "model.norm.weight is (3,), expected (64,)" in text


def test_tensors_of_another_number_of_axes_are_listed(m3):
    """Numbers alone, too, which have none."""
    weights = load_file(m3 / "model.safetensors")
    shapes = {
        "model.norm.weight": (),
        "model.embed_tokens.weight": (),
        "lm_head.weight": (300, 64, 1),
        "model.mm_projector.0.bias": (1, 64),
    }
    weights |= {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, m3 / "model.safetensors")
    with pytest.raises(LoadError, match="4 tensors do not fit") as error:
        read(m3)
    assert all(f"{name} is {shape}, expected" in str(error.value) for name, shape in shapes.items())


@pytest.mark.parametrize("theirs", [(), (1,), (64,), (300,), (300, 64), (300, 64, 1), (256, 63)])
@pytest.mark.parametrize("ours", [(), (64,), (256, 64)])
def test_only_a_table_may_have_more_rows(theirs, ours):
    assert load._fits(theirs, ours, padded=False) == (theirs == ours)
    more = len(theirs) == len(ours) and theirs[1:] == ours[1:] and theirs >= ours
    assert load._fits(theirs, ours, padded=True) == more


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


def rename(folder, out, names):
    """A copy of a folder's weights under other names; `names` gives None for those to leave out."""
    out.mkdir(exist_ok=True)
    weights = {names(n): x for n, x in load_file(folder / "model.safetensors").items()}
    save_file({n: x for n, x in weights.items() if n}, out / "model.safetensors")
    return out


def part(folder, which, m3, fresh=()):
    program = make_program(read_model_config(m3), sharding.make_mesh({}, jax.devices()[:1]))
    return load.load_part(folder, which, program.config.model, abstract_params(program), fresh)


def tower(name):
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


CLIPS = {
    "vision side": lambda name: tower(name),
    "without its prefix": lambda name: (tower(name) or "").removeprefix("vision_model.") or None,
    "of transformers 4": lambda name: tower(name) and "vision_tower." + tower(name),
    "of transformers 5": lambda name: tower(name) and "model.vision_tower." + tower(name).split("vision_model.")[1],
    "whole model": lambda name: name,
}


@pytest.mark.parametrize("layout", CLIPS)
def test_a_vision_tower_is_read_from_its_own_folder(m3, tmp_path, layout):
    (whole, _), _ = read(m3)
    found, table = part(rename(m3, tmp_path / "clip", CLIPS[layout]), "vision", m3)
    assert found.keys() == {path for path in flatten_dict(whole, sep="/") if path.startswith("vision/")}
    for path, x in found.items():
        np.testing.assert_array_equal(x, flatten_dict(whole, sep="/")[path])
    others = {entry.why for entry in table if entry.fate == "ignored"}
    assert ("of the language part" in others) == (layout == "whole model")


def test_a_language_model_alone_with_more_rows_and_a_tied_head(m3, tmp_path):
    (whole, _), _ = read(m3)
    folder = rename(m3, tmp_path / "vicuna", lambda n: None if "vision_tower" in n or "mm_projector" in n else n)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    table = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = np.concatenate([table, np.ones((64, table.shape[1]), np.float32)])
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(LoadError, match="missing lm_head.weight"):
        part(folder, "language", m3)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    found, entries = part(folder, "language", m3)
    np.testing.assert_array_equal(found["decoder/table"][: len(table)], table)
    np.testing.assert_array_equal(found["decoder/head/kernel"][:, : len(table)], table.T)
    text = load.report(entries)
    assert "64 rows past the vocabulary left out" in text and "rotary_emb.inv_freq" in text and "computed" in text
    assert np.asarray(found["decoder/norm/scale"]).tolist() == np.asarray(whole["decoder"]["norm"]["scale"]).tolist()


@pytest.mark.parametrize(
    ("which", "keys", "message"),
    [
        ("language", {"num_attention_heads": 8}, "num_attention_heads is 8 there|heads is 8 there"),
        ("language", {"num_attention_heads": "four"}, "heads = 'four' is not supported, a whole number from 1 to"),
        ("language", {"text_config": 3}, "config.json: text_config is 3, where keys are expected"),
        ("vision", {"vision_config": "clip"}, "config.json: vision_config is 'clip', where keys are expected"),
        ("language", {"rope_scaling": {"factor": 2.0}}, "rope_scaling"),
        ("vision", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("vision", {"vision_config": {"image_size": 224}}, "image_size is 224 there, 96 here"),
    ],
)
def test_a_part_of_another_model_is_refused(m3, tmp_path, which, keys, message):
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(LoadError, match=message):
        load.check_part(tmp_path, which, read_model_config(m3).model)


TIMM = {
    "embeddings.patch_embeddings": "stem.0",
    "embeddings.layernorm": "stem.1",
    "dwconv": "conv_dw",
    "layernorm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
    "layer_scale_parameter": "gamma",
    "downsampling_layer": "downsample",
    "encoder.stages": "stages",
    "layers": "blocks",
}


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_a_convnext_of_timm_or_open_clip_and_a_fifth_stage_that_starts_fresh(golden, tmp_path, prefix):
    """Names as timm's ConvNeXt and open_clip's wrapper of it have them; neither has a fifth stage."""
    whole = released(golden / "convllava", tmp_path / "model")
    last = f"vision/stage_{len(whole.model.vision.depths)}"

    def timm(name):
        name = tower(name) or ""
        if not name or name.startswith(("layernorm", f"encoder.stages.{len(whole.model.vision.depths) - 1}.")):
            return None
        for ours, theirs in TIMM.items():
            name = name.replace(ours, theirs)
        return prefix + name

    folder = rename(whole.folder, tmp_path / "timm", timm)
    weights = load_file(folder / "model.safetensors")
    weights |= {f"{prefix}head.norm.weight": np.ones(3, np.float32), "logit_scale": np.ones(1, np.float32)}
    save_file(weights, folder / "model.safetensors")
    abstract = abstract_params(whole.program)
    found, table = load.load_part(folder, "vision", whole.config.model, abstract, (last,))
    ours = flatten_dict(whole.params, sep="/")
    assert found.keys() == {p for p in ours if p.startswith("vision/") and not p.startswith(last)}
    for path, x in found.items():
        np.testing.assert_array_equal(x, ours[path])
    assert {entry.name for entry in table if entry.fate == "initialised"} == {p for p in ours if p.startswith(last)}
    with pytest.raises(LoadError, match="missing model.vision_tower.vision_tower.encoder.stages"):
        load.load_part(folder, "vision", whole.config.model, abstract)


def test_pickles_are_read_when_allowed_by_torch_alone(m3):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'lmm_jax[hf]'")
    (whole, _), _ = read(m3)
    weights = {n: torch.tensor(x) for n, x in load_file(m3 / "model.safetensors").items()}
    (m3 / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, some in halves.items():
        torch.save({n: weights[n] for n in some}, m3 / file)
    index = {"weight_map": {n: file for file, some in halves.items() for n in some}}
    (m3 / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match="is a pickle, which can run code: convert it, or pass --allow-pickle"
    ):
        lmm.load(m3)
    model = lmm.load(m3, allow_pickle=True)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(whole), jax.device_get(model.params))
    torch.save({"model.norm.weight": Evil()}, m3 / "pytorch_model-1.bin")
    with pytest.raises(ValueError, match=r"pytorch_model-1.bin holds more than weights"):
        lmm.load(m3, allow_pickle=True)
    assert not Evil.ran


class Evil:
    """Runs when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_integers_are_no_weights(m3):
    weights = load_file(m3 / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(np.int32)
    save_file(weights, m3 / "model.safetensors")
    with pytest.raises(LoadError, match="model.norm.weight is I32, expected one of float64, float32"):
        read(m3)
