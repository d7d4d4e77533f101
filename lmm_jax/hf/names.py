"""Our parameter paths beside the tensor names and layouts that PyTorch code stores.

Ours are stacked over the layers of a scan and laid out input first; theirs are one tensor a layer, output first.
"""

import dataclasses
import math
import re

import numpy as np

from lmm_jax.models.encoders.vit import ViT

STRIP = 256  # rows of a matrix that are transposed at a time

# Kinds of layout: how a tensor of theirs is transposed before it is reshaped to ours.
SAME, LINEAR, CONV = (), (1, 0), (2, 3, 1, 0)

LLAMA = {
    "table": ("model.embed_tokens.weight", SAME),
    "head/kernel": ("lm_head.weight", LINEAR),
    "norm/scale": ("model.norm.weight", SAME),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", SAME),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", SAME),
    **{f"layers/{n}/kernel": (f"model.layers.{{}}.self_attn.{n}_proj.weight", LINEAR) for n in "qkvo"},
    **{f"layers/{n}/kernel": (f"model.layers.{{}}.mlp.{n}_proj.weight", LINEAR) for n in ("gate", "up", "down")},
}

CLIP_BLOCK = {
    "norm_1": "layer_norm1",
    "norm_2": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
CLIP = {
    "cls": ("embeddings.class_embedding", SAME),
    "position": ("embeddings.position_embedding.weight", SAME),
    "patches/kernel": ("embeddings.patch_embedding.weight", CONV),
    "norm_pre/scale": ("pre_layrnorm.weight", SAME),  # their spelling
    "norm_pre/bias": ("pre_layrnorm.bias", SAME),
}

CONVNEXT_BLOCK = {
    "depthwise/kernel": ("dwconv.weight", CONV),
    "depthwise/bias": ("dwconv.bias", SAME),
    "norm/scale": ("layernorm.weight", SAME),
    "norm/bias": ("layernorm.bias", SAME),
    "up/kernel": ("pwconv1.weight", LINEAR),
    "up/bias": ("pwconv1.bias", SAME),
    "down/kernel": ("pwconv2.weight", LINEAR),
    "down/bias": ("pwconv2.bias", SAME),
    "scale": ("layer_scale_parameter", SAME),
}
CONVNEXT = {
    "patches/kernel": ("embeddings.patch_embeddings.weight", CONV),
    "patches/bias": ("embeddings.patch_embeddings.bias", SAME),
    "norm_pre/scale": ("embeddings.layernorm.weight", SAME),
    "norm_pre/bias": ("embeddings.layernorm.bias", SAME),
}
CONVNEXT_REDUCE = {
    "norm/scale": ("downsampling_layer.0.weight", SAME),
    "norm/bias": ("downsampling_layer.0.bias", SAME),
    "reduce/kernel": ("downsampling_layer.1.weight", CONV),
    "reduce/bias": ("downsampling_layer.1.bias", SAME),
}

CONVNEXT_PREFIX = "model.vision_tower.vision_tower."
VIT_PREFIX = CONVNEXT_PREFIX + "vision_model."

VOCABULARY = ("decoder/table", "decoder/head/kernel")  # our paths of what has a row or a column a piece

# Tensors that a checkpoint may hold and no model of ours reads, and why.
IGNORED = {
    r"rotary_emb\.inv_freq$": "computed",
    r"embeddings\.position_ids$": "computed",
    r"vision_model\.post_layernorm\.": "follows the last block, which is not read",
    r"vision_tower\.vision_tower\.layernorm\.": "follows the last stage, whose output is read without it",
    r"^(text_model|text)\.|^(text_projection|visual_projection|logit_scale|logit_bias)\b": "of CLIP's text side",
    r"^(token_embedding|transformer|ln_final|positional_embedding|attn_mask)\b": "of CLIP's text side",
    r"^visual\.head\.|^(visual\.trunk\.)?head\.|^classifier\.": "of the classifier or CLIP's projection",
}

# Other layouts' names of the same tensors, to be read as `(pattern, LLaVA's original name)`; the first match counts.
_IN_VIT = r"(?=embeddings\.|encoder\.layers\.|pre_layrnorm\.|post_layernorm\.)"
_IN_CONVNEXT = r"(?=embeddings\.patch_embeddings\.|embeddings\.layernorm\.|encoder\.stages\.|layernorm\.)"
_TIMM = r"^(?:visual\.trunk\.)?"
_TIMM_BLOCK = {
    r"conv_dw\.": "dwconv.",
    r"norm\.": "layernorm.",
    r"mlp\.fc1\.": "pwconv1.",
    r"mlp\.fc2\.": "pwconv2.",
    r"gamma$": "layer_scale_parameter",
}
ALIASES = (
    # transformers 4 and 5: llava, llava_next, fast_vlm
    (r"^(?:model\.)?language_model\.model\.", "model."),
    (r"^(?:model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^model\.language_model\.", "model."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^image_newline$", "model.image_newline"),
    # towers in them and alone: ConvNeXt, CLIP whole or its vision side
    (rf"^(?:model\.)?(?:vision_tower\.|convnext\.)?{_IN_CONVNEXT}", CONVNEXT_PREFIX),
    (rf"^(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?{_IN_VIT}", VIT_PREFIX),
    # ConvNeXt of timm, and of open_clip around it
    (_TIMM + r"stem\.0\.", CONVNEXT_PREFIX + "embeddings.patch_embeddings."),
    (_TIMM + r"stem\.1\.", CONVNEXT_PREFIX + "embeddings.layernorm."),
    (_TIMM + r"stages\.(\d+)\.downsample\.", CONVNEXT_PREFIX + r"encoder.stages.\1.downsampling_layer."),
    *(
        (_TIMM + rf"stages\.(\d+)\.blocks\.(\d+)\.{timm}", CONVNEXT_PREFIX + rf"encoder.stages.\1.layers.\2.{hf}")
        for timm, hf in _TIMM_BLOCK.items()
    ),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of theirs and where it goes.

    Attributes:
      name: theirs.
      shape: theirs.
      path: of our parameter.
      layer: index into our leading axis of layers, or None.
      order: axes of theirs, in our order; () keeps them.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    order: tuple[int, ...]

    def to_ours(self, array, out):
        """Copies theirs to `out`, contiguous, in the layout of ours: one layer."""
        shape = [array.shape[axis] for axis in self.order] or array.shape
        _transpose(array, self.order, out.reshape(shape))

    def to_theirs(self, array):
        """One layer of ours in the layout of theirs; contiguous, as safetensors writes a view's memory as it lies."""
        order = self.order or tuple(range(len(self.shape)))
        array = np.asarray(array).reshape([self.shape[axis] for axis in order])
        out = np.empty(self.shape, array.dtype)
        _transpose(array, tuple(np.argsort(order)), out)
        return out


def _transpose(array, order, out):
    """Copies `array` to `out` with its axes in `order`; matrices in strips, three times as fast as numpy's own."""
    if tuple(order) != LINEAR:
        out[...] = array.transpose(order) if order else array
        return
    for row in range(0, len(array), STRIP):
        out[:, row : row + STRIP] = array[row : row + STRIP].T


def tensors(model, shapes) -> list[Tensor]:
    """Every tensor that a model of ours is made of, under the names of LLaVA's original layout.

    Args:
      model: the `LMM`.
      shapes: our parameter paths and shapes, flat.
    """
    out = []
    for path, shape in shapes.items():
        name, order, first = _theirs(model, path)
        stacked = "{}" in name
        one = shape[1:] if stacked else shape
        theirs = _their_shape(model, path, one, order)
        layers = range(shape[0]) if stacked else [None]
        out += [Tensor(name.format(first + i) if stacked else name, theirs, path, i, order) for i in layers]
    return out


def original_name(name) -> str:
    """LLaVA's original name of a tensor that is stored under another layout's."""
    if name.startswith(CONVNEXT_PREFIX):
        return name
    for pattern, original in ALIASES:
        renamed, found = re.subn(pattern, original, name, count=1)
        if found:
            return renamed
    return name


def transformers_name(name, architecture) -> str:
    """A tensor's name in transformers' `architecture`, from LLaVA's original one: what stands on its hub.

    llava, llava_next and DeepStack have the names of transformers 4, which 5 reads too; fast_vlm, younger than these,
    has those of 5.
    """
    young = architecture == "fast_vlm"
    for theirs, ours in (
        ("model.vision_tower.vision_tower.", "model.vision_tower." if young else "vision_tower."),
        ("model.mm_projector.0.", ("model." if young else "") + "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", ("model." if young else "") + "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
        ("model.", "model.language_model." if young else "language_model.model."),
        ("lm_head.", "lm_head." if young else "language_model.lm_head."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise ValueError(f"tensor {name} has no name in {architecture}")


def ignored(name) -> str | None:
    """Why a tensor of a checkpoint is not read, or None if it should be."""
    return next((why for pattern, why in IGNORED.items() if re.search(pattern, name)), None)


def _theirs(model, path):
    """`(name with {} for the layer, order, number of the first layer)`."""
    part, _, rest = path.partition("/")
    if part == "decoder":
        return *LLAMA[rest], 0
    if path == "image_newline":
        return "model.image_newline", SAME, 0
    if part == "projector":
        layer, leaf = rest.split("/")
        name = f".{2 * int(layer.removeprefix('linear_'))}" if model.projector.depth > 1 else ""
        return f"model.mm_projector{name}.{_leaf(leaf)}", LINEAR if leaf == "kernel" else SAME, 0
    if part == "vision":
        return _vit(rest) if isinstance(model.vision, ViT) else _convnext(rest)
    raise ValueError(f"parameter {path} has no name in LLaVA's layout")


def _vit(path):
    if path in CLIP:
        name, order = CLIP[path]
        return VIT_PREFIX + name, order, 0
    run, module, leaf = path.split("/")
    order = LINEAR if leaf == "kernel" else SAME
    name = f"{VIT_PREFIX}encoder.layers.{{}}.{CLIP_BLOCK[module]}.{_leaf(leaf)}"
    return name, order, int(run.removeprefix("blocks_"))


def _convnext(path):
    if path in CONVNEXT:
        name, order = CONVNEXT[path]
        return CONVNEXT_PREFIX + name, order, 0
    stage, rest = path.split("/", 1)
    prefix = f"{CONVNEXT_PREFIX}encoder.stages.{int(stage.removeprefix('stage_')) - 1}."
    if rest.startswith("blocks/"):
        name, order = CONVNEXT_BLOCK[rest.removeprefix("blocks/")]
        return f"{prefix}layers.{{}}.{name}", order, 0
    name, order = CONVNEXT_REDUCE[rest]
    return prefix + name, order, 0


def _leaf(leaf):
    return "bias" if leaf == "bias" else "weight"


def _their_shape(model, path, ours, order):
    *_, module, leaf = ["", *path.split("/")]
    if order == LINEAR:
        inputs = 2 if module == "o" else 1  # heads and their width
        return math.prod(ours[inputs:]), math.prod(ours[:inputs])
    if order == CONV:
        side = {"patches": model.vision.patch_size, "reduce": 2}.get(module)
        return (ours[-1], ours[0] // side**2, side, side) if side else (ours[-1], 1, *ours[:2])
    return ours if leaf in ("table", "position") else (math.prod(ours),)
