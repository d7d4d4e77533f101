"""Configs of models that others trained, read into ours: what a model is stands in its `config.json`.

Two layouts are known: LLaVA's original one, in which LLaVA-1.5, -1.6, M3, ConvLLaVA and DeepStack are released, and
that of transformers (`llava`, `llava_next`, `fast_vlm`, and what `lmm export` writes for DeepStack).
"""

import ast
import json
import math

import numpy as np
from etils import epath

from lmm_jax import config as c
from lmm_jax.data.conversation import TEMPLATES, template_for
from lmm_jax.data.views import deepstack_tilings
from lmm_jax.models.encoders import make_encoder

# Vision towers that a config may name without saying what they are.
TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}
TOWERS["openai/clip-vit-large-patch14"] = TOWERS["openai/clip-vit-large-patch14-336"] | {"image_size": 224}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# What transformers leaves out of a config because it is its default.
LLAMA_DEFAULTS = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}


class LoadError(ValueError):
    """A folder that is no model we can read; the message names the file, key or tensors."""


def is_model(folder) -> bool:
    """Whether a folder's `config.json` is of a model that `read_config` knows, and not one of a workdir of ours."""
    path = epath.Path(folder) / "config.json"
    return path.exists() and "model_type" in read_json(path)


def read_config(folder, vision=None):
    """Our config of a model.

    Args:
      folder: with `config.json` and `tokenizer.model`.
      vision: folder of the vision tower, where it lies apart and the config does not lead to it.

    Raises:
      LoadError: a model of another kind, a key whose value we cannot reproduce, or a tower that cannot be found; the
        message names it.
    """
    folder = epath.Path(folder)
    keys = Keys(folder / "config.json")
    processor = None
    if "mm_projector_type" in keys.content:
        tower, processor = _tower(folder, keys, vision)
    elif keys.get("model_type") in TRANSFORMERS:
        tower, processor = _transformers(folder, keys)
    else:
        raise LoadError(
            f"{keys.path}: model_type '{keys.get('model_type')}' is not supported: neither LLaVA's original layout "
            f"(no mm_projector_type) nor {', '.join(TRANSFORMERS)}"
        )
    cfg = c.base()
    stored = keys.get("torch_dtype") or keys.get("dtype", "float32")
    cfg.model.dtype = {"float16": "bfloat16"}.get(stored, stored)
    _decoder(cfg, keys)
    _vision(cfg, tower, processor, keys)
    kind = keys.get("mm_projector_type", "linear")
    depth = {"linear": 1, **{f"mlp{n}x_gelu": n for n in range(1, 9)}}.get(kind)
    if depth is None:
        raise LoadError(f"{keys.path}: mm_projector_type '{kind}' is not supported; linear and mlpNx_gelu are")
    cfg.model.projector.depth = depth
    _visual_layout(cfg, keys)
    cfg.data.template = _template(keys)
    cfg.data.length = keys.get("tokenizer_model_max_length") or keys.get("max_position_embeddings", 2048)
    return cfg.lock()


def _template(keys):
    named = keys.get("lmm_jax_template")
    if named is None:
        return template_for(keys.content)
    if named not in TEMPLATES:
        raise LoadError(f"{keys.path}: lmm_jax_template '{named}' is not known; {', '.join(TEMPLATES)} are")
    return named


class Keys:
    """The keys of a `config.json` or of a part of it, and the file for messages."""

    def __init__(self, path, content=None):
        if content is None and not path.exists():
            raise FileNotFoundError(f"{path.parent} is no model: it has no {path.name}")
        self.path, self.content = path, read_json(path) if content is None else content

    def __getitem__(self, key):
        if key not in self.content:
            raise LoadError(f"{self.path} has no '{key}'")
        return self.content[key]

    def get(self, key, default=None):
        value = self.content.get(key)
        return default if value is None else value

    def require(self, key, *allowed):
        """Raises LoadError for a key whose value is none of those that we reproduce; missing ones are fine."""
        value = self.content.get(key)
        if value is not None and value not in allowed:
            raise LoadError(f"{self.path}: {key} = {value!r} is not supported, {' or '.join(map(repr, allowed))} is")


def tied(keys) -> bool:
    """Whether a model says that its head is its table of embeddings."""
    return any(k.get("tie_word_embeddings", False) for k in (keys, Keys(keys.path, keys.get("text_config", {}))))


def read_json(path) -> dict:
    """A JSON object; LoadError names the file of anything else."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no keys")
    return content


TRANSFORMERS = ("llava", "llava_next", "fast_vlm", "deepstack_llava")


def _transformers(folder, keys):
    """Puts the keys of a transformers config under LLaVA's names; `(keys of the tower, of the image processor)`."""
    kind = keys["model_type"]
    keys.require("projector_hidden_act", "gelu")
    keys.require("multimodal_projector_bias", True)
    keys.require("use_image_newline_parameter", True)
    keys.require("vision_feature_select_strategy", "full" if kind == "fast_vlm" else "default")
    text = Keys(keys.path, keys.get("text_config", {}))
    text.require("model_type", "llama", "mistral")
    text.require("sliding_window")
    tower = Keys(keys.path, keys.get("vision_config", {}))
    tower.require("model_type", "convnext" if kind == "fast_vlm" else "clip_vision_model")
    if kind != "fast_vlm":
        tower.content = CLIP_DEFAULTS | tower.content
        tower.require("hidden_act", "quick_gelu")
    processor = _processor(folder)
    pieces = keys.get("image_token_index") or keys.get("image_token_id", 0)
    rows = text.get("vocab_size", LLAMA_DEFAULTS["vocab_size"])
    keys.content = (
        LLAMA_DEFAULTS
        | text.content
        | {
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": keys.get("vision_feature_layer", -1 if kind == "fast_vlm" else -2),
            "vocab_size": min(pieces, rows) or rows,  # the placeholder stands after the pieces, padding after it
        }
        | keys.content
    )
    if not isinstance(keys["mm_vision_select_layer"], int):
        raise LoadError(f"{keys.path}: vision_feature_layer names several layers; one is supported")
    if kind == "llava_next":
        pinpoints = [(width, height) for height, width in keys["image_grid_pinpoints"]]
        keys.content |= {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}
        keys.content["image_grid_pinpoints"] = pinpoints
    elif kind == "deepstack_llava" and processor is not None:
        keys.content |= {key: processor[key] for key in ("aspect", "tilings")}
    else:
        keys.content["image_aspect_ratio"] = _aspect(processor)
    return tower, processor


def _processor(folder):
    """The image processor's keys, wherever transformers 4 or 5 put them, or None."""
    apart, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    if apart.exists():
        return Keys(apart)
    if together.exists() and "image_processor" in (found := Keys(together)).content:
        return Keys(together, found["image_processor"])
    return None


def _aspect(processor):
    """How an image processor of transformers brings a picture to a square: our `data.aspect`."""
    if processor is not None and processor.get("do_pad", False):
        return "pad"
    return "square" if processor is None or processor.get("do_center_crop", False) else "stretch"


def tower_folder(folder, keys, vision):
    """Folder of the vision tower, or None: the one asked for, the one the config leads to, or the one beside it."""
    named = keys.get("mm_vision_tower", keys.get("vision_tower", ""))
    inside = [] if {"", ".."} & set(str(named).split("/")) else [folder / str(named)]  # a config leads nowhere else
    for choice in map(epath.Path, [vision] if vision else [*inside, folder / "vision_tower"]):
        if (choice / "config.json").exists():
            return choice
    if vision:
        raise FileNotFoundError(f"{vision} is no vision tower: it has no config.json")
    return None


def _tower(folder, keys, vision):
    """`(keys of the vision tower, keys of its image processor or None)`."""
    apart = tower_folder(folder, keys, vision)
    tower = Keys((apart or folder) / "config.json")
    named = keys.get("mm_vision_tower", keys.get("vision_tower", ""))
    if apart is None and "vision_config" not in keys.content:
        if named not in TOWERS:
            raise LoadError(
                f"{keys.path}: the vision tower '{named}' is neither a folder nor known; name its folder with vision="
            )
        tower.content = TOWERS[named]
    elif "vision_config" in tower.content:  # inside a whole CLIP model or a golden set
        tower.content = tower.content["vision_config"]
    return tower, next((p for f in (apart, folder) if f and (p := _processor(f))), None)


def _decoder(cfg, keys):
    keys.require("hidden_act", "silu")
    keys.require("rope_scaling")
    keys.require("attention_bias", False)
    rope = keys.get("rope_parameters", {})
    Keys(keys.path, rope).require("rope_type", "default")
    heads = keys["num_attention_heads"]
    cfg.model.decoder.update(
        vocab_size=keys["vocab_size"],
        width=keys["hidden_size"],
        depth=keys["num_hidden_layers"],
        heads=heads,
        kv_heads=keys.get("num_key_value_heads", heads),
        mlp_dim=keys["intermediate_size"],
        rope_theta=float(keys.get("rope_theta", rope.get("rope_theta", 10000.0))),
        norm_eps=float(keys.get("rms_norm_eps", 1e-6)),
    )
    keys.require("head_dim", keys["hidden_size"] // heads)


def _vision(cfg, tower, processor, keys):
    if "depths" in tower.content:
        tower.require("hidden_act", "gelu")
        tower.require("model_type", "convnext")
        c.use_encoder(cfg, "convnext")
        cfg.model.vision.update(
            image_size=tower["image_size"],
            patch_size=tower.get("patch_size", 4),
            depths=tuple(tower["depths"]),
            widths=tuple(tower["hidden_sizes"]),
        )
    else:
        tower.require("model_type", "clip_vision_model", "clip")
        tower.require("hidden_act", "quick_gelu")
        keys.require("mm_vision_select_feature", "patch")
        cfg.model.vision.update(
            image_size=tower["image_size"],
            patch_size=tower["patch_size"],
            width=tower["hidden_size"],
            depth=tower["num_hidden_layers"],
            heads=tower["num_attention_heads"],
            mlp_dim=tower["intermediate_size"],
            norm_eps=float(tower.get("layer_norm_eps", 1e-5)),
            level=keys.get("mm_vision_select_layer", -1),
        )
    if processor is None:
        return
    for key, clip in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        if not np.allclose(processor.get(key, clip), clip):
            raise LoadError(f"{processor.path}: {key} = {processor.get(key)} is not supported, CLIP's {clip} is")
    size = processor.get("crop_size", processor.get("size", cfg.model.vision.image_size))
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if cfg.model.encoder == "convnext":  # the processor alone says at what resolution ConvLLaVA works
        cfg.model.vision.image_size = size
    elif size != cfg.model.vision.image_size:
        raise LoadError(f"{processor.path}: pictures of {size} pixels for a tower of {cfg.model.vision.image_size}")


def _visual_layout(cfg, keys):
    """Which views there are and where their tokens go: see `data.visual_layout`."""
    vision, data = cfg.model.vision, cfg.data
    cfg.model.scales = tuple(keys.get("matryoshka_vis_token_scale", (make_encoder(cfg.model).grid ** 2,)))
    if keys.get("model_type") == "deepstack_llava":
        _exported_deepstack(cfg, keys)
        return
    keys.require("mm_use_im_start_end", False)
    keys.require("mm_use_im_patch_token", False)
    keys.require("image_aspect_ratio", "pad", "square", "anyres", "deepstack")
    aspect = keys.get("image_aspect_ratio", "square")
    if aspect == "deepstack":
        _deepstack(cfg, keys)
        return
    data.aspect = aspect
    if aspect == "anyres":
        keys.require("mm_patch_merge_type", "flat", "spatial", "spatial_unpad")
        merge = keys.get("mm_patch_merge_type", "flat")
        data.tilings = _pinpoints(keys, vision.image_size)
        data.sequence = {"flat": "flat", "spatial": "grid", "spatial_unpad": "unpad"}[merge]
        cfg.model.newline = merge == "spatial_unpad"


def _exported_deepstack(cfg, keys):
    """What `hf.deepstack.keys` and `preprocessor_keys` say."""
    cfg.data.update({key: keys[key] for key in ("aspect", "zoom", "sequence", "stacks", "sampling")})
    cfg.data.tilings = tuple((int(columns), int(rows)) for columns, rows in keys["tilings"])
    cfg.model.update({key: keys[key] for key in ("newline", "newline_in_stacks")})
    cfg.model.decoder.inject_layers = tuple(keys["inject_layers"])
    cfg.model.vision.regroup = tuple(keys["regroup"])


def _pinpoints(keys, size):
    found = keys["image_grid_pinpoints"]
    try:
        found = ast.literal_eval(found) if isinstance(found, str) else found
        pairs = [(int(width), int(height)) for width, height in found]
    except (ValueError, SyntaxError, TypeError):
        raise LoadError(f"{keys.path}: image_grid_pinpoints = {found!r} is no list of (width, height)") from None
    if any(side % size for pair in pairs for side in pair):
        raise LoadError(f"{keys.path}: image_grid_pinpoints {pairs} are not multiples of {size} pixels")
    return tuple((width // size, height // size) for width, height in pairs)


# What the words of deepstack_args_for_ablation make of the sequence and of the stacks.
ABLATIONS = {
    "dummy_local": {"stacks": "copies"},
    "only_global_features": {"stacks": "whole", "sequence": "blank", "tilings": ()},
    "global_and_local": {"stacks": "whole+samples", "sequence": "blank"},
    "string_woglobal": {"stacks": "", "sequence": "samples"},
    "string_withglobal": {"stacks": "", "sequence": "whole+samples"},
}


def _deepstack(cfg, keys):
    data, crops = cfg.data, keys.get("num_crops", 4)
    side = math.isqrt(crops)
    words = [word for word in keys.get("deepstack_args_for_ablation", "").split("+") if word]
    keys.require("deepstack_sampling", "2d", "1d", "grid")
    data.update(aspect="stretch", sequence="whole", stacks="samples", sampling=keys.get("deepstack_sampling", "2d"))
    data.tilings = tuple(deepstack_tilings(crops))
    start, into_vit = None, False
    for word in words:
        if word == "2xsample":
            data.tilings = ((side, side),)
        elif word in ("inconsistent", "anyres_unpad"):
            data.aspect = "anyres"
        elif word == "deepstack_vit":
            into_vit = True
        elif word.startswith("lsvit_start_layer_"):
            start = int(word.rsplit("_", 1)[1])
        elif word in ABLATIONS:
            data.update(ABLATIONS[word])
        else:
            raise LoadError(f"{keys.path}: deepstack_args_for_ablation has '{word}', which is not supported")
    if into_vit:
        if start is None or data.tilings != ((side, side),):
            raise LoadError(f"{keys.path}: deepstack_vit needs the words 2xsample and lsvit_start_layer_N beside it")
        cfg.model.vision.regroup, data.stacks = (start, side), "encoder"
        return
    stacks = {"copies": crops, "whole": 1, "whole+samples": 1 + crops, "samples": crops, "": 0}[data.stacks]
    if data.tilings == ((side, side),):
        stacks -= crops - side**2
    if keys.get("is_anyres_deepstack", False):
        data.update(sequence="grid", stacks="zoom", zoom=side)
        cfg.model.newline, stacks = True, side**2
    first, step = keys.get("deepstack_start_id", 1), keys.get("deepstack_interval", 1)
    cfg.model.decoder.inject_layers = tuple(first + k * step for k in range(stacks))
