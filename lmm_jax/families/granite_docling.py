"""Granite-Docling: SigLIP on tiles, two budgets of tokens a tile with a router between them, Granite as the decoder.

What blocks 3, 7 and 10 of the encoder give, counted from 0, is added behind decoder layers 0, 1 and 2 (DeepStack).
"""

import dataclasses

from lmm_jax.families.granite import GRANITE
from lmm_jax.families.kinds import LINEAR, SAME, Projector, Whole
from lmm_jax.families.siglip import SIGLIP
from lmm_jax.families.smolvlm import SMOLVLM_MARKS

_CONNECTOR = "model.vision_model.connector."

GRANITE_DOCLING_TEXT = dataclasses.replace(
    GRANITE,
    name="granite_docling_text",
    title="Granite-Docling decoder",
    model_types=("granite_docling_text",),
    architecture="GraniteDoclingTextModel",
    sizes={
        "0.5b": {
            "width": 1024,
            "depth": 28,
            "heads": 16,
            "kv_heads": 4,
            "mlp_dim": 2048,
            "vocab_size": 133800,
            "tied": True,
            "multipliers": (12.0, 0.263, 0.015625, 4.0),
        }
    },
    defaults={
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 133800,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.263,
        "attention_multiplier": 0.015625,
        "logits_scaling": 4.0,
    },
    types="",
    prompts={},
)

# The router that chooses between both budgets, see `models.router.DensityRouter`.
GRANITE_DOCLING_ROUTER = {
    f"{ours}/{leaf}": (f"model.density_router.{theirs}.{name}", layout)
    for ours, theirs, kernel in (
        ("attention", "att", LINEAR),
        ("norm", "norm", None),
        ("linear_0", "fc1", LINEAR),
        ("linear_1", "fc2", LINEAR),
    )
    for leaf, name, layout in ((("kernel" if kernel else "scale"), "weight", kernel or SAME), ("bias", "bias", SAME))
}

GRANITE_DOCLING_VISION = dataclasses.replace(
    SIGLIP,
    name="granite_docling",
    title="Granite-Docling ViT",
    model_types=("granite_docling_vision",),
    told_by="use_fine_route",
    # Its processor normalises as CLIP does.
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    image_processor="GraniteDoclingImageProcessor",
    fields=dict(SIGLIP.fields) | {"post_norm": True, "level": -1},
    usual={"norm_eps": 1e-6, "image_size": 512, "patch_size": 16},
    constants={"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)},
    defaults=dict(SIGLIP.defaults) | {"image_size": 512},
    aliases=(),
    levels_key="deepstack_visual_indexes",
    unread_norm=(),
    ignored={},
)

CONNECTOR = Projector(
    name="granite_docling",
    title="Granite-Docling",
    fields={
        "depth": 2,
        "order": "cells",
        "norm": "cells",
        "hidden": "output",
        "bias": False,
        "positions": True,
        "mid_norm": True,
        "last_norm": True,
        "shared": True,
        "norm_eps": 1e-5,
    },
    level_fields={
        "norm": "block",
        "bias": True,
        "positions": False,
        "mid_norm": False,
        "last_norm": False,
        "shared": False,
    },
    tensors={
        **{
            f"{ours}/{leaf}": (f"{_CONNECTOR}{theirs}.{name}", SAME)
            for ours, theirs in (("norm", "ln_in"), ("norm_1", "ln_mid"), ("norm_last", "ln_out"))
            for leaf, name in (("scale", "weight"), ("bias", "bias"))
        },
        "linear_0/kernel": (f"{_CONNECTOR}{{path}}.projection.weight", LINEAR),
        "linear_1/kernel": (f"{_CONNECTOR}mlp_fc2.weight", LINEAR),
    },
    level_tensors={
        f"{ours}/{leaf}": (f"{_CONNECTOR}{{path}}.deepstack_mergers.{{level}}.{theirs}.{name}", layout)
        for ours, theirs, leaves in (
            ("norm", "layer_norm", (("scale", "weight", SAME), ("bias", "bias", SAME))),
            ("linear_0", "linear_1", (("kernel", "weight", LINEAR), ("bias", "bias", SAME))),
            ("linear_1", "linear_2", (("kernel", "weight", LINEAR), ("bias", "bias", SAME))),
        )
        for leaf, name, layout in leaves
    },
    paths=("coarse", "fine"),
    prefixes=(_CONNECTOR,),
    shuffle_key="scale_factor",
    finer_key="use_fine_route",
    finer_word="fine_route",
    width_key="out_hidden_size",
)

GRANITE_DOCLING_MARKS = dataclasses.replace(SMOLVLM_MARKS, alone=("<fake_token_around_image><row_1_col_1>", "\n"))

_TOWER = "model.vision_tower.vision_tower.vision_model."

GRANITE_DOCLING = Whole(
    name="granite_docling",
    model_type="granite_docling",
    architecture="GraniteDoclingForConditionalGeneration",
    processor="GraniteDoclingProcessor",
    encoders=("granite_docling",),
    projector="granite_docling",
    marks="granite_docling",
    divides_logits=True,
    accepts={"data.stacks": ("",), "data.sequence": ("tiles",), "data.aspect": ("stretch",)},
    image_processors={"stretch": "GraniteDoclingImageProcessor"},
    names=(
        (_TOWER, "model.vision_model."),
        (_CONNECTOR, _CONNECTOR),
        ("model.density_router.", "model.density_router."),
        ("model.", "model.text_model."),
        ("lm_head.", "lm_head."),
    ),
    level=-1,
    most_tiles_key="max_patches",
    fewest_tiles_key="min_patches",
    llava_keys=False,
    image_key="image_token_id",
    inside=True,
    optional={
        "density_router_hidden_size": "model.density_router.width",
        "density_router_threshold": "model.density_router.threshold",
    },
    picture_constants={
        "crop_to_patches": (True,),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "resample": (3,),
        # A second number of tiles for pages of some shapes is not reproduced.
        "dense_max_patches": (0,),
    },
    read_as={"data.aspect": "stretch", "data.sequence": "tiles", "data.choice": "ratio"},
    aliases=((r"^model\.text_model\.", "model."),),
)
