"""Configs of models that others trained, read into ours: what a model is stands in its `config.json`.

Two kinds of layout are known: the original one of LLaVA's code, in which LLaVA-1.5, -1.6, M3, ConvLLaVA and DeepStack
are released, and that of transformers. What they are called and what they fix is asked of `lmm_jax.families`.
"""

import ast
import json

from etils import epath

from lmm_jax import config as c
from lmm_jax import families
from lmm_jax.data.conversation import find_template, template_for
from lmm_jax.families import ORIGINAL
from lmm_jax.hf.stacking import WORDS, read_stacking
from lmm_jax.models.encoders import make_encoder

TEMPLATE_KEY = "lmm_jax_template"  # in which we write the template of a model, which no other layout says
TASK_KEY = "lmm_jax_task"  # and the task that the data of its training belong to, if that is known


class LoadError(ValueError):
    """A folder that is no model we can read; the message names the file, key or tensors."""


def is_model(folder) -> bool:
    """Whether a folder's `config.json` is of a published model, and not that of a workdir of ours."""
    path = epath.Path(folder) / "config.json"
    return path.exists() and "model_type" in read_json(path)


def read_task(folder) -> str:
    """Name of the task that the data of a model's training belong to, as `lmm export` wrote it; "" if there is none.

    Raises:
      LoadError: what stands there is no name.
    """
    keys = Keys(epath.Path(folder) / "config.json")
    task = keys.get(TASK_KEY, "")
    if not isinstance(task, str):
        raise keys.error(f"{TASK_KEY} = {task!r} is no name of a task")
    return task


def read_model_config(folder, vision=None):
    """Our config of a model.

    Args:
      folder: with `config.json` and a tokenizer.
      vision: folder of the vision tower, where it lies apart and the config does not lead to it.

    Raises:
      LoadError: a model of another kind, a key whose value we cannot reproduce, or a tower that cannot be found; the
        message names it.
    """
    folder = epath.Path(folder)
    try:
        config = _read_model_config(folder, vision)
        c.check_model(config)
    except LoadError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # of values that nobody expects
        raise LoadError(
            f"{folder / 'config.json'} is not that of a sound model: {' '.join(str(error).split())}"
        ) from error
    return config.lock()


def _read_model_config(folder, vision):
    """See `read_model_config`; raises all kinds of errors where values are of another type."""
    keys = Keys(folder / "config.json")
    whole = next((w for w in families.WHOLES.values() if w.model_type == keys.get("model_type")), None)
    if ORIGINAL.told_by in keys.content:
        whole, decoder = None, families.DECODERS[families.DEFAULT_DECODER]
        tower, processor = _tower(folder, keys, vision)
    elif whole is not None:
        decoder, tower, processor = _transformers(folder, keys, whole)
    else:
        raise keys.error(
            f"model_type '{keys.get('model_type')}' is not supported: neither the original layout (no "
            f"{ORIGINAL.told_by}) nor {', '.join(w.model_type for w in families.WHOLES.values())}"
        )
    config = c.base()
    stored = keys.get("torch_dtype") or keys.get("dtype", "float32")
    config.model.dtype = {"float16": "bfloat16"}.get(stored, stored)
    _decoder(config, keys, decoder)
    _vision(config, tower, processor, keys)
    kind = keys.get(ORIGINAL.told_by, "linear")
    depth = {"linear": 1, **{f"mlp{n}x_gelu": n for n in range(1, 9)}}.get(kind)
    if depth is None:
        raise keys.error(f"{ORIGINAL.told_by} '{kind}' is not supported; linear and mlpNx_gelu are")
    config.model.projector.depth = depth
    whole_grid = (make_encoder(config.model).grid ** 2,)
    config.model.scales = tuple(keys.get(ORIGINAL.keys["scales"], whole_grid))
    if whole is None:
        _original_layout(config, keys)
    else:
        _layout_of(whole, config, keys, processor)
    config.data.template = _template(keys)
    config.data.length = keys.get(ORIGINAL.keys["length"]) or keys.get("max_position_embeddings", 2048)
    return config


def _template(keys):
    named = keys.get(TEMPLATE_KEY)
    if named is None:
        return template_for(keys.content)
    try:
        find_template(named)
    except ValueError as error:
        raise keys.error(f"{TEMPLATE_KEY} '{named}': {error}") from error
    return named


class Keys:
    """The keys of a `config.json` or of a part of it, and the file for messages."""

    def __init__(self, path, content=None):
        if content is None and not path.exists():
            raise FileNotFoundError(f"{path.parent} is no model: it has no {path.name}")
        self.path, self.content = path, read_json(path) if content is None else content
        if not isinstance(self.content, dict):
            raise LoadError(f"{path}: a part of it is {self.content!r}, where keys are expected")

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
            known = [x for x in allowed if x is not None]
            can = f"{' or '.join(map(repr, known))} is" if known else "nothing is"
            raise self.error(f"{key} = {value!r} is not supported, {can}")

    def error(self, words):
        """A LoadError that names the file."""
        return LoadError(f"{self.path}: {words}")


def tied(keys) -> bool:
    """Whether a model says that its head is its table of embeddings."""
    return any(k.get("tie_word_embeddings", False) for k in (keys, Keys(keys.path, keys.get("text_config", {}))))


def read_json(path) -> dict:
    """A JSON object; LoadError names the file of anything else."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} holds no keys")
    return content


def _transformers(folder, keys, whole):
    """Puts the keys of a transformers config under the original names.

    Returns:
      the family of the decoder, the keys of the tower, and those of the image processor or None.
    """
    readable = [family for family in families.DECODERS.values() if family.tensors]
    text = Keys(keys.path, keys.get("text_config", {}))
    text.require("model_type", *(kind for family in readable for kind in family.model_types))
    decoder = next((f for f in readable if text.get("model_type") in f.model_types), None)
    decoder = decoder or families.DECODERS[families.DEFAULT_DECODER]
    tower = Keys(keys.path, keys.get("vision_config", {}))
    encoders = [families.ENCODERS[name] for name in whole.encoders]
    tower.require("model_type", *(kind for family in encoders for kind in family.model_types))
    encoder = next((f for f in encoders if tower.get("model_type") in f.model_types), encoders[0])
    tower.content = {"model_type": encoder.model_types[0]} | tower.content
    for key, allowed in whole.constants.items():
        keys.require(key, *allowed)
    keys.require("vision_feature_select_strategy", select_strategy(encoder))
    processor = _processor(folder)
    pieces = keys.get("image_token_index") or keys.get("image_token_id", 0)
    rows = text.get("vocab_size", decoder.defaults["vocab_size"])
    keys.content = (
        decoder.defaults
        | text.content
        | {
            ORIGINAL.told_by: "mlp2x_gelu",
            ORIGINAL.keys["level"]: keys.get("vision_feature_layer", whole.level),
            "vocab_size": min(pieces, rows) or rows,  # the placeholder stands after the pieces, padding after it
        }
        | keys.content
    )
    if not isinstance(keys[ORIGINAL.keys["level"]], int):
        raise keys.error("vision_feature_layer names several layers; one is supported")
    return decoder, tower, processor


def select_strategy(encoder) -> str:
    """What transformers calls leaving out the class token, or having none."""
    return "default" if encoder.class_token else "full"


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


def _named_tower(keys):
    """What an original layout says that its vision tower is."""
    return keys.get(ORIGINAL.keys["tower"], keys.get(ORIGINAL.keys["tower, by other code"], ""))


def tower_folder(folder, keys, vision):
    """Folder of the vision tower, or None: the one asked for, the one the config leads to, or the one beside it."""
    named = str(_named_tower(keys))
    inside = [] if {"", ".."} & set(named.split("/")) else [folder / named]  # a config leads nowhere else
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
    if apart is None and "vision_config" not in keys.content:
        named = _named_tower(keys)
        known = [family.towers[named] for family in families.ENCODERS.values() if named in family.towers]
        if not known:
            raise keys.error(
                f"the vision tower '{named}' is neither a folder nor known; name its folder with vision="
            )
        tower.content = known[0]
    elif "vision_config" in tower.content:  # inside a whole model of pictures and text, or a golden set
        tower.content = tower.content["vision_config"]
    return tower, next((p for f in (apart, folder) if f and (p := _processor(f))), None)


def _decoder(config, keys, family):
    for key, allowed in family.constants.items():
        keys.require(key, *allowed)
    rope = keys.get("rope_parameters", {})
    Keys(keys.path, rope).require("rope_type", "default")
    of = family.keys
    heads = keys[of["heads"]]
    fields = {field: keys[of[field]] for field in ("vocab_size", "width", "depth", "heads", "mlp_dim")}
    fields |= {
        "kv_heads": keys.get(of["kv_heads"], heads),
        "rope_theta": float(keys.get(of["rope_theta"], rope.get("rope_theta", 10000.0))),
        "norm_eps": float(keys.get(of["norm_eps"], family.defaults[of["norm_eps"]])),
    }
    head_dim = keys.get("head_dim", 0)
    if head_dim and head_dim * heads != fields["width"]:
        fields["head_dim"] = head_dim
    config.model.families.decoder = family.name
    config.model.decoder.update(dict(family.fields) | fields)


def _vision(config, tower, processor, keys):
    kind, known = tower.get("model_type"), families.ENCODERS.values()
    told = [f for f in known if (kind in f.model_types if kind else f.told_by in tower.content)]
    if not told:
        names = [repr(name) for f in known for name in f.model_types]
        raise tower.error(f"model_type = {kind!r} is not supported, {' or '.join(names)} is")
    family = told[0]
    for key, allowed in family.constants.items():
        tower.require(key, *allowed)
    keys.require("mm_vision_select_feature", *ORIGINAL.constants["mm_vision_select_feature"])
    c.use_family(config, family.name)
    vision = config.model.vision
    for field, key in family.keys.items():
        value = family.defaults[key] if key in family.defaults and key not in tower.content else tower[key]
        vision[field] = tuple(value) if isinstance(value, list) else type(vision[field])(value)
    if family.level:
        vision[family.level[0]] = keys.get(ORIGINAL.keys["level"], -1)
    if processor is None:
        return
    for field, key in (("mean", "image_mean"), ("std", "image_std")):
        vision[field] = _colour(processor, key, vision[field])
    size = processor.get("crop_size", processor.get("size", vision.image_size))
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if make_encoder(config.model).any_shape:  # the processor alone says at what resolution it works
        vision.image_size = size
    elif size != vision.image_size:
        raise processor.error(f"pictures of {size} pixels for a tower of {vision.image_size}")


def _colour(processor, key, usual):
    """Three numbers of an image processor, those of the family where it says none."""
    found = processor.get(key, usual)
    good = isinstance(found, list | tuple) and len(found) == 3 and all(isinstance(x, int | float) for x in found)
    if not good or (key == "image_std" and min(found) <= 0):
        raise processor.error(f"{key} = {found!r} is not supported, three numbers are")
    return tuple(map(float, found))


def _original_layout(config, keys):
    """Which views there are and where their tokens go, as an original layout says it: see `data.visual_layout`."""
    for key, allowed in ORIGINAL.constants.items():
        keys.require(key, *allowed)
    aspect_key, merge_key = ORIGINAL.keys["aspect"], ORIGINAL.keys["merge"]
    keys.require(aspect_key, "pad", "square", "anyres", WORDS.aspect)
    aspect = keys.get(aspect_key, "square")
    if aspect == WORDS.aspect:
        read_stacking(config, keys)
        return
    config.data.aspect = aspect
    if aspect == "anyres":
        keys.require(merge_key, *ORIGINAL.merges)
        config.data.sequence = ORIGINAL.merges[keys.get(merge_key, next(iter(ORIGINAL.merges)))]
        config.data.tilings = _tilings(keys, ORIGINAL.keys["tilings"], config.model.vision.image_size)
        config.model.newline = config.data.sequence == "unpad"


def _layout_of(whole, config, keys, processor):
    """Which views there are and where their tokens go, as a family of transformers' classes says it."""
    if not (whole.read_as or whole.fields):
        config.data.aspect = _aspect(processor)
    for field, value in whole.read_as.items():
        _set(config, field, value)
    if whole.tilings_key:
        size = config.model.vision.image_size
        config.data.tilings = tuple((w, h) for h, w in _tilings(keys, whole.tilings_key, size))
    for fields, of in ((whole.fields, keys), (whole.picture_fields, processor or keys)):
        for key, field in fields.items():
            _set(config, field, _tuples(of[key]))


def _set(config, field, value):
    *parents, leaf = field.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[leaf] = value


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _tilings(keys, key, size):
    """The two sides of each tiling in tiles, from a list of pairs of pixels."""
    found = keys[key]
    try:
        found = ast.literal_eval(found) if isinstance(found, str) else found
        pairs = [(int(first), int(second)) for first, second in found]
    except (ValueError, SyntaxError, TypeError):
        raise keys.error(f"{key} = {found!r} is no list of (width, height)") from None
    if any(side % size for pair in pairs for side in pair):
        raise keys.error(f"{key} {pairs} are not multiples of {size} pixels")
    return tuple((first // size, second // size) for first, second in pairs)
