"""SigLIP's vision transformer, and that of SigLIP 2 at a fixed size, which has the same class."""

from lmm_jax.families.clip import TENSORS
from lmm_jax.families.kinds import SAME, Encoder

_NOT_THERE = ("cls", "norm_pre/scale", "norm_pre/bias")

SIGLIP = Encoder(
    name="siglip",
    title="SigLIP ViT",
    encoder="vit",
    model_types=("siglip_vision_model", "siglip"),
    told_by="vision_use_head",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    image_processor="SiglipImageProcessor",
    sizes={
        "b16-512": {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "image_size": 512, "patch_size": 16},
        "l16-384": {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096, "image_size": 384, "patch_size": 16},
        "so400m14-384": {
            "width": 1152,
            "depth": 27,
            "heads": 16,
            "mlp_dim": 4304,
            "image_size": 384,
            "patch_size": 14,
        },
    },
    fields={
        "cut_rest": True,
        "class_token": False,
        "patch_bias": True,
        "pre_norm": False,
        "activation": "gelu_tanh",
    },
    usual={"norm_eps": 1e-6, "level": -1},
    keys={
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "norm_eps": "layer_norm_eps",
    },
    constants={"hidden_act": ("gelu_pytorch_tanh",), "vision_use_head": (False, True)},
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    told_apart=("heads", "image_size", "norm_eps"),
    prefix="vision_model.",
    tensors={path: theirs for path, theirs in TENSORS.items() if path not in _NOT_THERE}
    | {
        "patches/bias": ("embeddings.patch_embedding.bias", SAME),
        "norm_post/scale": ("post_layernorm.weight", SAME),
        "norm_post/bias": ("post_layernorm.bias", SAME),
    },
    blocks="encoder.layers.",
    level=("level", "depth"),
    unread_norm=("post_layernorm.", "width"),
    # The rest of its names are CLIP's, and known from there.
    aliases=((r"^(?:model\.)?(?:vision_tower\.vision_model\.|vision_tower\.|vision_model\.)(?=head\.)", ""),),
    ignored={
        r"vision_model\.head\.": "pools the patches for SigLIP's own loss",
    },
)
