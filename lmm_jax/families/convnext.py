"""ConvNeXt as CLIP trained it, in the layouts of transformers, timm and open_clip: the tower of ConvLLaVA."""

from lmm_jax.families.clip import MEAN, STD
from lmm_jax.families.kinds import DEPTHWISE, HALVING, LINEAR, PATCHES, SAME, Encoder

_STAGE, _BLOCK = "encoder.stages.{stage}.", "encoder.stages.{stage}.layers.{layer}."
_TIMM = r"^(?:visual\.trunk\.)?"  # open_clip's is timm's inside
_TIMM_BLOCK = {
    r"conv_dw\.": "dwconv.",
    r"norm\.": "layernorm.",
    r"mlp\.fc1\.": "pwconv1.",
    r"mlp\.fc2\.": "pwconv2.",
    r"gamma$": "layer_scale_parameter",
}

CONVNEXT = Encoder(
    name="convnext",
    title="ConvNeXt",
    encoder="convnext",
    model_types=("convnext",),
    told_by="depths",
    mean=MEAN,
    std=STD,
    image_processor="CLIPImageProcessor",
    fields={"stack_levels": ()},
    keys={"depths": "depths", "widths": "hidden_sizes", "image_size": "image_size", "patch_size": "patch_size"},
    counts={"num_stages": "depths"},
    lasts={"hidden_size": "widths"},
    constants={"hidden_act": ("gelu",)},
    defaults={"patch_size": 4},
    positives=("layer_scale_init_value",),
    tensors={
        "patches/kernel": ("embeddings.patch_embeddings.weight", PATCHES),
        "patches/bias": ("embeddings.patch_embeddings.bias", SAME),
        "norm_pre/scale": ("embeddings.layernorm.weight", SAME),
        "norm_pre/bias": ("embeddings.layernorm.bias", SAME),
        "stage_#/norm/scale": (f"{_STAGE}downsampling_layer.0.weight", SAME),
        "stage_#/norm/bias": (f"{_STAGE}downsampling_layer.0.bias", SAME),
        "stage_#/reduce/kernel": (f"{_STAGE}downsampling_layer.1.weight", HALVING),
        "stage_#/reduce/bias": (f"{_STAGE}downsampling_layer.1.bias", SAME),
        "stage_#/blocks/depthwise/kernel": (f"{_BLOCK}dwconv.weight", DEPTHWISE),
        "stage_#/blocks/depthwise/bias": (f"{_BLOCK}dwconv.bias", SAME),
        "stage_#/blocks/norm/scale": (f"{_BLOCK}layernorm.weight", SAME),
        "stage_#/blocks/norm/bias": (f"{_BLOCK}layernorm.bias", SAME),
        "stage_#/blocks/up/kernel": (f"{_BLOCK}pwconv1.weight", LINEAR),
        "stage_#/blocks/up/bias": (f"{_BLOCK}pwconv1.bias", SAME),
        "stage_#/blocks/down/kernel": (f"{_BLOCK}pwconv2.weight", LINEAR),
        "stage_#/blocks/down/bias": (f"{_BLOCK}pwconv2.bias", SAME),
        "stage_#/blocks/scale": (f"{_BLOCK}layer_scale_parameter", SAME),
    },
    unread_norm=("layernorm.", "widths"),
    aliases=(
        (
            r"^(?:model\.)?(?:vision_tower\.|convnext\.)?"
            r"(?=embeddings\.patch_embeddings\.|embeddings\.layernorm\.|encoder\.stages\.|layernorm\.)",
            "",
        ),
        (_TIMM + r"stem\.0\.", "embeddings.patch_embeddings."),
        (_TIMM + r"stem\.1\.", "embeddings.layernorm."),
        (_TIMM + r"stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
        *(
            (_TIMM + rf"stages\.(\d+)\.blocks\.(\d+)\.{timm}", rf"encoder.stages.\1.layers.\2.{theirs}")
            for timm, theirs in _TIMM_BLOCK.items()
        ),
    ),
    ignored={
        r"vision_tower\.vision_tower\.layernorm\.": "follows the last stage, whose output is read without it",
        r"^visual\.head\.|^(visual\.trunk\.)?head\.|^classifier\.": "of the classifier or CLIP's projection",
    },
)
