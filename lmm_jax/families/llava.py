"""LLaVA-1.5, LLaVA-NeXT and FastVLM of transformers.

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
SQUARES = {"pad": "LlavaImageProcessor", "stretch": "CLIPImageProcessor", "square": "CLIPImageProcessor"}

LLAVA = Whole(
    name="llava",
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    processor="LlavaProcessor",
    encoders=("clip",),
    accepts={"data.stacks": ("",), "data.sequence": ("whole",), "data.aspect": ("pad", "stretch", "square")},
    image_processors=SQUARES,
    names=NAMES_4,
    constants=CONSTANTS,
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
    encoders=("clip",),
    accepts={
        "data.stacks": ("",),
        "data.sequence": ("unpad",),
        "data.aspect": ("anyres",),
        "model.newline": (True,),
    },
    image_processors={"anyres": "LlavaNextImageProcessor"},
    names=NAMES_4,
    constants=CONSTANTS | {"use_image_newline_parameter": (True,)},
    tilings_key="image_grid_pinpoints",
    read_as={"data.aspect": "anyres", "data.sequence": "unpad", "model.newline": True},
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
    constants=CONSTANTS,
    level=-1,
)
