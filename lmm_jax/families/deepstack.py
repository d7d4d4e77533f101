"""DeepStack-L, -L-HD and -V: the words of its own code, and the class that an exported folder ships."""

from lmm_jax.families.kinds import Stacking, Whole
from lmm_jax.families.llava import CONSTANTS, MODULES_4, NAMES_4

STACKING = Stacking(
    aspect="deepstack",
    crops="num_crops",
    sampling="deepstack_sampling",
    first="deepstack_start_id",
    interval="deepstack_interval",
    doubled="is_anyres_deepstack",
    words="deepstack_args_for_ablation",
    square="2xsample",
    keeps_aspect=("inconsistent", "anyres_unpad"),
    inside=("deepstack_vit", "lsvit_start_layer_"),
    changes={
        "dummy_local": {"stacks": "copies"},
        "only_global_features": {"stacks": "whole", "sequence": "blank", "tilings": ()},
        "global_and_local": {"stacks": "whole+samples", "sequence": "blank"},
        "string_woglobal": {"stacks": "", "sequence": "samples"},
        "string_withglobal": {"stacks": "", "sequence": "whole+samples"},
    },
)

DEEPSTACK = Whole(
    name="deepstack",
    model_type="deepstack_llava",
    architecture="DeepStackForConditionalGeneration",
    processor="DeepStackProcessor",
    encoders=("clip",),
    accepts={
        "data.stacks": ("samples", "zoom", "encoder"),
        "data.sequence": ("whole", "grid"),
        "data.aspect": ("stretch", "anyres"),
    },
    image_processors={"stretch": "DeepStackImageProcessor", "anyres": "DeepStackImageProcessor"},
    names=NAMES_4,
    modules=MODULES_4,
    nested=False,
    constants=CONSTANTS,
    fields={
        "inject_layers": "model.decoder.inject_layers",
        "sequence": "data.sequence",
        "stacks": "data.stacks",
        "sampling": "data.sampling",
        "zoom": "data.zoom",
        "newline": "model.newline",
        "newline_in_stacks": "model.newline_in_stacks",
        "regroup": "model.vision.regroup",
    },
    picture_fields={
        "patch_size": "model.vision.patch_size",
        "tilings": "data.tilings",
        "aspect": "data.aspect",
        "zoom": "data.zoom",
        "sequence": "data.sequence",
        "newline": "model.newline",
    },
    auto_map={
        "AutoConfig": "configuration_deepstack.DeepStackConfig",
        "AutoModel": "modeling_deepstack.DeepStackModel",
        "AutoModelForImageTextToText": "modeling_deepstack.DeepStackForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_deepstack.DeepStackForConditionalGeneration",
        "AutoImageProcessor": "processing_deepstack.DeepStackImageProcessor",
        "AutoProcessor": "processing_deepstack.DeepStackProcessor",
    },
)
