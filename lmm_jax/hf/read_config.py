"""Configs of models that others trained, read into ours: what a model is stands in its `config.json`.

Two kinds of layout are known: the original one of LLaVA's code, in which LLaVA-1.5, -1.6, M3, ConvLLaVA and DeepStack
are released, and that of transformers. What they are called and what they fix is asked of `lmm_jax.families`.
"""

import ast
import math
import re

from etils import epath

from lmm_jax import config as c
from lmm_jax import families, strict_json
from lmm_jax.data.conversation import find_template, stored_template, template_for
from lmm_jax.data.tokenizer import find_kind
from lmm_jax.data.views import longest_tilings
from lmm_jax.data.visual_layout import MOST_SHRINK
from lmm_jax.families import ORIGINAL
from lmm_jax.families.kinds import MOST_SIDE
from lmm_jax.hf import key_ranges
from lmm_jax.hf.names import encoder_family
from lmm_jax.hf.rope import read_axes, read_rope, rope_keys
from lmm_jax.hf.stacking import WORDS, read_stacking
from lmm_jax.models.encoders import make_encoder

TEMPLATE_KEY = "lmm_jax_template"  # in which we write the template of a model, which no other layout says
LEVEL_KEY = "vision_feature_layer"  # of transformers: which hidden state of the encoder is read
IMAGE_KEYS = ("image_token_index", "image_token_id")  # the placeholder's id, in either dialect
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
    keys.hold({TASK_KEY: key_ranges.NAME})
    return keys.get(TASK_KEY, "")


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
    whole = find_whole(keys)
    encoder = families.ENCODERS[whole.encoders[0]].encoder if whole else c.base().model.encoder
    keys.hold(key_ranges.of_model(whole, encoder))
    if "quantization_config" in keys.content:
        raise keys.error("quantization_config: weights that are quantised are not read; save the model without it")
    dtype = COMPUTED[read_stored_dtype(folder)]
    if ORIGINAL.told_by in keys.content:
        whole, decoder, text = None, families.DECODERS[families.DEFAULT_DECODER], keys
        text.hold(key_ranges.of_decoder(decoder))
        tower, processor = _tower(folder, keys, vision)
    elif whole is not None:
        decoder, text, tower, processor = _transformers(folder, keys, whole)
    else:
        raise keys.error(
            f"model_type '{keys.get('model_type')}' is not supported: neither the original layout (no "
            f"{ORIGINAL.told_by}) nor {', '.join(w.model_type for w in families.WHOLES.values())}"
        )
    if processor is not None:
        processor.hold(key_ranges.of_processor(whole, encoder))
    config = c.base()
    config.model.dtype = dtype
    _decoder(config, text, decoder)
    config.model.decoder.tied = tied(keys)
    _vision(config, tower, processor, keys, whole)
    if processor is not None:
        if whole is None:
            classes, constants = (encoder_family(config.model).image_processor,), ORIGINAL.picture_constants
        else:
            classes, constants = whole.image_processors.values(), whole.picture_constants
        _check_processor(processor, classes, constants)
    kind = keys.get(ORIGINAL.told_by, "linear")
    depth = {"linear": 1, **{f"mlp{n}x_gelu": n for n in range(1, 9)}}.get(kind)
    if depth is None:
        raise keys.error(f"{ORIGINAL.told_by} '{kind}' is not supported; linear and mlpNx_gelu are")
    config.model.projector.depth = depth
    if whole is not None and whole.projector:
        _projector(config, whole, tower, keys)
    side, factors = make_encoder(config.model).grid, config.model.projector.shuffle
    of_paths = sorted((side // factor) ** 2 for factor in factors)
    config.model.scales = tuple(keys.get(ORIGINAL.keys["scales"], of_paths))
    config.data.length = keys.get(ORIGINAL.keys["length"]) or text.get("max_position_embeddings", 2048)
    check_window(text, decoder, config.data.length)
    if whole is None:
        _original_layout(config, keys, processor)
    elif processor is None:
        raise LoadError(
            f"{folder} has neither preprocessor_config.json nor processor_config.json with an image_processor: "
            "nothing says how pictures become pixels (padded, cropped or stretched, and with which mean): copy the "
            "file from the model that this one was made of, or save its processor into the folder"
        )
    else:
        _layout_of(whole, config, keys, processor)
    if config.model.decoder.multipliers and not getattr(whole, "divides_logits", True):
        config.model.decoder.multipliers = (*config.model.decoder.multipliers[:3], 1.0)
    config.data.template = _template(keys)
    return config


# In what a model computes by default, by what its numbers are stored in: bfloat16 would lose three bits of float16,
# and of float64 float32 is the most that is computed here.
COMPUTED = {"bfloat16": "bfloat16", "float16": "float32", "float32": "float32", "float64": "float32"}


def read_stored_dtype(folder) -> str:
    """The type that a model's `config.json` says its parameters are stored in, "float32" if it says nothing.

    Raises:
      LoadError: a type that is not read.
    """
    keys = Keys(epath.Path(folder) / "config.json")
    key = "torch_dtype" if keys.get("torch_dtype") is not None else "dtype"
    stored = keys.get(key, "float32")
    if stored not in COMPUTED:
        raise keys.error(f"{key} = {stored!r} is not supported, {' or '.join(map(repr, COMPUTED))} is")
    return stored


def check_window(keys, family, length):
    """Raises LoadError for layers that do not see all of a row; a window no shorter than a row does.

    Args:
      keys: of the decoder.
      family: of the decoder.
      length: positions of a row.
    """
    window, kinds = keys.content.get(family.window), keys.get("layer_types", ())
    if family.window_switch and not keys.get(family.window_switch, False):
        window = None
    wrong = set(kinds) - {"full_attention", *(() if window is None else ("sliding_attention",))}
    if wrong:
        raise keys.error(f"layer_types = {kinds!r}: {' and '.join(map(repr, sorted(wrong)))} is not supported")
    if window is None:
        return
    if not isinstance(window, int) or window < length:
        raise keys.error(
            f"{family.window} = {window!r} is not supported where a row has {length} positions, a window no shorter "
            f"than that or null is; up to {window} positions the model computes the same without one: for those, set "
            f"max_position_embeddings (or {ORIGINAL.keys['length']}) to {window}, or data.length of a run"
        )


def _template(keys):
    named = keys.get(TEMPLATE_KEY)
    if named is None:
        return template_for(keys.content)
    named = stored_template(named, keys.content)
    try:
        find_template(named)
    except ValueError as error:
        raise keys.error(f"{TEMPLATE_KEY} '{named}': {error}") from error
    return named


class Keys:
    """The keys of a `config.json` or of a part of it, and for messages the file and the key that holds the part."""

    def __init__(self, path, content=None, part=""):
        if content is None and not path.exists():
            raise FileNotFoundError(f"{path.parent} is no model: it has no {path.name}")
        self.path, self.content, self.part = path, read_json(path) if content is None else content, part
        if not isinstance(self.content, dict):
            where = part or "a part of it"
            raise LoadError(f"{path}: {where} is {strict_json.shown(self.content)}, where keys are expected")

    def __getitem__(self, key):
        if self.content.get(key) is None:
            raise LoadError(f"{self.path} has no '{self._name(key)}'")
        return self.content[key]

    def get(self, key, default=None):
        value = self.content.get(key)
        return default if value is None else value

    def require(self, key, *allowed):
        """Raises LoadError for a key whose value is none of those that we reproduce; missing ones are fine."""
        value = self.content.get(key)
        if value is not None and value not in allowed:
            known = [x for x in allowed if x is not None]
            can = f"{' or '.join(map(repr, known))} is" if known else "only a model without it is"
            raise self.error(f"{self._name(key)} = {value!r} is not supported, {can}")

    def hold(self, ranges):
        """Raises LoadError for a key whose value is not in its range, see `lmm_jax.hf.key_ranges`."""
        if fault := strict_json.fault(self.content, ranges, self.part):
            raise self.error(fault)

    def inner(self, key):
        """The keys of a part of these, none if there is no such part."""
        return Keys(self.path, self.get(key, {}), self._name(key))

    def error(self, words):
        """A LoadError that names the file."""
        return LoadError(f"{self.path}: {words}")

    def _name(self, key):
        return f"{self.part}.{key}" if self.part else key


def tied(keys) -> bool:
    """Whether a model says that its head is its table of embeddings.

    Raises:
      LoadError: it says something else than true or false.
    """
    for part in (keys, keys.inner("text_config")):
        part.hold(key_ranges.TIED)
    return any(k.get("tie_word_embeddings", False) for k in (keys, keys.inner("text_config")))


def read_json(path) -> dict:
    """A JSON object; LoadError names the file of anything else."""
    try:
        return strict_json.read_object(path)
    except ValueError as error:
        raise LoadError(str(error)) from error


def _transformers(folder, keys, whole):
    """Puts the keys of a transformers config under the original names.

    Returns:
      the family of the decoder, its keys, those of the tower, and those of the image processor or None.
    """
    readable = [family for family in families.DECODERS.values() if family.tensors and made_with(whole, family)]
    if IMAGE_KEYS[1] in keys.content:
        keys.content = {IMAGE_KEYS[0]: keys.content[IMAGE_KEYS[1]]} | keys.content
    keys.content = dict(whole.defaults) | keys.content
    text, tower = keys.inner("text_config"), keys.inner("vision_config")
    text.require("model_type", *(kind for family in readable for kind in family.model_types))
    decoder = next((f for f in readable if text.get("model_type") in f.model_types), None)
    decoder = decoder or families.DECODERS[whole.decoders[0] if whole.decoders else families.DEFAULT_DECODER]
    encoders = [families.ENCODERS[name] for name in whole.encoders]
    tower.require("model_type", *(kind for family in encoders for kind in family.model_types))
    encoder = next((f for f in encoders if tower.get("model_type") in f.model_types), encoders[0])
    tower.content = {"model_type": encoder.model_types[0]} | tower.content
    text.hold(key_ranges.of_decoder(decoder))
    tower.hold(key_ranges.of_encoder(encoder))
    if whole.projector:
        for part in (keys, tower):
            part.hold(key_ranges.of_projector(families.PROJECTORS[whole.projector]))
    for key, allowed in whole.constants.items():
        keys.require(key, *allowed)
    keys.require("vision_feature_select_strategy", select_strategy(encoder))
    pieces = keys.get(IMAGE_KEYS[0], 0)
    rows = text.get("vocab_size", decoder.defaults["vocab_size"])
    if whole.inside or find_kind(folder, decoder.tokenizer) == "huggingface":
        pieces = 0  # its tokenizer has the placeholder among its own
    if pieces > rows:
        raise keys.error(f"{IMAGE_KEYS[0]} = {pieces} is not supported where text_config.vocab_size is {rows}")
    # The placeholder stands after the pieces, padding after it.
    text.content = decoder.defaults | text.content | {"vocab_size": min(pieces, rows) or rows}
    level = keys.get(LEVEL_KEY, whole.level)
    keys.content = {ORIGINAL.told_by: "mlp2x_gelu", ORIGINAL.keys["level"]: level} | keys.content
    tower.require("num_channels", 3)
    for key, field in encoder.counts.items():
        tower.require(key, len(tower[encoder.keys[field]]))
    for key, field in encoder.lasts.items():
        tower.require(key, tower[encoder.keys[field]][-1])
    for key in encoder.positives:
        if tower.get(key, 1) <= 0:
            raise tower.error(f"{key} = {tower[key]!r} is not supported, a number above 0 is")
    processor = read_processor(folder)
    if processor is not None:
        said = {key: x for key, x in processor.content.items() if x is not None}
        processor.content = processor.content | dict(whole.picture_defaults) | said
    return decoder, text, tower, processor


def _level(keys, depth):
    """Which hidden state of the encoder is read, counted from the last one, -1, as our config counts.

    Theirs may also count from the first one, 0, which is what goes into the first block.

    Args:
      keys: of the whole model.
      depth: blocks of the encoder.

    Raises:
      LoadError: several hidden states, none, or one that is not behind a block.
    """
    key = next((k for k in (LEVEL_KEY, ORIGINAL.keys["level"]) if k in keys.content), LEVEL_KEY)
    value = keys.get(key, -1)
    number = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(number, list):
        raise keys.error(
            f"{key} = {value!r} names several layers, which are put side by side before the projector; no model here "
            "does that, and one number is supported, or a list of one"
        )
    if not isinstance(number, int) or isinstance(number, bool) or not (0 < abs(number) <= depth):
        raise keys.error(
            f"{key} = {value!r} is no hidden state behind one of the {depth} blocks of the encoder: 1 to {depth}, or "
            f"-{depth} to -1, is supported"
        )
    return number - (depth + 1) if number > 0 else number


def find_whole(keys) -> families.kinds.Whole | None:
    """The family of whole models of transformers that the keys of a `config.json` are of."""
    return next((w for w in families.WHOLES.values() if w.model_type == keys.get("model_type")), None)


def made_with(whole, decoder) -> bool:
    """Whether a family of whole models is made with a family of decoders, see `families.kinds.Whole.decoders`."""
    of_others = {name for other in families.WHOLES.values() for name in other.decoders}
    return decoder.name in whole.decoders if whole.decoders else decoder.name not in of_others


def select_strategy(encoder) -> str:
    """What transformers calls leaving out the class token, or having none."""
    return "default" if encoder.class_token else "full"


def read_processor(folder):
    """The keys of a folder's image processor, wherever transformers 4 or 5 puts them; None if there is none."""
    apart, together = folder / "preprocessor_config.json", folder / "processor_config.json"
    if apart.exists():
        return Keys(apart)
    if together.exists() and "image_processor" in (found := Keys(together)).content:
        return found.inner("image_processor")
    return None


def _check_processor(processor, classes, constants):
    """Raises LoadError, naming file, key and value, for an image processor that makes other pixels than we do.

    Args:
      processor: its keys.
      classes: of transformers that make ours.
      constants: keys and the values that they may have, see `families.kinds.Whole.picture_constants`.
    """
    for key in CLASS_KEYS:
        if processor.get(key) is not None and _class_of(processor) not in classes:
            can = " or ".join(map(repr, sorted(set(classes))))
            raise processor.error(f"{key} = {processor.get(key)!r} is not supported, {can} is")
    for key, allowed in constants.items():
        processor.require(key, *allowed)
    factor = processor.get("rescale_factor", 1 / 255)
    if constants and not (isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)):
        raise processor.error(f"rescale_factor = {factor!r} is not supported, 1/255 = {1 / 255} is")


CLASS_KEYS = ("image_processor_type", "feature_extractor_type")  # of an image processor, in newer and older files


def _class_of(processor):
    """Class of transformers that an image processor names, or None."""
    named = next((processor.get(key) for key in CLASS_KEYS if processor.get(key) is not None), None)
    # The same class has a name for each way to compute it, and had another one once.
    return named and re.sub(r"(Fast|Pil)$", "", str(named)).replace("FeatureExtractor", "ImageProcessor")


def _aspect(processor, side, padding=None):
    """How an image processor of CLIP or LLaVA brings a picture to a square: our `data.aspect`.

    What it does not say it has as transformers' classes have it.

    Args:
      processor: its keys.
      side: pixels that the tower wants.
      padding: class of transformers that pads a picture to a square if it is told to, which is also taken where none
        is named; others pad a batch, whose pictures are of one size already. None if there is no such class.

    Raises:
      LoadError: what comes out is no square of that side, or not all of one that was made.
    """
    crops = processor.get("do_center_crop", True)
    size, crop = (_size(processor, key, 224) for key in ("size", "crop_size"))
    shortest, exact = size == {"shortest_edge": side}, size == {"height": side, "width": side}
    whole_crop = not crops or crop == {"height": side, "width": side}
    pads = padding is not None and (_class_of(processor) or padding) == padding and processor.get("do_pad", False)
    if not ((shortest and (crops or pads)) or exact) or not whole_crop:
        raise processor.error(
            f"size = {size}, do_pad = {pads}, do_center_crop = {crops}, crop_size = {crop} are not supported for a "
            f"tower of {side} pixels: size = {{'shortest_edge': {side}}} with a crop of {side} x {side} is, or "
            f"size = {{'height': {side}, 'width': {side}}}"
        )
    return "pad" if pads else "square" if shortest else "stretch"


def _size(processor, key, usual):
    """A size of an image processor as a dict of the sides that it fixes, in pixels; older ones are one number."""
    value = processor.get(key, usual)
    if isinstance(value, int) and not isinstance(value, bool):
        return {"shortest_edge": value} if key == "size" else {"height": value, "width": value}
    if not isinstance(value, dict):
        raise processor.error(f"{key} = {value!r} is not supported, a number or {'height': …, 'width': …} is")
    return {name: pixels for name, pixels in value.items() if pixels is not None}


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
    return tower, next((p for f in (apart, folder) if f and (p := read_processor(f))), None)


def _decoder(config, keys, family):
    for key, allowed in family.constants.items():
        keys.require(key, *allowed)
    usual, rope = family.defaults, rope_keys(keys)
    heads = keys[family.keys["heads"]]

    def read(field, key):
        match field:
            case "vocab_size" | "width" | "depth" | "heads" | "mlp_dim":
                return keys[key]
            case "kv_heads":
                return keys.get(key, heads)
            case "rope_theta":
                return float(rope.get(key, keys.get(key, 10000.0)))
        return type(usual[key])(keys.get(key, usual[key]))

    fields = {
        field: tuple(read(field, one) for one in key) if isinstance(key, tuple) else read(field, key)
        for field, key in family.keys.items()
    }
    fields |= {"rope_scaling": read_rope(keys, family), "rope_axes": read_axes(keys, family)}
    head_dim = keys.get("head_dim", usual.get("head_dim", 0))
    if head_dim and head_dim * heads != fields["width"]:
        fields["head_dim"] = head_dim
    config.model.families.decoder = family.name
    config.model.decoder.update(dict(family.fields) | fields)


def _vision(config, tower, processor, keys, whole):
    kind, known = tower.get("model_type"), families.ENCODERS.values()
    told = [f for f in known if (kind in f.model_types if kind else f.told_by in tower.content)]
    if not told:
        names = [repr(name) for f in known for name in f.model_types]
        raise tower.error(f"model_type = {kind!r} is not supported, {' or '.join(names)} is")
    family = told[0]
    tower.hold(key_ranges.of_encoder(family))
    for key, allowed in family.constants.items():
        tower.require(key, *allowed)
    keys.require("mm_vision_select_feature", *ORIGINAL.constants["mm_vision_select_feature"])
    c.use_family(config, family.name)
    vision = config.model.vision
    for field, key in family.keys.items():
        value = family.defaults[key] if key in family.defaults and key not in tower.content else tower[key]
        vision[field] = tuple(value) if isinstance(value, list) else type(vision[field])(value)
    if family.level:
        level, depth = family.level
        vision[level] = _level(keys, vision[depth])
    if family.levels_key:
        levels = tower.get(family.levels_key, family.defaults.get(family.levels_key, ()))
        vision.stack_levels = tuple(level + 1 for level in levels)  # hidden states: what so many blocks give
        config.model.decoder.inject_layers = tuple(range(1, 1 + len(levels)))
        if len(levels) >= config.model.decoder.depth:
            raise tower.error(
                f"{family.levels_key} = {levels!r} are added behind as many decoder layers, of which there are "
                f"{config.model.decoder.depth}; more layers than levels are supported"
            )
    if family.table:
        vision.image_size = math.isqrt(vision[family.table]) * vision.patch_size
    if processor is None:
        return
    for field, key in (("mean", "image_mean"), ("std", "image_std")):
        vision[field] = _colour(processor, key, vision[field])
    if family.table:  # pictures have sizes of their own
        return
    said = (key for key in (getattr(whole, "tile_key", ""), "crop_size") if processor.get(key) is not None)
    key = next(said, "size")
    size = processor.get(key, vision.image_size)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or size.get("longest_edge")
    if make_encoder(config.model).any_shape:  # the processor alone says at what resolution it works
        vision.image_size = size
    elif size != vision.image_size:
        raise processor.error(f"{key}: pictures of {size} pixels for a tower of {vision.image_size}")
    if family.misplaced and vision.image_size // vision.patch_size in family.misplaced:
        raise tower.error(
            f"image_size = {vision.image_size}, patch_size = {vision.patch_size}: at so many patches a side "
            f"transformers gives some of them another's position, by rounding; a {family.title} of another size is "
            "supported"
        )


def _projector(config, whole, tower, keys):
    """What stands between encoder and decoder in a family of whole models that has its own."""
    family = families.PROJECTORS[whole.projector]
    first = tower.get(family.shuffle_key, keys.get(family.shuffle_key))
    if not isinstance(first, int) or first < 1:
        raise keys.error(f"{family.shuffle_key} = {first!r} is not supported, a whole number above 0 is")
    finer = family.finer_key and tower.get(family.finer_key, keys.get(family.finer_key, False))
    c.use_projector(config, family.name, (first, first // 2) if finer else (first,))
    if family.width_key:
        tower.require(family.width_key, config.model.decoder.width)


def _colour(processor, key, usual):
    """Three numbers of an image processor, those of the family where it says none."""
    found = processor.get(key, usual)
    good = isinstance(found, list | tuple) and len(found) == 3 and all(isinstance(x, int | float) for x in found)
    if not good or (key == "image_std" and min(found) <= 0):
        raise processor.error(f"{key} = {found!r} is not supported, three numbers are")
    return tuple(map(float, found))


def _original_layout(config, keys, processor):
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
    if processor is not None:
        made = _aspect(processor, config.model.vision.image_size)
        if aspect == "square" and made != "square":
            raise processor.error(f"pictures are {made}ed, where {aspect_key} = {aspect!r} of config.json crops them")
    if aspect == "anyres":
        keys.require(merge_key, *ORIGINAL.merges)
        config.data.sequence = ORIGINAL.merges[keys.get(merge_key, next(iter(ORIGINAL.merges)))]
        config.data.tilings = _tilings(keys, ORIGINAL.keys["tilings"], config.model.vision.image_size)
        config.model.newline = config.data.sequence == "unpad"


def _layout_of(whole, config, keys, processor):
    """Which views there are and where their tokens go, as a family of transformers' classes says it."""
    side = config.model.vision.image_size
    if not (whole.read_as or whole.fields):
        config.data.aspect = _aspect(processor, side, whole.image_processors.get("pad"))
    for field, value in whole.read_as.items():
        _set(config, field, value)
    if whole.tilings_key:
        _aspect(processor, side)
        config.data.tilings, made = (
            tuple((w, h) for h, w in _tilings(of, whole.tilings_key, side))
            for of in (keys, Keys(processor.path, dict(whole.defaults) | processor.content, processor.part))
        )
        if made != config.data.tilings:
            raise processor.error(
                f"{whole.tilings_key} = {processor.get(whole.tilings_key)} is another list than that of config.json, "
                f"{keys[whole.tilings_key]}: pictures would be tiled in one way and their tiles read in another"
            )
    if whole.shrink_key:
        config.data.shrink = _read_shrink(keys, whole.shrink_key)
    if whole.pixels:
        _read_pixels(config, processor)
    if whole.tile_key:
        _read_longest(config, processor, whole.tile_key)
    config.data.marks = whole.marks
    if whole.most_tiles_key:
        of_tiles = [processor.get(key) for key in (whole.fewest_tiles_key, whole.most_tiles_key)]
        config.data.tilings = _all_tilings(*of_tiles)
    for key, field in whole.optional.items():
        if keys.get(key) is not None:
            _set(config, field, keys[key])
    for fields, of in ((whole.fields, keys), (whole.picture_fields, processor or keys)):
        for key, field in fields.items():
            _set(config, field, _tuples(of[key]))


PIXELS = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # as fields, and as an image processor's size


def _read_pixels(config, processor):
    """How many pixels a picture has at least and at most, and whether patches are those of the tower."""
    model, size = config.model, processor.get("size", {})
    for key, value in pixel_patches(model).items():
        if processor.get(key) != value:
            raise processor.error(f"{key} = {processor.get(key)!r} is not supported for a tower that has {value}")
    for field, key in PIXELS.items():
        found = processor.get(field, size.get(key) if isinstance(size, dict) else None)
        if not isinstance(found, int) or found < 1:
            raise processor.error(f"size = {size!r} is not supported, pixels as {' and '.join(PIXELS.values())} are")
        config.data[field] = found


def _read_shrink(keys, key):
    """How many views' worth of tokens the tiles of a picture are shrunk to: n of "anyres_max_n"."""
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(keys[key]))
    if not found or int(found[1]) > MOST_SHRINK:
        raise keys.error(f"{key} = {keys[key]!r} is not supported, 'anyres_max_n' with n of 1 to {MOST_SHRINK} is")
    return int(found[1])


def _read_longest(config, processor, tile_key):
    """How many tiles the longer side of a picture is made long."""
    tile, size = processor.get(tile_key), processor.get("size")
    side = config.model.vision.image_size
    longest = size.get("longest_edge") if isinstance(size, dict) and len(size) == 1 else None
    good = isinstance(longest, int) and longest % side == 0 and side <= longest <= MOST_SIDE * side
    if tile != {"longest_edge": side} or not good:
        raise processor.error(
            f"size = {size!r}, {tile_key} = {tile!r} are not supported for a tower of {side} pixels: {tile_key} = "
            f"{{'longest_edge': {side}}} is, and size = {{'longest_edge': …}} of a multiple of {side} up to "
            f"{MOST_SIDE * side}"
        )
    config.data.tilings = longest_tilings(longest // side)


def pixel_patches(model) -> dict:
    """How an image processor that keeps the sizes of pictures cuts them into patches."""
    vision = model.vision
    return {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames,
        "merge_size": model.projector.shuffle[0],
    }


def _all_tilings(fewest, most):
    """Every tiling `(columns, rows)` of so many tiles, as Granite-Docling's image processor lists them."""
    fewest, most = 1 if fewest is None else fewest, 32 if most is None else most
    sides = range(1, min(most, MOST_SIDE) + 1)
    return tuple((columns, rows) for columns in sides for rows in sides if fewest <= columns * rows <= most)


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
        pairs = strict_json.as_tuples(found)
        good = key_ranges.LISTED_SIZES.holds(pairs)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        good = False
    if not good:
        raise keys.error(f"{key} = {strict_json.shown(found)} is not supported, {key_ranges.LISTED_SIZES} is")
    if any(side % size for pair in pairs for side in pair):
        raise keys.error(f"{key} {strict_json.shown(pairs)} are not multiples of {size} pixels")
    return tuple((first // size, second // size) for first, second in pairs)
