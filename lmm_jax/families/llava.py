"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and FastVLM of transformers.

M3 is LLaVA-1.5 of several scales, ConvLLaVA what FastVLM's class computes.
"""

from lmm_jax.families.kinds import Whole

# Prefixes of tensors: in LLaVA's own layout, and in that of transformers 4, which 5 reads too.
NAMES_4 = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# What transformers 5 calls the modules of these, which adapters name.
MODULES_4 = (
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
)
# FastVLM is younger than transformers 4 and has the names of 5.
NAMES_5 = (
    ("model.vision_tower.vision_tower.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "image_newline"),
    ("model.", "model.language_model."),
    ("lm_head.", "lm_head."),
)
CONSTANTS = {"projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,)}
# Fields of `models.projector.Projector` that its projector has, but for the number of layers.
PROJECTOR_FIELDS = {
    "shuffle": (1,),
    "norm": "",
    "hidden": "output",
    "bias": True,
    "positions": False,
    "mid_norm": False,
    "last_norm": False,
}
# What makes the pixels of CLIP and LLaVA; 3 is Pillow's number of bicubic.
PICTURES = {
    "do_convert_rgb": (True,),
    "do_resize": (True,),
    "resample": (3,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "pad_size": (),
    "use_square_size": (False,),
    "default_to_square": (False,),
}
SQUARES = {"pad": "LlavaImageProcessor", "stretch": "CLIPImageProcessor", "square": "CLIPImageProcessor"}

LLAVA = Whole(
    name="llava",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    processor="LlavaProcessor",
    encoders=("clip", "siglip"),
    accepts={"data.stacks": ("",), "data.sequence": ("whole",), "data.aspect": ("pad", "stretch", "square")},
    image_processors=SQUARES,
    names=NAMES_4,
    modules=MODULES_4,
    constants=CONSTANTS,
    defaults={"image_token_index": 32000},
    picture_constants=PICTURES,
    aliases=(
        (r"^(?:model\.)?language_model\.model\.", "model."),
        (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
        (r"^model\.language_model\.", "model."),
        (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline$", "model.image_newline"),
    ),
)
LLAVA_NEXT = Whole(
    name="llava_next",
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    processor="LlavaNextProcessor",
    encoders=("clip", "siglip"),
    accepts={
        "data.stacks": ("",),
        "data.sequence": ("unpad",),
        "data.aspect": ("anyres",),
        "data.shrink": (0,),
        "data.tiled_alone": (False,),
        "model.newline": (True,),
    },
    image_processors={"anyres": "LlavaNextImageProcessor"},
    names=NAMES_4,
    modules=MODULES_4,
    constants=CONSTANTS | {"use_image_newline_parameter": (True,)},
    defaults={
        "image_token_index": 32000,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    picture_constants=PICTURES,
    tilings_key="image_grid_pinpoints",
    read_as={"data.aspect": "anyres", "data.sequence": "unpad", "model.newline": True},
)
# Of pictures; films, which it takes too, are not read.
LLAVA_ONEVISION = Whole(
    name="llava_onevision",
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    processor="LlavaOnevisionProcessor",
    processor_needs=("torchvision",),
    encoders=("siglip", "clip"),
    accepts={
        "data.stacks": ("",),
        "data.sequence": ("unpad",),
        "data.aspect": ("anyres",),
        "model.newline": (True,),
        "data.tiled_alone": (True,),
        "data.shrink": range(1, 65),
    },
    image_processors={"anyres": "LlavaOnevisionImageProcessor"},
    names=NAMES_4,
    modules=MODULES_4,
    constants=CONSTANTS,
    defaults={
        "image_token_index": 151646,
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    },
    picture_constants=PICTURES | {"crop_size": (), "do_center_crop": (False,)},
    picture_defaults={
        "size": {"height": 384, "width": 384},
        "do_center_crop": False,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    level=-1,
    tilings_key="image_grid_pinpoints",
    shrink_key="vision_aspect_ratio",
    piece_keys={"video_token_index": "<video>"},
    read_as={
        "data.aspect": "anyres",
        "data.sequence": "unpad",
        "data.tiled_alone": True,
        "model.newline": True,
    },
)
FAST_VLM = Whole(
    name="fast_vlm",
    model_type="fast_vlm",
    architecture="FastVlmForConditionalGeneration",
    processor="LlavaProcessor",
    encoders=("convnext",),
    accepts=LLAVA.accepts,
    image_processors=SQUARES,
    names=NAMES_5,
    constants=CONSTANTS | {"vision_feature_layer": (-1,)},
    defaults={"image_token_index": 151646},
    picture_constants=PICTURES,
    level=-1,
)
