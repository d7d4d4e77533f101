"""Folders that differ from ours in one key: what the key changes in transformers is read, or refused by its name."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from lmm_jax import sharding
from lmm_jax.config import flatten
from lmm_jax.generation.model import Model
from lmm_jax.hf.load import load_params
from lmm_jax.hf.read_config import LoadError, read_model_config
from lmm_jax.release.verify import LOGITS, _logits_of
from lmm_jax.training.state import abstract_params, make_program
from tests.opened import pack_layout
from tests.release.recipes import TOKENIZER

PICTURES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8)) for w, h in ((60, 37), (33, 90))
]
TEXT, VISION = "text_config", "vision_config"
# Another legal value of each key, by the part that it stands in; a list of them in a tuple.
LLAMA = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": (3, 5),
    "num_attention_heads": (2, 8),
    "num_key_value_heads": (1, 4),
    "head_dim": (16, 8),
    "hidden_act": "gelu",
    "rms_norm_eps": 0.1,
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "rope_theta": 100.0,
    "rope_scaling": ({"rope_type": "linear", "factor": 4.0}, {"type": "dynamic", "factor": 4.0}),
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 256,
    "sliding_window": (3, 4096),
    "layer_types": ["sliding_attention"] * 4,
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 3,
    "eos_token_id": 3,
    "pretraining_tp": 2,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": (2, 4),
    "num_attention_heads": (1, 4),
    "num_channels": 1,
    "image_size": 64,
    "patch_size": 4,
    "hidden_act": ("gelu", "gelu_new"),
    "layer_norm_eps": 0.1,
    "projection_dim": 8,
    "attention_dropout": 0.5,
    "initializer_range": 0.5,
    "initializer_factor": 2.0,
}
CONVNEXT = {
    "num_channels": 1,
    "patch_size": 8,
    "num_stages": 4,
    "hidden_sizes": [8, 8, 16, 16, 32],
    "depths": [1, 1, 1, 1, 1],
    "hidden_act": "relu",
    "layer_norm_eps": 0.1,
    "layer_scale_init_value": (0.0, 0.5),
    "drop_path_rate": 0.5,
    "image_size": 64,
    "initializer_range": 0.5,
    "_out_features": ["stage1"],
    "_out_indices": [1],
}
WHOLE = {
    "image_token_index": 370,
    "image_seq_length": 9,
    "projector_hidden_act": "relu",
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": (1, 2, -2, -3, [-2], [-1, -2]),
    "multimodal_projector_bias": False,
    "tie_word_embeddings": True,
}
PROCESSOR = {
    "do_convert_rgb": False,
    "do_resize": False,
    "size": ({"shortest_edge": 40}, {"height": 32, "width": 32}, {"height": 32, "width": 40}, 32, 40),
    "default_to_square": True,
    "crop_size": ({"height": 24, "width": 24}, {"height": 32, "width": 24}, 32, 24),
    "resample": 2,
    "do_rescale": False,
    "rescale_factor": 1 / 127.5,
    "do_normalize": False,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": (False, True),
    "pad_size": {"height": 64, "width": 64},
    "do_center_crop": (False, True),
    "image_processor_type": ("LlavaImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor"),
}
# Keys that change nothing that is computed, and why; the test asks transformers whether it is so.
IRRELEVANT = {
    "attention_dropout": "in training alone",
    "drop_path_rate": "in training alone",
    "initializer_range": "of new parameters",
    "initializer_factor": "of new parameters",
    "use_cache": "how it is computed, not what",
    "pretraining_tp": "how it is computed, not what",
    "pad_token_id": "padding is masked",
    "bos_token_id": "of the tokenizer, which is asked itself",
    "eos_token_id": "of the tokenizer, which is asked itself",
    "projection_dim": "of CLIP's projection, which is not there",
    "layer_norm_eps of convllava": "of the norm behind the last stage, which is not read",
    "_out_features": "of a backbone",
    "_out_indices": "of a backbone",
    "image_seq_length": "not read by the class; the processor counts",
    "partial_rotary_factor": "LLaMA's class turns all of a head",
    "sliding_window": "a window that is longer than a row; a shorter one is refused",
    "tie_word_embeddings": "a head that is stored is read, as by transformers if it differs from the table",
    "vocab_size": "rows past the pieces are not read; transformers wants the tables' own number",
    "image_size of convllava": "its processor says the size; convolutions take any",
    "head_dim": "the one that follows from width and heads",
    "layer_scale_init_value": "of new parameters, if it is above 0",
    "vision_feature_layer": "the same one, counted from the other end",
    "default_to_square": "of a size that is one number",
}
# Of Python, of messages, or of training: fields of every config, or arguments of a call that no file holds.
GENERAL = {
    *("architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id"),
    *("output_hidden_states", "problem_type", "return_dict", "transformers_version", "vision_config", "text_config"),
    *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "image_seq_length"),
}


def cases(part, values):
    """`(part, key, value)` of each value of a table."""
    return [(part, k, v) for k, of in values.items() for v in (of if isinstance(of, tuple) else (of,))]


RECIPE_CASES = {
    "llava": [*cases(TEXT, LLAMA), *cases(VISION, CLIP), *cases("", WHOLE)],
    "convllava": [*cases(VISION, CONVNEXT), *cases("", WHOLE)],
    "llava_next": [*cases("", WHOLE), *cases("", {"image_grid_pinpoints": [[32, 64], [64, 64]]})],
}


def changed(folder, out, part, key, value, file="config.json"):
    """A copy of a folder, its weights linked, in which one key has another value."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            (out / path.name).hardlink_to(path)
        else:
            shutil.copyfile(path, out / path.name)
    content = json.loads((out / file).read_text())
    (content[part] if part else content)[key] = value
    if key == "rope_parameters":  # which transformers 5 writes in the place of this one
        content[part].pop("rope_theta")
    (out / file).write_text(json.dumps(content))
    return out


def what_is_read(folder):
    """`(config, "")` of a folder, or None and why it is refused."""
    try:
        return read_model_config(folder), ""
    except LoadError as error:
        return None, str(error)


def fields(config):
    return {name: x for name, x in flatten(config).items() if name.startswith(("model.", "data."))}


def their_logits(transformers, folder, inputs):
    """Logits in transformers, or None if it cannot make them."""
    import torch

    try:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            return model.eval()(**inputs).logits[0].numpy()
    except Exception:  # of any kind: a value that transformers does not take either
        return None


def given(transformers, folder):
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(images=PICTURES[:1], text=prompt, return_tensors="pt")


def known_classes(transformers):
    """The tables above, and the classes of transformers whose fields they have to name."""
    t = transformers
    return [
        (LLAMA, t.LlamaConfig),
        (LLAMA, t.MistralConfig),
        (CLIP, t.CLIPVisionConfig),
        (CONVNEXT, t.ConvNextConfig),
        (WHOLE, t.LlavaConfig),
        (WHOLE, t.FastVlmConfig),
        (WHOLE | {"image_grid_pinpoints": ()}, t.LlavaNextConfig),
    ]


def test_every_key_that_transformers_knows_has_another_value_here(transformers):
    for table, cls in known_classes(transformers):
        names = {field.name for field in dataclasses.fields(cls)} - GENERAL
        assert names <= table.keys() | {"image_seq_length"}, (cls.__name__, names - table.keys())
    from transformers.processing_utils import ImagesKwargs

    assert ImagesKwargs.__annotations__.keys() - GENERAL <= PROCESSOR.keys()


def value_of(folder, part, key, file="config.json"):
    content = json.loads((folder / file).read_text())
    return (content[part] if part else content).get(key)


@pytest.mark.parametrize(
    "recipe", ["llava", *(pytest.param(name, marks=pytest.mark.long) for name in ("convllava", "llava_next"))]
)
def test_a_key_of_another_value_is_read_or_refused_or_changes_nothing(exported, transformers, tmp_path, recipe):
    """Nothing is ignored that changes a logit in transformers; what is refused names the key."""
    _, folder = exported(recipe)
    base, _ = what_is_read(folder)
    inputs, wrong = given(transformers, folder), []
    usual = their_logits(transformers, folder, inputs)
    for part, key, value in RECIPE_CASES[recipe]:
        if value_of(folder, part, key) == value:
            continue
        other = changed(folder, tmp_path / "other", part, key, value)
        found, why = what_is_read(other)
        if found is None:
            if str(other) not in why or (key.rstrip("s") not in why and key not in NAMED_BY):
                wrong.append((part, key, value, why))
        elif fields(found) == fields(base):
            theirs = their_logits(transformers, other, inputs)
            if (theirs is None and key != "vocab_size") or (theirs is not None and np.abs(theirs - usual).max() > 0):
                wrong.append((part, key, value, "is ignored and changes logits"))
            if not {key, f"{key} of {recipe}"} & IRRELEVANT.keys():
                wrong.append((part, key, value, "changes nothing, and IRRELEVANT does not say why"))
    assert not wrong


# Keys that are refused under the name of another one that they do not agree with.
NAMED_BY = {
    "image_size": "size of preprocessor_config.json",
    "rope_parameters": "rope_type",
    "rope_scaling": "rope_type",
    "depths": "num_stages",
}


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["llava", "convllava", "llava_next"])
def test_what_is_read_changes_logits_as_in_transformers(exported, transformers, tmp_path, recipe):
    _, folder = exported(recipe)
    base, _ = what_is_read(folder)
    inputs, asked, wrong = given(transformers, folder), [], []
    for part, key, value in RECIPE_CASES[recipe]:
        other = changed(folder, tmp_path / "other", part, key, value)
        config, _ = what_is_read(other)
        if config is None or fields(config) == fields(base):
            continue
        program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
        try:
            params, _ = load_params(other, config.model, abstract_params(program))
        except LoadError as error:  # of the shape of a tensor, or of a head that would not be read
            refused = "differs from the table" if key == "tie_word_embeddings" else "tensors do not fit"
            assert str(other) in str(error) and refused in str(error)
            continue
        model = Model(program, params, TOKENIZER)
        batch = model.batch(PICTURES[:1], "What is it?")
        length = int((batch["segment"] > 0).sum())
        ours = _logits_of(model)(batch)[:length, : TOKENIZER.vocab_size]
        theirs = their_logits(transformers, other, inputs)
        asked.append(key)
        if key in TOKENS:
            continue
        if theirs is None or np.abs(theirs[:, : TOKENIZER.vocab_size] - ours).max() > LOGITS:
            wrong.append((part, key, value, None if theirs is None else np.abs(theirs[:, :376] - ours).max()))
    assert not wrong, wrong
    print(recipe, "read:", asked)


TOKENS = {
    "image_token_index": "another placeholder than the tokenizer's",
    "max_position_embeddings": "the length of a row, which is data.length here",
}


@pytest.mark.parametrize(
    "recipe", ["llava", *(pytest.param(name, marks=pytest.mark.long) for name in ("convllava", "llava_next"))]
)
def test_a_key_of_the_image_processor_changes_pixels_as_in_transformers_or_is_refused(
    exported, transformers, tmp_path, recipe
):
    _, folder = exported(recipe)
    wrong, read = [], []
    whole = [(None, None)] + [(k, v) for _, k, v in cases("", PROCESSOR)]
    if recipe == "llava_next":
        whole.append(("image_grid_pinpoints", [[32, 64], [64, 64]]))
    for crops in (True, False):
        for key, value in whole:
            other = changed(folder, tmp_path / "other", "", "do_center_crop", crops, "preprocessor_config.json")
            if key is not None:
                content = json.loads((other / "preprocessor_config.json").read_text()) | {key: value}
                (other / "preprocessor_config.json").write_text(json.dumps(content))
            config, why = what_is_read(other)
            if config is None:
                if str(other) not in why or not any(
                    name in why for name in (key or "do_center_crop", "do_center_crop", "image_size")
                ):
                    wrong.append((key, value, why))
                continue
            read.append(key)
            theirs = their_pixels(transformers, other)
            ours = [our_pixels(config, picture) for picture in PICTURES]
            if theirs is None or any(
                a.shape != b.shape or np.abs(a - b).max() > 1e-5 for a, b in zip(theirs, ours, strict=True)
            ):
                wrong.append((key, value, crops, "other pixels"))
    assert not wrong, wrong
    assert {None, "image_mean", "image_std"} <= set(read)


def our_pixels(config, picture):
    vision = config.model.vision
    views = pack_layout(config).see(picture) / np.float32(255)
    return np.moveaxis((views - np.float32(vision.mean)) / np.float32(vision.std), -1, 1)


def their_pixels(transformers, folder):
    """`[views, 3, H, W]` of each picture, or None if transformers cannot make them."""
    try:
        see = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        found = [np.asarray(see(picture, return_tensors="np")["pixel_values"][0]) for picture in PICTURES]
    except Exception:
        return None
    return [x if x.ndim == 4 else x[None] for x in found]
