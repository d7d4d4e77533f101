"""Models that others trained: LLaVA's original layout, as LLaVA-1.5 and -1.6, M3, ConvLLaVA and DeepStack release it.

What a model is stands in its `config.json` (and that of its vision tower), never in a folder's name. A folder is
read whole or not at all: whatever is missing, unexpected or of another shape is listed, and nothing is loaded.
"""

import ast
import json
import math

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import config as c
from lmm_jax.data.conversation import template_for
from lmm_jax.data.views import deepstack_tilings
from lmm_jax.hf.names import CONVNEXT_PREFIX, VIT_PREFIX, ignored, tensors
from lmm_jax.hf.safetensors import Folder
from lmm_jax.models.vit import ViT

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


class LoadError(ValueError):
    """A folder that is no model we can read; the message names the file, key or tensors."""


def is_original(folder) -> bool:
    """Whether a folder's `config.json` is one of LLaVA's original layout."""
    path = epath.Path(folder) / "config.json"
    return path.exists() and "mm_projector_type" in _json(path)


def read_config(folder, vision=None):
    """Our config of a model in the original layout.

    Args:
      folder: with `config.json` and `tokenizer.model`.
      vision: folder of the vision tower, where it lies apart and the config does not lead to it.

    Raises:
      LoadError: a key whose value we cannot reproduce, or a tower that cannot be found; the message names it.
    """
    folder = epath.Path(folder)
    keys = _Keys(folder / "config.json")
    tower, processor = _tower(folder, keys, vision)
    cfg = c.base()
    cfg.model.dtype = {"float16": "bfloat16"}.get(
        keys.get("torch_dtype", "float32"), keys.get("torch_dtype", "float32")
    )
    _decoder(cfg, keys)
    _vision(cfg, tower, processor, keys)
    kind = keys.get("mm_projector_type", "linear")
    depth = {"linear": 1, **{f"mlp{n}x_gelu": n for n in range(1, 9)}}.get(kind)
    if depth is None:
        raise LoadError(f"{keys.path}: mm_projector_type '{kind}' is not supported; linear and mlpNx_gelu are")
    cfg.model.projector.depth = depth
    _arrangement(cfg, keys)
    cfg.data.template = template_for(keys.content)
    cfg.data.length = keys.get("tokenizer_model_max_length") or keys.get("max_position_embeddings", 2048)
    return cfg.lock()


def load_params(folder, model, abstract, vision=None):
    """Reads a model's parameters, tensor by tensor, each to the devices that hold it.

    Args:
      folder: of the model.
      model: the `LMM` that `read_config` describes.
      abstract: our parameters as `ShapeDtypeStruct`s with shardings.
      vision: as for `read_config`.

    Returns:
      the parameters, and a dict of the tensors that were not read: name to reason.

    Raises:
      LoadError: every tensor that is missing, unexpected or of another shape.
    """
    folder = epath.Path(folder)
    found = _Tensors(folder, model, _tower_folder(folder, _Keys(folder / "config.json"), vision))
    flat = flatten_dict(abstract, sep="/")
    wanted = tensors(model, {path: x.shape for path, x in flat.items()})
    vocabulary = model.decoder.vocab_size
    skipped, faults, expected = {}, [], set()
    for tensor in wanted:
        expected.add(tensor.name)
        theirs = found.shapes.get(tensor.name)
        if theirs is None:
            faults.append(f"missing {tensor.name} {tensor.shape}")
        elif theirs != _unpadded(tensor, vocabulary):
            faults.append(f"{tensor.name} is {theirs}, expected {_unpadded(tensor, vocabulary)}")
    for name in sorted(found.shapes.keys() - expected):
        why = ignored(name) or _unused(name, model)
        if why:
            skipped[name] = why
        else:
            faults.append(f"unexpected {name} {found.shapes[name]}")
    if faults:
        listed = "\n  ".join(faults[:40] + [f"… and {len(faults) - 40} more"] * (len(faults) > 40))
        raise LoadError(f"{folder}: {len(faults)} tensors do not fit, nothing was loaded\n  {listed}")
    by_path = {}
    for tensor in wanted:
        by_path.setdefault(tensor.path, []).append(tensor)
    return unflatten_dict({p: _array(found, by_path[p], x) for p, x in flat.items()}, sep="/"), skipped


def _array(found, parts, abstract):
    """One parameter of ours, of which each device is given its part."""

    def read(tensor):
        array = found.read(tensor.name)
        rows = tensor.shape[0] - array.shape[0] if tensor.path.startswith("decoder/") else 0
        if rows:  # the vocabulary, padded
            array = np.pad(array, ((0, rows), (0, 0)))
        return tensor.to_ours(array, abstract.shape[tensor.layer is not None :]).astype(abstract.dtype)

    def part(index):
        if parts[0].layer is None:
            return read(parts[0])[index]
        return np.stack([read(tensor)[index[1:]] for tensor in parts[index[0]]])

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)


def _unpadded(tensor, vocabulary):
    """Their shape of a tensor; the tables of ours have more rows than there are pieces."""
    return (
        (vocabulary, *tensor.shape[1:]) if tensor.path in ("decoder/table", "decoder/head/kernel") else tensor.shape
    )


def _unused(name, model):
    """Why this model in particular does not read a tensor, or None."""
    if name == "model.image_newline" and not model.newline:
        return "this recipe has no newline"
    blocks = VIT_PREFIX + "encoder.layers."
    if name.startswith(blocks) and model.vision.level < -1:
        number = int(name.removeprefix(blocks).split(".")[0])
        if model.vision.depth + 1 + model.vision.level <= number < model.vision.depth:
            return f"past the hidden state {model.vision.level} that is read"
    return None


class _Tensors:
    """The tensors of a folder and, if it has none of the vision tower's, those of the tower's own folder.

    Attributes:
      shapes: name, as in one folder, to shape.
    """

    def __init__(self, folder, model, tower):
        main = Folder(folder)
        self._home = {name: (main, name) for name in main.shapes}
        if tower is not None and not any(name.startswith(CONVNEXT_PREFIX) for name in main.shapes):
            apart = Folder(tower)
            is_vit = isinstance(model.vision, ViT)
            for name in apart.shapes:
                if not is_vit or name.startswith("vision_model."):  # CLIP's text model is beside it
                    self._home[CONVNEXT_PREFIX + name.removeprefix("convnext.")] = (apart, name)
        self.shapes = {name: source.shapes[own] for name, (source, own) in self._home.items()}

    def read(self, name):
        source, own = self._home[name]
        return source.read(own)


class _Keys:
    """The keys of a `config.json`, and the file for messages."""

    def __init__(self, path):
        if not path.exists():
            raise FileNotFoundError(f"{path.parent} is no model: it has no {path.name}")
        self.path, self.content = path, _json(path)

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


def _json(path):
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no keys")
    return content


def _tower_folder(folder, keys, vision):
    """Folder of the vision tower, or None: the one asked for, the one the config leads to, or the one beside it."""
    named = keys.get("mm_vision_tower", keys.get("vision_tower", ""))
    choices = [vision] if vision else [folder / str(named), folder / "vision_tower"]
    for choice in map(epath.Path, choices):
        if choice != folder and (choice / "config.json").exists():
            return choice
    if vision:
        raise FileNotFoundError(f"{vision} is no vision tower: it has no config.json")
    return None


def _tower(folder, keys, vision):
    """`(keys of the vision tower, keys of its image processor or None)`."""
    apart = _tower_folder(folder, keys, vision)
    tower = _Keys((apart or folder) / "config.json")
    named = keys.get("mm_vision_tower", keys.get("vision_tower", ""))
    if apart is None and "vision_config" not in keys.content:
        if named not in TOWERS:
            raise LoadError(
                f"{keys.path}: the vision tower '{named}' is neither a folder nor known; name its folder with vision="
            )
        tower.content = TOWERS[named]
    elif "vision_config" in tower.content:  # inside a whole CLIP model or a golden set
        tower.content = tower.content["vision_config"]
    processor = next((p for f in (apart, folder) if f and (p := f / "preprocessor_config.json").exists()), None)
    return tower, _Keys(processor) if processor else None


def _decoder(cfg, keys):
    keys.require("hidden_act", "silu")
    keys.require("rope_scaling")
    keys.require("attention_bias", False)
    keys.require("tie_word_embeddings", False)
    rope = keys.get("rope_parameters", {})
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
        c.use_convnext(cfg)
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


def _arrangement(cfg, keys):
    """Which views there are and where their tokens go: see `data.arrangement`."""
    vision, data = cfg.model.vision, cfg.data
    stride = vision.patch_size * (2 ** (len(vision.depths) - 1) if cfg.model.encoder == "convnext" else 1)
    cfg.model.scales = tuple(keys.get("matryoshka_vis_token_scale", ((vision.image_size // stride) ** 2,)))
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
