"""SmolVLM: SigLIP on tiles, sixteen features in one token by a single linear layer, SmolLM2 as the decoder.

Its sizes: SmolVLM-256M and -500M have SigLIP's `b16-512`, tiles of 512 pixels and 64 tokens of each; the one of 2.2 B
has `so400m14-384`, tiles of 384 pixels, and shuffles by 3: 81 tokens.
"""

import dataclasses

from lmm_jax.families.kinds import LINEAR, Marks, Projector, Whole
from lmm_jax.families.siglip import SIGLIP

_CONNECTOR = "model.connector.modality_projection.proj"
_TOWER = "model.vision_tower.vision_tower.vision_model."

SMOLVLM_VISION = dataclasses.replace(
    SIGLIP,
    name="smolvlm",
    title="SmolVLM ViT",
    model_types=("smolvlm_vision",),
    told_by="use_base_siglip",
    image_processor="SmolVLMImageProcessor",
    fields=dict(SIGLIP.fields) | {"post_norm": True, "level": -1},
    usual={"norm_eps": 1e-6},
    constants={"hidden_act": ("gelu_pytorch_tanh",), "num_channels": (3,)},
    defaults=dict(SIGLIP.defaults) | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32},
    aliases=(),
    unread_norm=(),
    ignored={},
    # Its class finds the position of a patch by comparing float32 fractions; at these sides some come out one less.
    misplaced=(19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62),
)

SMOLVLM_CONNECTOR = Projector(
    name="smolvlm",
    title="SmolVLM",
    fields={
        "depth": 1,
        "order": "cells",
        "norm": "",
        "hidden": "output",
        "bias": False,
        "positions": False,
        "mid_norm": False,
        "last_norm": False,
        "shared": False,
    },
    tensors={"linear_0/kernel": (f"{_CONNECTOR}.weight", LINEAR)},
    prefixes=(_CONNECTOR,),
    shuffle_key="scale_factor",
    of_tower=False,
)

SMOLVLM_MARKS = Marks(
    alone=("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    tile="<fake_token_around_image><row_{row}_col_{column}>",
    row_end="\n",
    whole=("\n<fake_token_around_image><global-img>", "<fake_token_around_image>"),
)

SMOLVLM = Whole(
    name="smolvlm",
    model_type="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    processor="SmolVLMProcessor",
    processor_needs=("torchvision", "num2words"),
    encoders=("smolvlm",),
    projector="smolvlm",
    marks="smolvlm",
    accepts={"data.stacks": ("",), "data.sequence": ("tiles",), "data.aspect": ("longest",)},
    image_processors={"longest": "SmolVLMImageProcessor"},
    names=(
        (_TOWER, "model.vision_model."),
        (_CONNECTOR, _CONNECTOR),
        ("model.", "model.text_model."),
        ("lm_head.", "lm_head."),
    ),
    level=-1,
    tile_key="max_image_size",
    llava_keys=False,
    image_key="image_token_id",
    inside=True,
    defaults={"scale_factor": 2, "image_token_id": 128257},
    picture_constants={
        "do_image_splitting": (True,),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_convert_rgb": (True,),
        "do_pad": (True,),
        "resample": (1,),
    },
    read_as={"data.aspect": "longest", "data.sequence": "tiles"},
    aliases=((r"^model\.text_model\.", "model."),),
)
