"""Every config field with its default, and how config files are loaded, overridden and checked."""

import ast
import difflib
import importlib.util
import json
import math
import traceback

import ml_collections
from etils import epath
from ml_collections.config_dict import placeholder

from lmm_jax import families, storage, strict_json
from lmm_jax.data.conversation import NAMES_KEY, names_key, stored_template
from lmm_jax.data.visual_layout import VisualLayout


class ConfigError(ValueError):
    """A config file, field or value that cannot be used; the message names it and what is valid."""


def base() -> ml_collections.ConfigDict:
    """The whole config with its defaults; a config file is a diff on it.

    What each field is, and what it may be, stands in the table of `lmm_jax.fields`; `config.model.<part>` is the
    fields of that Linen module.
    """
    from lmm_jax.fields import shared_fields  # which imports jax

    config = ml_collections.ConfigDict()
    for field in shared_fields():
        *parents, leaf = field.name.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict()
            node = node[parent]
        node[leaf] = placeholder(field.valid.kind) if field.default is None else field.default
    use_encoder(config, config.model.encoder)
    return config


def use_encoder(config, name):
    """Gives `config.model` another encoder: `config.model.vision` is then its fields, as its class has them.

    Args:
      config: whose `model` is set.
      name: in `models.encoders.ENCODERS`.

    Raises:
      ConfigError: an encoder that does not exist.
    """
    from lmm_jax.models.encoders import encoder_fields  # which imports jax

    try:
        fields = encoder_fields(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    config.model.encoder, config.model.vision = name, ml_collections.ConfigDict(fields)
    published = [family.name for family in families.ENCODERS.values() if family.encoder == name]
    config.model.families.vision = published[0] if published else ""


def use_family(config, name, size=""):
    """Gives `config.model` the decoder or the encoder of a published family.

    Args:
      config: whose `model` is set.
      name: in `families.DECODERS` or `families.ENCODERS`.
      size: in the family's `sizes`; "" keeps the sizes that the module has by itself.

    Raises:
      ConfigError: another family or size; the message lists them.
    """
    readable = {name: family for name, family in families.DECODERS.items() if family.tensors}
    family = choose("family", name, readable | families.ENCODERS)
    fields = dict(family.fields) | (dict(choose("size", size, family.sizes)) if size else {})
    if name in readable:
        config.model.families.decoder = name
        config.model.decoder.update(fields)
    else:
        use_encoder(config, family.encoder)
        config.model.families.vision = name
        config.model.vision.update(fields | dict(family.usual) | {"mean": family.mean, "std": family.std})


def use_projector(config, name, shuffle):
    """Gives `config.model` the projector of a published family, and the same behind each level of the encoder.

    Args:
      config: whose `model` is set.
      name: in `families.PROJECTORS`.
      shuffle: cells a side that become one token, of each path of the projector.

    Raises:
      ConfigError: another family; the message lists them.
    """
    family = choose("family", name, families.PROJECTORS)
    config.model.families.projector = name
    config.model.projector.update(dict(family.fields), shuffle=tuple(shuffle))
    config.model.level_projector.update(dict(family.level_fields))


# Fields of `config.data` that belong to a model: how pictures and turns become what it was trained on.
CANVAS = ("canvas", "canvases")
PIXELS = ("min_pixels", "max_pixels")
OF_MODEL = (
    *("template", "aspect", "tilings", "zoom", "sequence", "stacks", "sampling", "choice", "marks"),
    *("shrink", "tiled_alone"),
    *CANVAS,
    *PIXELS,
)

# Arguments of the configs at real size: where prepared folders and others' models lie, and a workdir to start from.
FOLDERS = {"data": "data", "models": "models", "start": ""}


def start_fresh(config, a, tower, new):
    """Starts a first stage from the workdir `a.start` if that is named, else from Vicuna's and the tower's folders.

    Args:
      config: whose `init` is set.
      a: config arguments `start`, `models` (the folder that both lie in) and `size`.
      tower: name of the vision tower's folder.
      new: path prefixes of parameters that start fresh.
    """
    parts = {"vision": f"{a.models}/{tower}", "language": f"{a.models}/vicuna-{a.size}-v1.5"}
    config.init.update(({"from": a.start} if a.start else parts) | {"new": new})


def parse(arg, **defaults) -> ml_collections.ConfigDict:
    """Parses a config file's argument `"size=7b,stage=tune"` against its defaults, with their types.

    Raises:
      ConfigError: an unknown key or a value of another type, naming the valid ones.
    """
    out = ml_collections.ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, eq, value = item.partition("=")
        if not eq or key not in defaults:
            raise ConfigError(f"config argument '{item}': expected one of {', '.join(f'{k}=…' for k in defaults)}")
        out[key] = _convert(f"config argument {key}", value, defaults[key])
    return out


def choose(what, name, options):
    """`options[name]`, or a ConfigError that lists the options."""
    if name not in options:
        raise ConfigError(f"{what} '{name}' does not exist; choose from {', '.join(map(str, options))}")
    return options[name]


def load_config(path, *overrides) -> ml_collections.ConfigDict:
    """Loads `FILE[:key=value,…]`, applies overrides `"train.steps=1000"` (or `"size=7b"`, for the file), locks it.

    Args:
      path: a Python file with `get_config(arg)`, optionally with its argument after a colon.
      *overrides: dotted fields with values; undotted `key=value` pairs go to the file's argument.

    Returns:
      A locked config that passed `check`.

    Raises:
      ConfigError: an unknown field (with the nearest valid one), a value of another type, or fields at odds.
    """
    file, _, arg = str(path).partition(":")
    if not epath.Path(file).exists():
        raise ConfigError(f"no config file {file}")
    top = set(base())
    for_file = [o for o in overrides if "." not in o.partition("=")[0] and o.partition("=")[0] not in top]
    config = _run_file(file, ",".join(filter(None, [arg, *for_file])))
    config.lock()
    for override in overrides:
        if override not in for_file:
            _override(config, override)
    check(config)
    return config


def _run_file(file, arg):
    """What `get_config(arg)` of a config file returns; its errors become a sentence with the line that made them."""
    spec = importlib.util.spec_from_file_location("lmm_config", file)
    if spec is None:
        raise ConfigError(f"{file} is no config file: expected a Python file, NAME.py, with get_config(arg)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg)
    except ConfigError:
        raise
    except Exception as error:  # a config file is a program of the user's, which may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 0
        told = " ".join(str(error).split())
        raise ConfigError(f"{file}{f', line {line}' if line else ''}: {type(error).__name__}: {told}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(f"{file}: get_config returned {type(config).__name__}, not the config that it made")
    return config


def check(config):
    """Holds every field to its range, and then the fields to each other.

    Raises:
      ConfigError: a field that does not exist, a value outside its range, or fields that contradict each other; the
        message names fields, values and what is valid.
    """
    _check_fields(config)
    _check_data_and_training(config)
    rates = [rate for prefix, rate in config.optimizer.groups if prefix == "density_router"]
    if config.model.density_router.width and rates[:1] != [0.0]:
        raise ConfigError(
            f"model.density_router.width={config.model.density_router.width}: it is read, not trained; add "
            "('density_router', 0.0) to optimizer.groups"
        )
    _check_visual_layout(config)
    _check_model(config.model)


def _check_fields(config):
    from lmm_jax.models.encoders import ENCODERS

    choose("config field model.encoder", config.model.encoder, ENCODERS)
    _check_ranges(config.model.encoder, flatten(config))


def _check_ranges(encoder, fields):
    """Raises ConfigError for values outside their ranges.

    Args:
      encoder: name of that of the config, whose fields are `model.vision`.
      fields: values by dotted names.
    """
    from lmm_jax.fields import all_fields, rule
    from lmm_jax.sharding import LOGICAL_AXES

    known = all_fields(encoder)
    known |= {f"rules.{axis}": rule(axis) for axis in LOGICAL_AXES if f"rules.{axis}" not in known}
    faults = []
    for name, value in fields.items():
        if name not in known:
            raise _unknown(name, known)
        if not known[name].valid.holds(value):
            field = known[name]
            faults.append(f"config field {name}={strict_json.shown(value)} ({field.meaning}): expected {field.valid}")
    if faults:
        raise ConfigError("\n  ".join(faults))


def _check_data_and_training(config):
    data, train, init = config.data, config.train, config.init
    if train.batch_size % train.micro_batches:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide into train.micro_batches={train.micro_batches}"
        )
    if train.scales_per_step and train.scales_per_step > len(config.model.scales):
        raise ConfigError(f"train.scales_per_step={train.scales_per_step}: model.scales has {config.model.scales}")
    if data.mixture and data.path:
        raise ConfigError("data.path and data.mixture are both set; name the folder in data.mixture alone")
    if (data.views is not None or data.targets) and not data.rows:
        raise ConfigError("data.views and data.targets are of a pack whose data.rows is set; set it, or neither")
    if data.targets and data.views is None:
        raise ConfigError("data.targets is of a pack whose data.views is set; set it, or leave both open")
    if data.targets and data.targets > data.rows * data.length:
        raise ConfigError(
            f"data.targets={data.targets} is more than a pack has positions, data.rows={data.rows} of "
            f"data.length={data.length}"
        )
    parts = [f"init.{part}" for part in ("vision", "language", "projector") if init[part]]
    if init["from"] and parts:
        raise ConfigError(f"init.from and {', '.join(parts)} are both set; a run starts from either")
    if init.new and not init["from"] and not parts:
        raise ConfigError(f"init.new={init.new} names what is not read, but init names no folder to read from")
    if init.lora and not config.lora.rank:
        raise ConfigError(
            f"init.lora={init.lora} gives adapters and lora.rank=0 makes none; set lora.rank, lora.alpha and "
            "lora.paths to those of its adapter_config.json"
        )
    if config.optimizer.frozen_dtype == "bfloat16" and config.model.dtype != "bfloat16":
        raise ConfigError(
            f"optimizer.frozen_dtype=bfloat16 with model.dtype={config.model.dtype}: kernels would lose what the "
            "computation uses of them; set model.dtype=bfloat16, or leave it at float32"
        )
    if list(config.mesh.values()).count(-1) > 1:
        raise ConfigError(f"config.mesh: only one axis may be -1, got {dict(config.mesh)}")


def _check_model(model):
    from lmm_jax.models.decoder import Decoder

    try:
        Decoder(**model.decoder).check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    router = model.router
    if router.width and len(model.scales) < 2:
        raise ConfigError(
            f"model.router.width={router.width}: a router says which of several scales a question needs, "
            f"model.scales={tuple(model.scales)} is one; name more, or set model.router.width=0"
        )
    if router.width % router.heads:
        raise ConfigError(f"model.router.width={router.width} does not divide into model.router.heads={router.heads}")
    family = model.families.vision
    if family and families.ENCODERS[family].encoder != model.encoder:
        raise ConfigError(
            f"model.families.vision={family!r} is a {families.ENCODERS[family].encoder}, "
            f"model.encoder={model.encoder!r}; set it to '' or choose the encoder by config.use_family"
        )


def _unknown(name, known):
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return ConfigError(f"unknown config field '{name}'; did you mean '{near[0]}'?")


def visual_layout(config) -> VisualLayout:
    """Where the visual tokens of a picture come from and where they stand: what config and encoder say of it.

    Raises:
      ValueError: fields that contradict each other, named; or an encoder that does not exist.
    """
    from lmm_jax.models.encoders import make_encoder  # which imports jax

    return VisualLayout.from_config(config, make_encoder(config.model))


def _check_visual_layout(config):
    from lmm_jax.models.encoders import make_encoder

    data, model = config.data, config.model
    try:
        encoder = make_encoder(model)
        visual = VisualLayout.from_config(config, encoder)
        for scale in model.scales:
            visual.token_grid(scale)
    except ValueError as error:
        raise ConfigError(f"config: {error}") from error
    if data.views is not None and data.views % visual.views_step:
        raise ConfigError(
            f"data.views={data.views}: a picture has a multiple of {visual.views_step} views, so that the rest "
            "would never be used; set a multiple"
        )
    inside = math.prod(visual.tilings[0]) if data.stacks == "encoder" else 0
    if encoder.extra_views != inside:
        raise ConfigError(
            f"data.stacks='{data.stacks}' with data.tilings={visual.tilings}: {inside} tiles of a picture enter the "
            f"encoder beside it, model.vision takes {encoder.extra_views}; set model.vision.regroup=(layer, n) for "
            "stacks 'encoder' with tilings ((n, n),), and () for others"
        )
    if data.canvas and data.canvases:
        raise ConfigError(
            f"data.canvas={tuple(data.canvas)} is one canvas for all pictures, data.canvases="
            f"{tuple(data.canvases)} are several; set one of both"
        )
    if visual.on_canvas and not encoder.any_shape:
        raise ConfigError(
            f"data.aspect='{data.aspect}' needs an encoder of any shape, model.encoder='{model.encoder}' has one"
        )
    if visual.canvas_each and model.router.width:
        raise ConfigError(
            f"model.router.width={model.router.width}: a router looks at grids of one shape, and data.aspect="
            f"'{data.aspect}' gives each picture its own; set model.router.width=0"
        )
    if model.decoder.rope_axes and data.sequence not in ("whole", "blank"):
        raise ConfigError(
            f"data.sequence='{data.sequence}' with model.decoder.rope_axes: rows and columns are known of a picture "
            "that is one grid, data.sequence='whole'"
        )
    if model.finer and any(factor % model.finer for factor in model.projector.shuffle):
        raise ConfigError(
            f"model.finer={model.finer} does not divide model.projector.shuffle={tuple(model.projector.shuffle)}: so "
            "many cells a side become one token, and a finer merge takes a part of them"
        )
    # A map that is n times as fine as the grid is sampled onto it n · n times.
    of_encoder = sum(n * n for n in encoder.level_strides)
    layers = tuple(model.decoder.inject_layers)
    if len(layers) != visual.added + of_encoder + model.finer**2:
        raise ConfigError(
            f"data.stacks='{data.stacks}' with data.tilings={visual.tilings} gives {visual.added} stacks, "
            f"the levels of the encoder (model.vision) {of_encoder}, model.finer={model.finer} {model.finer**2}; "
            f"model.decoder.inject_layers={layers} names "
            f"{len(layers)} layers, one is needed for each"
        )


def save_config(config, path):
    """Writes a config as JSON."""
    stored = json.loads(config.to_json_best_effort()) | names_key(config.data.template)
    storage.write_text(path, json.dumps(stored, indent=1) + "\n")


def read_config(path) -> ml_collections.ConfigDict:
    """Reads what `save_config` wrote; fields that are newer than the file have their defaults.

    Raises:
      ConfigError: it was written by another schema version, has fields that no longer exist, or a value that no run
        can have; the message names file, field and value.
    """
    from lmm_jax.fields import SCHEMA  # which imports jax

    try:
        stored = strict_json.read_object(epath.Path(path))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if "schema" not in stored:
        raise ConfigError(f"{path} is no config of a run; is it that of a model, an export or a tokenizer?")
    if stored["schema"] != SCHEMA:
        found = strict_json.shown(stored["schema"])
        raise ConfigError(f"{path} has config schema {found}, this version reads {SCHEMA}")
    config = base()
    try:
        stored["data"]["template"] = stored_template(stored["data"]["template"], stored)
        stored.pop(NAMES_KEY, None)
        stored = ml_collections.ConfigDict(strict_json.as_tuples(stored))
        use_encoder(config, stored.model.encoder)
        fields, ours = flatten(stored), flatten(config)
        unknown = sorted(fields.keys() - ours.keys())
        if unknown:
            raise ConfigError(f"it has fields that this version does not know: {', '.join(unknown)}")
        _check_ranges(config.model.encoder, fields)
        config.update(stored)
        _check_model(config.model)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"{path} is damaged, no run wrote it as it is: {told}; restore it from a copy") from error
    return config.lock()


def check_model(config):
    """Raises ConfigError for a model that cannot be built, whoever wrote it; no other field is asked."""
    fields = {name: value for name, value in flatten(config).items() if name.startswith("model.")}
    _check_ranges(config.model.encoder, fields)
    _check_model(config.model)


def flatten(config, prefix="") -> dict:
    """Dotted field names to values."""
    out = {}
    for key in config:
        value = config[key]
        nested = isinstance(value, ml_collections.ConfigDict)
        out.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out


def _override(config, text):
    from lmm_jax.fields import all_fields

    name, eq, value = text.partition("=")
    fields = flatten(config)
    if name not in fields:
        raise _unknown(name, fields)
    field = all_fields(config.model.encoder).get(name)
    if name == "model.encoder" and value != config.model.encoder:
        raise ConfigError(
            f"config field {name}={value}: another encoder has other fields, so that a config file chooses it, by "
            "config.use_encoder or config.use_family"
        )
    if not eq:
        raise ConfigError(f"config field {name} is given no value: {name}=…, expected {field.valid}")
    node = config
    *parents, leaf = name.split(".")
    for parent in parents:
        node = node[parent]
    what = f"config field {name}"
    optional = field is not None and field.valid.optional
    converted = None if optional and value == "None" else _convert(what, value, fields[name], node.get_type(leaf))
    with config.unlocked():
        node[leaf] = converted


def _convert(what, text, current, kind=None):
    """Converts `text` to the type of `current`; values are literals, never evaluated."""
    kind = kind or type(current)
    if kind is str:
        return text
    error = ConfigError(f"{what} is {kind.__name__}, got '{text}' (now {current!r})")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise error from None
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 1e300 else math.inf
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e6 steps
    if kind is tuple and isinstance(value, int | float | str | list):
        return strict_json.as_tuples(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        raise error
    return value
