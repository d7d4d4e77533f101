"""The layout of LLaVA's own code, in which LLaVA, M3, ConvLLaVA and, with further words, DeepStack are released."""

from lmm_jax.families.deepstack import STACKING
from lmm_jax.families.kinds import Original
from lmm_jax.families.llava import PICTURES

LLAVA_CODE = Original(
    name="llava",
    title="LLaVA",
    told_by="mm_projector_type",
    architecture="LlavaLlamaForCausalLM",
    model_type="llava_llama",
    tower="model.vision_tower.vision_tower.",
    projector="model.mm_projector",
    newline="model.image_newline",
    constants={
        "mm_use_im_start_end": (False,),
        "mm_use_im_patch_token": (False,),
        "mm_vision_select_feature": ("patch",),
    },
    picture_constants=PICTURES,
    keys={
        "tower": "mm_vision_tower",
        "tower, by other code": "vision_tower",
        "level": "mm_vision_select_layer",
        "aspect": "image_aspect_ratio",
        "tilings": "image_grid_pinpoints",
        "merge": "mm_patch_merge_type",
        "scales": "matryoshka_vis_token_scale",
        "length": "tokenizer_model_max_length",
        "trains tower": "unfreeze_mm_vision_tower",
    },
    merges={"flat": "flat", "spatial": "grid", "spatial_unpad": "unpad"},
    stacking=STACKING,
)
