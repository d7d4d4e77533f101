"""What a released folder's config says of model and data."""

import json

import pytest

from lmm_jax.hf.read_config import LoadError, read_model_config


def edit(path, **keys):
    content = json.loads(path.read_text())
    content.update(keys)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, 'silu' is"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic' is not supported of a LLaMA"),
        ({"rope_scaling": {"factor": 2.0}}, "has no rope_type"),
        ({"rope_scaling": {"type": "yarn", "factor": "two"}}, "factor = 'two'"),
        ({"mm_projector_type": "resampler"}, "mm_projector_type 'resampler'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio"),
        ({"mm_vision_tower": "google/siglip"}, "vision tower 'google/siglip' is neither a folder nor known"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[100, 96]]}, "not multiples of 96"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "__import__('os')"}, "image_grid_pinpoints"),
        *(
            ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": text}, "a list of up to 4096 pairs of sides")
            for text in ("[(1e999, 336)]", "[(96, 96, 96)]", "{(96, 96)}", "[" * 5000, "[(96.0, 96)]", "[(96, -96)]")
        ),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": f"[{'(9,9),' * 4097}]"}, "up to 4096 pairs"),
        ({"image_aspect_ratio": "deepstack", "deepstack_args_for_ablation": "2xsample+what"}, "'what'"),
    ],
)
def test_keys_that_cannot_be_reproduced_are_named(m3, keys, message):
    edit(m3 / "config.json", **keys)
    with pytest.raises(LoadError, match="config.json") as error:
        read_model_config(m3)
    assert message in str(error.value)


def test_pinpoints_may_be_text_as_released_configs_have_them(m3):
    edit(m3 / "config.json", image_aspect_ratio="anyres", image_grid_pinpoints="[(96, 192), (192, 96)]")
    edit(m3 / "config.json", mm_patch_merge_type="spatial_unpad")
    config = read_model_config(m3)
    assert config.data.tilings == ((1, 2), (2, 1))
    assert config.data.sequence == "unpad" and config.model.newline


def test_released_deepstack_hd_keys(m3):
    """The released HD config has merge type flat, no start and no interval, and a newline all the same."""
    edit(m3 / "config.json", image_aspect_ratio="deepstack", is_anyres_deepstack=True, num_crops=4)
    edit(m3 / "config.json", mm_patch_merge_type="flat", matryoshka_vis_token_scale=None)
    config = read_model_config(m3)
    assert (config.data.sequence, config.data.stacks, config.data.zoom) == ("grid", "zoom", 2)
    assert config.model.newline and config.model.decoder.inject_layers == (1, 2, 3, 4)


WRONG = ("four", "", -3, 0, 10**30, 0.5, True, [], ["a"], {}, {"a": 1})


def test_any_value_of_any_key_is_read_or_refused_in_a_sentence(m3):
    """Every key of a released config × values of other kinds: no other error than ours, with the file."""
    file = m3 / "config.json"
    content, refused = json.loads(file.read_text()), 0
    for key in content:
        for value in WRONG:
            file.write_text(json.dumps(content | {key: value}))
            try:
                read_model_config(m3)
            except (LoadError, FileNotFoundError) as error:
                refused += 1
                assert str(m3) in str(error) or repr(value) in str(error), (key, value, str(error))
    assert refused > 3 * len(WRONG)


def test_an_export_of_before_that_says_chatml_means_the_layout_of_yi(m3):
    edit(m3 / "config.json", lmm_jax_template="chatml")
    assert read_model_config(m3).data.template == "chatml_direct"
    edit(m3 / "config.json", template_names=2)
    assert read_model_config(m3).data.template == "chatml"
