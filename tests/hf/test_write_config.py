"""`config.json` of exports: what the released models have, what is read back, and what no layout can say."""

import json
import types

import pytest

import lmm_jax as lmm
from lmm_jax.config import flatten
from lmm_jax.hf import write_config
from lmm_jax.hf.read_config import read_model_config
from tests.release.recipes import CONFIGS, RECIPES, TOKENIZER

# What decides over ids: 32,000 pieces as LLaMA's tokenizer has them.
END = {"</s>": [2]}
LLAMA_IDS = types.SimpleNamespace(
    kind="sentencepiece", vocab_size=32_000, added={}, bos=1, eos=2, markup=lambda text: END.get(text, [text])
)


def load(recipe, *overrides):
    file, small, _ = RECIPES[recipe]
    vocabulary = f"model.decoder.vocab_size={TOKENIZER.vocab_size}"
    return lmm.load_config(f"{CONFIGS}/{file}", *small, vocabulary, *overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_has_its_class(recipe):
    assert write_config.architecture(load(recipe)).model_type == RECIPES[recipe][2]


def test_llava_s_keys_are_those_of_the_released_model():
    """llava-hf/llava-1.5-7b-hf, but for the layers of CLIP that are not read."""
    config = lmm.load_config(f"{CONFIGS}/llava.py:size=7b")
    keys = write_config.transformers_keys(config, LLAMA_IDS, write_config.architecture(config))
    text, vision = keys["text_config"], keys["vision_config"]
    assert (keys["model_type"], keys["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert (keys["image_token_index"], keys["pad_token_id"], text["vocab_size"]) == (32_000, 32_001, 32_064)
    assert (keys["image_seq_length"], keys["projector_hidden_act"]) == (576, "gelu")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [text[name] for name in names] == [4096, 11008, 32, 32, 32] and text["rms_norm_eps"] == 1e-5
    assert [vision[name] for name in (*names[:4], "image_size", "patch_size")] == [1024, 4096, 23, 16, 336, 14]
    assert (keys["vision_feature_layer"], keys["vision_feature_select_strategy"]) == (-1, "default")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_original_layout_is_read_back(recipe, tmp_path):
    config = load(recipe)
    keys, tower = write_config.original_keys(config)
    (tmp_path / "vision_tower").mkdir()
    for path, content in (
        ("config.json", keys),
        ("vision_tower/config.json", tower),
        ("vision_tower/preprocessor_config.json", write_config.picture_keys(config)),
    ):
        (tmp_path / path).write_text(json.dumps(content))
    ours, found = flatten(config), flatten(read_model_config(tmp_path))
    same = [
        n for n in ours if n.startswith(("model.decoder.", "model.projector.", "model.scales")) and "remat" not in n
    ]
    same += [f"data.{name}" for name in ("template", "aspect", "tilings", "zoom", "sequence", "stacks", "sampling")]
    assert len(same) > 15
    assert {name: found[name] for name in same} == {name: ours[name] for name in same}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("llava", ("model.projector.depth=3",), "model.projector.depth=3 cannot be exported"),
        ("m3", ("model.scales=(1,4)",), r"model.scales=\(1, 4\): transformers gives a view all of its 16 tokens"),
        ("convllava", ("data.aspect=own",), "data.aspect='own' cannot be exported"),
        ("llava_next", ("data.sequence=flat", "model.newline=False"), "data.sequence='flat' cannot be exported"),
        ("deepstack_l", ("data.sequence=blank",), "data.sequence='blank' cannot be exported"),
    ],
)
def test_a_model_that_transformers_has_no_place_for_is_refused(recipe, overrides, message):
    with pytest.raises(ValueError, match=message):
        write_config.architecture(load(recipe, *overrides))
