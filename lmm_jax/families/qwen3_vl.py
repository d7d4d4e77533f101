"""Qwen3-VL, dense: a vision transformer for pictures of any size, mergers of 2 × 2 features, and Qwen3 behind them.

What blocks 8, 16 and 24 of the encoder give, counted from 0, is added behind decoder layers 0, 1 and 2 (DeepStack).
Pictures alone: what it does with clips is not here.
"""

import dataclasses

from lmm_jax.families.kinds import (
    CLIPS,
    FROM_HEADS,
    FUSED_QKV,
    FUSED_QKV_BIAS,
    LINEAR,
    SAME,
    Encoder,
    Projector,
    Whole,
)
from lmm_jax.families.qwen3 import QWEN3

_BLOCK, _MERGER, _OF_LEVEL = "blocks.{layer}.", "model.visual.merger.", "model.visual.deepstack_merger_list.{level}."
_ALL = {"kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 5000000.0, "norm_eps": 1e-6}
_ALL |= {"rope_axes": (24, 20, 20)}

QWEN3_VL_TEXT = dataclasses.replace(
    QWEN3,
    name="qwen3_vl_text",
    title="Qwen3-VL decoder",
    model_types=("qwen3_vl_text",),
    architecture="Qwen3VLTextModel",
    sizes={
        "2b": _ALL | {"width": 2048, "depth": 28, "heads": 16, "mlp_dim": 6144, "tied": True},
        "4b": _ALL | {"width": 2560, "depth": 36, "heads": 32, "mlp_dim": 9728, "tied": True},
        "8b": _ALL | {"width": 4096, "depth": 36, "heads": 32, "mlp_dim": 12288},
        "32b": _ALL | {"width": 5120, "depth": 64, "heads": 64, "mlp_dim": 25600},
    },
    window="",
    window_switch="",
    axes_key="mrope_section",
    axes_constants={"mrope_interleaved": (True,)},
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "mrope_section": (24, 20, 20),
        "max_position_embeddings": 128000,
        "tie_word_embeddings": False,
    },
    types="",
    prompts={},
)


def _linear(ours, theirs):
    """Tensors of a linear layer with a bias."""
    return {f"{ours}/kernel": (f"{theirs}.weight", LINEAR), f"{ours}/bias": (f"{theirs}.bias", SAME)}


def _norm(ours, theirs):
    return {f"{ours}/scale": (f"{theirs}.weight", SAME), f"{ours}/bias": (f"{theirs}.bias", SAME)}


def _merger(prefix):
    """Tensors of the two layers that make 2 × 2 features a token."""
    layers = _linear("linear_0", f"{prefix}linear_fc1") | _linear("linear_1", f"{prefix}linear_fc2")
    return _norm("norm", f"{prefix}norm") | layers


QWEN3_VL_VISION = Encoder(
    name="qwen3_vl_vision",
    title="Qwen3-VL ViT",
    encoder="qwen_vit",
    model_types=("qwen3_vl", "qwen3_vl_vision"),
    told_by="spatial_merge_size",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_processor="Qwen2VLImageProcessor",
    sizes={
        "small": {"width": 1024, "depth": 24, "mlp_dim": 4096, "stack_levels": (6, 12, 18)},
        "large": {"width": 1152, "depth": 27, "mlp_dim": 4304, "stack_levels": (9, 17, 25)},
    },
    fields={"norm_eps": 1e-6},
    keys={
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "depth": "depth",
        "heads": "num_heads",
        "patch_size": "patch_size",
        "frames": "temporal_patch_size",
        "positions": "num_position_embeddings",
    },
    constants={
        "hidden_act": ("gelu_pytorch_tanh",),
        "in_channels": (3,),
        "rope_parameters": (None, {"rope_theta": 10000.0, "rope_type": "axial"}),
    },
    defaults={
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "depth": 27,
        "num_heads": 16,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    },
    told_apart=("heads",),
    prefix="visual.",
    tensors={
        "patches/kernel": ("patch_embed.proj.weight", CLIPS),
        "patches/bias": ("patch_embed.proj.bias", SAME),
        "position": ("pos_embed.weight", SAME),
        **_norm("blocks_#/norm_1", f"{_BLOCK}norm1"),
        **_norm("blocks_#/norm_2", f"{_BLOCK}norm2"),
        **{f"blocks_#/{n}/kernel": (f"{_BLOCK}attn.qkv.weight", FUSED_QKV) for n in "qkv"},
        **{f"blocks_#/{n}/bias": (f"{_BLOCK}attn.qkv.bias", FUSED_QKV_BIAS) for n in "qkv"},
        "blocks_#/o/kernel": (f"{_BLOCK}attn.proj.weight", FROM_HEADS),
        "blocks_#/o/bias": (f"{_BLOCK}attn.proj.bias", SAME),
        **_linear("blocks_#/up", f"{_BLOCK}mlp.linear_fc1"),
        **_linear("blocks_#/down", f"{_BLOCK}mlp.linear_fc2"),
    },
    table="positions",
    levels_key="deepstack_visual_indexes",
    aliases=(
        (
            r"^(?:(?:model\.)?visual\.)?(?=patch_embed\.proj\.|pos_embed\.weight$|"
            r"blocks\.\d+\.(?:norm[12]|attn\.(?:qkv|proj)|mlp\.linear_fc[12])\.)",
            "",
        ),
    ),
)

QWEN3_VL_MERGER = Projector(
    name="qwen3_vl",
    title="Qwen3-VL",
    fields={
        "depth": 2,
        "order": "cells",
        "norm": "cells",
        "hidden": "input",
        "bias": True,
        "positions": False,
        "mid_norm": False,
        "last_norm": False,
        "norm_eps": 1e-6,
    },
    level_fields={"norm": "block"},
    tensors=_merger(_MERGER),
    level_tensors=_merger(_OF_LEVEL),
    prefixes=(_MERGER, _OF_LEVEL.partition("{")[0]),
    shuffle_key="spatial_merge_size",
    width_key="out_hidden_size",
)

QWEN3_VL = Whole(
    name="qwen3_vl",
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    processor="Qwen3VLProcessor",
    processor_needs=("torchvision",),
    encoders=("qwen3_vl_vision",),
    decoders=("qwen3_vl_text",),
    projector="qwen3_vl",
    accepts={"data.stacks": ("",), "data.sequence": ("whole",), "data.aspect": ("native",)},
    image_processors={"native": "Qwen2VLImageProcessor"},
    names=(
        ("model.vision_tower.vision_tower.visual.", "model.visual."),
        ("model.visual.", "model.visual."),
        ("model.", "model.language_model."),
        ("lm_head.", "lm_head."),
    ),
    llava_keys=False,
    image_key="image_token_id",
    image_piece="<|image_pad|>",
    inside=True,
    piece_keys={
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "video_token_id": "<|video_pad|>",
    },
    pixels=True,
    picture_constants={
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "resample": (3,),
    },
    read_as={"data.aspect": "native", "data.sequence": "whole"},
)
