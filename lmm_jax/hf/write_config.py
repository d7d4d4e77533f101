"""`config.json` of an exported model: what `hf.configs` reads, from our config."""

import math

from lmm_jax.data.views import deepstack_tilings
from lmm_jax.hf import deepstack
from lmm_jax.hf.read_config import ABLATIONS, CLIP_MEAN, CLIP_STD, TOWERS
from lmm_jax.hf.tokenizer_json import added_ids
from lmm_jax.models.encoders import make_encoder

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "fast_vlm": "FastVlmForConditionalGeneration",
}


def architecture(config) -> str:
    """The class of transformers that computes what a model of ours does, or "deepstack" for our own code.

    Raises:
      ValueError: none does; the message names the field.
    """
    model, data = config.model, config.data
    _require("model.projector.depth", model.projector.depth, 2)
    _require("model.vision.stack_levels", tuple(model.vision.stack_levels), ())
    whole = make_encoder(model).grid ** 2
    if max(model.scales) != whole:
        raise ValueError(f"model.scales={tuple(model.scales)}: transformers gives a view all of its {whole} tokens")
    if data.stacks:
        deepstack.keys(config)  # refuses what its code does not do
        return "deepstack"
    if model.encoder == "convnext":
        _require("data.aspect", data.aspect, "pad", "stretch", "square")
        _require("data.sequence", data.sequence, "whole")
        return "fast_vlm"
    if data.sequence == "unpad":
        _require("model.newline", model.newline, True)
        _require("data.aspect", data.aspect, "anyres")
        return "llava_next"
    _require("data.sequence", data.sequence, "whole")
    _require("data.aspect", data.aspect, "pad", "stretch", "square")
    return "llava"


def transformers_keys(config, tokenizer, kind) -> dict:
    """`config.json` of `kind`, as `architecture` names it, in the words of transformers 4, which 5 reads too."""
    model, data = config.model, config.data
    image, pad, rows = added_ids(tokenizer)
    text = _decoder(config) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": pad,
    }
    convnext = model.encoder == "convnext"
    keys = {
        "architectures": [CLASSES.get(kind)],
        "model_type": kind,
        "text_config": text,
        "vision_config": _convnext(config) if convnext else _clip(config, blocks_built(config)),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if convnext else "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "image_token_index": image,
        "image_seq_length": max(model.scales),
        "pad_token_id": pad,
        "tie_word_embeddings": False,
        "torch_dtype": model.dtype,
        "lmm_jax_template": data.template,
    }
    if len(model.scales) > 1:
        keys["matryoshka_vis_token_scale"] = list(model.scales)
    if kind == "llava_next":
        side = model.vision.image_size
        keys["image_grid_pinpoints"] = [[rows * side, columns * side] for columns, rows in data.tilings]
        keys["use_image_newline_parameter"] = True
    return keys | (deepstack.keys(config) if kind == "deepstack" else {})


def original_keys(config) -> tuple[dict, dict | None]:
    """`config.json` of LLaVA's original layout, and that of the vision tower if no released one is meant.

    Raises:
      ValueError: a field that the layout has no word for.
    """
    model, data = config.model, config.data
    _require("model.vision.stack_levels", tuple(model.vision.stack_levels), ())
    keys = _decoder(config) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": model.decoder.vocab_size,
        "tokenizer_model_max_length": data.length,
        "mm_projector_type": "linear" if model.projector.depth == 1 else f"mlp{model.projector.depth}x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "unfreeze_mm_vision_tower": True,
        "image_aspect_ratio": data.aspect,
        "torch_dtype": model.dtype,
        "lmm_jax_template": data.template,
    }
    if model.encoder == "convnext":
        keys["mm_vision_select_layer"], tower = -1, _convnext(config)
    else:
        keys["mm_vision_select_layer"], tower = model.vision.level, _clip(config, model.vision.depth)
    named = [name for name, about in TOWERS.items() if about.items() <= tower.items()]
    keys["mm_vision_tower"] = named[0] if named else "vision_tower"
    if len(model.scales) > 1:
        keys["matryoshka_vis_token_scale"] = list(model.scales)
    if data.stacks or data.sequence in ("blank", "samples", "whole+samples"):
        keys |= _deepstack(config)
    elif data.tilings:
        side = model.vision.image_size
        keys["image_grid_pinpoints"] = [[columns * side, rows * side] for columns, rows in data.tilings]
        keys["mm_patch_merge_type"] = {"flat": "flat", "grid": "spatial", "unpad": "spatial_unpad"}[data.sequence]
    return keys, None if named else tower


def tower_processor(config) -> dict:
    """`preprocessor_config.json` of a vision tower."""
    side = config.model.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def blocks_built(config) -> int:
    """Blocks of a ViT up to the hidden state that is read: those that have weights."""
    return range(config.model.vision.depth + 1)[config.model.vision.level]


def _decoder(config):
    decoder = config.model.decoder
    return {
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "max_position_embeddings": config.data.length,
        "tie_word_embeddings": False,
        "torch_dtype": config.model.dtype,
    }


def _clip(config, depth):
    vision = config.model.vision
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": vision.heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": vision.norm_eps,
    }


def _convnext(config):
    vision = config.model.vision
    return {
        "model_type": "convnext",
        "num_stages": len(vision.depths),
        "depths": list(vision.depths),
        "hidden_sizes": list(vision.widths),
        "hidden_size": vision.widths[-1],
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu",
    }


def _deepstack(config):
    """DeepStack's own keys: what its words are for, see `configs.ABLATIONS`; whoever reads it back sees the rest."""
    model, data = config.model, config.data
    crops = max((columns * rows for columns, rows in data.tilings), default=1)
    side, layers = math.isqrt(crops), tuple(model.decoder.inject_layers)
    words = []
    if data.stacks == "encoder":
        words = ["2xsample", "deepstack_vit", f"lsvit_start_layer_{model.vision.regroup[0]}"]
    elif data.tilings == ((side, side),) and side > 1:
        words = ["2xsample"]
    elif data.tilings:
        _require("data.tilings", tuple(data.tilings), tuple(deepstack_tilings(crops)))
    if data.aspect == "anyres":
        words.append("inconsistent")
    said = {"sequence": data.sequence, "stacks": data.stacks, "tilings": tuple(data.tilings)}
    usual = {"sequence": "whole", "stacks": "samples", "tilings": said["tilings"]}
    words += [word for word, change in ABLATIONS.items() if usual | change == said]
    keys = {"image_aspect_ratio": "deepstack", "num_crops": crops, "deepstack_sampling": data.sampling}
    if layers:
        keys |= {"deepstack_start_id": layers[0], "deepstack_interval": layers[1] - layers[0] if layers[1:] else 1}
    if data.stacks == "zoom":
        keys["is_anyres_deepstack"] = True
    return keys | ({"deepstack_args_for_ablation": "+".join(words)} if words else {})


def _require(field, value, *allowed):
    if value not in allowed:
        raise ValueError(f"{field}={value!r} cannot be exported, {' or '.join(map(repr, allowed))} can")
