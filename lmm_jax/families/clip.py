"""CLIP's vision transformer: the tower of LLaVA, M3 and DeepStack."""

from lmm_jax.families.kinds import FLAT, FROM_HEADS, LINEAR, PATCHES, SAME, Encoder

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_BLOCK = "encoder.layers.{layer}."
TENSORS = {
    "cls": ("embeddings.class_embedding", SAME),
    "position": ("embeddings.position_embedding.weight", SAME),
    "patches/kernel": ("embeddings.patch_embedding.weight", PATCHES),
    "norm_pre/scale": ("pre_layrnorm.weight", SAME),  # their spelling
    "norm_pre/bias": ("pre_layrnorm.bias", SAME),
    **{
        f"blocks_#/{ours}/{leaf}": (f"{_BLOCK}{theirs}.{name}", SAME)
        for ours, theirs in (("norm_1", "layer_norm1"), ("norm_2", "layer_norm2"))
        for leaf, name in (("scale", "weight"), ("bias", "bias"))
    },
    **{f"blocks_#/{n}/kernel": (f"{_BLOCK}self_attn.{n}_proj.weight", LINEAR) for n in "qkv"},
    **{f"blocks_#/{n}/bias": (f"{_BLOCK}self_attn.{n}_proj.bias", FLAT) for n in "qkv"},
    "blocks_#/o/kernel": (f"{_BLOCK}self_attn.out_proj.weight", FROM_HEADS),
    "blocks_#/o/bias": (f"{_BLOCK}self_attn.out_proj.bias", SAME),
    "blocks_#/up/kernel": (f"{_BLOCK}mlp.fc1.weight", LINEAR),
    "blocks_#/up/bias": (f"{_BLOCK}mlp.fc1.bias", SAME),
    "blocks_#/down/kernel": (f"{_BLOCK}mlp.fc2.weight", LINEAR),
    "blocks_#/down/bias": (f"{_BLOCK}mlp.fc2.bias", SAME),
}

CLIP = Encoder(
    name="clip",
    title="CLIP ViT",
    encoder="vit",
    model_types=("clip_vision_model", "clip"),
    told_by="num_attention_heads",
    mean=MEAN,
    std=STD,
    image_processor="CLIPImageProcessor",
    fields={
        "stack_levels": (),
        "cut_rest": False,
        "class_token": True,
        "patch_bias": False,
        "pre_norm": True,
        "post_norm": False,
        "activation": "quick_gelu",
    },
    keys={
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "norm_eps": "layer_norm_eps",
    },
    constants={"hidden_act": ("quick_gelu",)},
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
    },
    towers={
        "openai/clip-vit-large-patch14-336": _LARGE | {"image_size": 336},
        "openai/clip-vit-large-patch14": _LARGE,
    },
    told_apart=("heads", "image_size", "norm_eps"),
    prefix="vision_model.",
    tensors=TENSORS,
    blocks="encoder.layers.",
    level=("level", "depth"),
    unread_norm=("post_layernorm.", "width"),
    class_token=True,
    aliases=(
        # inside a whole model, alone, or the vision side of a whole CLIP
        (
            r"^(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?"
            r"(?=embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.)",
            "",
        ),
    ),
    ignored={
        r"embeddings\.position_ids$": "computed",
        r"vision_model\.post_layernorm\.": "follows the last block, whose output is read without it",
        r"^(text_model|text)\.|^(text_projection|visual_projection|logit_scale|logit_bias)\b": "of CLIP's text side",
        r"^(token_embedding|transformer|ln_final|positional_embedding|attn_mask)\b": "of CLIP's text side",
    },
)
