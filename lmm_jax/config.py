"""Every config field with its default, and how config files are loaded, overridden and checked."""

import ast
import difflib
import importlib.util
import json
import math

import ml_collections
from etils import epath
from ml_collections.config_dict import placeholder

from lmm_jax import families
from lmm_jax.data.visual_layout import VisualLayout

SCHEMA = 1  # raised when a stored config.json of an older version can no longer be read


class ConfigError(ValueError):
    """A config file, field or value that cannot be used; the message names it and what is valid."""


def base() -> ml_collections.ConfigDict:
    """The whole config. A config file is a diff on it; `config.model.<part>` is the fields of that Linen module."""
    c = ml_collections.ConfigDict()
    c.schema = SCHEMA
    c.seed = 0  # of parameters and of the data order

    c.model = m = ml_collections.ConfigDict()
    m.dtype = "bfloat16"  # of the computation; parameters, softmax, norms and loss are float32
    m.scales = (576,)  # visual tokens per grid, one bank region and one loss group each
    m.reduction = "pool"  # how a grid becomes so many tokens, see lmm_jax/reduction.py: pool (averages of windows)
    m.newline = False  # a learned vector at the end of each row of a picture's tiles
    m.newline_in_stacks = True  # which every stack adds once more, as DeepStack-L-HD does
    # The published families that the parts are of: what loading and exporting call them. "" for a part of our own.
    m.families = ml_collections.ConfigDict({"vision": "", "decoder": families.DEFAULT_DECODER})
    use_encoder(c, "vit")  # sets m.encoder, of models.encoders.ENCODERS, and m.vision, its fields: see its docstring
    m.projector = ml_collections.ConfigDict()  # models.visual_tokens.Projector
    m.projector.depth = 2  # linear layers, GELU between
    m.decoder = ml_collections.ConfigDict()  # models.decoder.Decoder
    m.decoder.vocab_size = 32000  # pieces of the tokenizer
    m.decoder.width = 4096
    m.decoder.depth = 32
    m.decoder.heads = 32
    m.decoder.kv_heads = 32  # fewer than heads: grouped-query attention
    m.decoder.mlp_dim = 11008
    m.decoder.head_dim = 0  # width of a head of attention; 0 = width / heads
    m.decoder.tied = False  # the token table is the head too, which then has no parameters of its own
    m.decoder.qk_norm = False  # queries and keys are normed head by head before they are rotated (Qwen3)
    m.decoder.qkv_bias = False  # the maps to queries, keys and values have biases (Qwen2)
    m.decoder.rope_theta = 10000.0
    m.decoder.rope_scaling = ()  # ("linear", factor), or LLaMA 3.1's: see models.layers.scale_frequencies
    m.decoder.norm_eps = 1e-5
    m.decoder.inject_layers = ()  # stack s is added before layer inject_layers[s]
    m.decoder.vocab_multiple = 128  # rows of the table are a multiple of it, so that they divide over meshes
    m.decoder.remat = "full"  # a layer recomputes: none, dots (all but matmuls), full, offload (and inputs on hosts)

    c.init = i = ml_collections.ConfigDict()
    i["from"] = placeholder(str)  # workdir whose newest parameters a run starts with; optimizer and step start anew
    i.vision = placeholder(str)  # folder of a CLIP or ConvNeXt, or of a whole model, that the encoder is read from
    i.language = placeholder(str)  # of a LLaMA, or of a whole model, for the decoder
    i.projector = placeholder(str)  # of a whole model, for projector and newline
    i.allow_pickle = False  # reads PyTorch's .bin files in these folders, by torch's weights-only reader
    i.new = ()  # path prefixes of parameters that start fresh although the others are read

    c.data = d = ml_collections.ConfigDict()
    d.path = placeholder(str)  # prepared folder, see `lmm prepare`
    d.mixture = ()  # ((folder, weight), …) of several prepared folders, instead of `path`
    d.train = "train"  # split to train on
    d.validation = "validation"  # split for the validation loss, if the data has one
    d.template = "qa"  # text around the turns, see data.conversation
    d.too_long = "refuse"  # a conversation longer than a row is an error, or "cut" after the last answer that fits
    d.views = placeholder(int)  # views of a pack; what leaves the least unused if unset
    d.aspect = "pad"  # pad, stretch, square, anyres or own: see data/views.py
    d.canvas = ()  # (height, width) in pixels of a view with aspect "own"; image_size² if empty
    d.tilings = ()  # (columns, rows), …: tiles of a picture, the one that keeps most of it if several; () = none
    d.zoom = 1  # every view once more at so many times its resolution, in zoom · zoom tiles (DeepStack-L-HD)
    # Each recipe's values of these stand in the table of data/visual_layout.py.
    d.sequence = (
        "whole"  # of a picture stands in the sequence: whole, blank, samples, whole+samples, flat, grid, unpad
    )
    d.stacks = ""  # is added over it: nothing, samples, copies, whole, whole+samples, zoom, encoder
    d.sampling = "2d"  # how tiles become samples: 2d, 1d or grid
    d.rows = placeholder(int)  # rows of a pack; as few as leave little unused if unset
    d.length = 2048  # positions of a row
    d.targets = placeholder(int)  # supervised positions of a pack; all positions if unset
    d.threads = 1  # reader threads
    d.workers = 0  # reader processes, 0 reads in the training process
    d.max_bad_share = 0.001  # stop when more of the records than this cannot be read; of 10,000 at least
    d.max_bad_run = 32  # stop when so many records one after another cannot be read

    c.train = t = ml_collections.ConfigDict()
    t.steps = 1000
    t.batch_size = 32  # packs of a step, over all hosts and micro-batches
    t.micro_batches = 1  # gradient accumulation; equal to one batch to rounding
    t.scales_per_step = placeholder(int)  # train so many scales a step, in rotation; all if unset
    t.log_every = 50  # steps
    t.eval_every = 500  # steps between validation losses; 0 = never
    t.eval_batches = 8  # batches of a validation loss
    t.save_every = 500  # steps between checkpoints; the last step is always saved
    t.keep = 2  # newest checkpoints to keep
    t.max_skipped = 10  # stop after so many non-finite updates in a row

    c.optimizer = o = ml_collections.ConfigDict()
    o.learning_rate = 2e-5  # peak
    o.groups = ()  # ((path prefix, learning rate), …): the first match counts, rate 0 freezes
    o.warmup = 0.03  # share of the steps
    o.final = 0.0  # learning rate at the end, as a share of the peak
    o.b1 = 0.9
    o.b2 = 0.999
    o.weight_decay = 0.0  # of matrices; norms, biases and tables of positions never decay
    o.clip = 1.0  # global gradient norm; 0 = no clipping

    c.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})  # -1 takes the rest
    c.rules = ml_collections.ConfigDict(  # logical axis -> mesh axes; what is not named is replicated
        {
            "batch": ("data", "fsdp"),
            "views": ("data", "fsdp", "context"),
            "length": "context",
            "embed": ("fsdp", "context"),
            "vocab": "tensor",
            "heads": "tensor",
            "kv_heads": "tensor",
            "mlp": "tensor",
        }
    )
    c.log = ml_collections.ConfigDict({"tensorboard": False, "wandb": False})  # beside metrics.jsonl; extras
    return c


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
        config.model.vision.update(fields | {"mean": family.mean, "std": family.std})


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
    spec = importlib.util.spec_from_file_location("lmm_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(",".join(filter(None, [arg, *for_file])))
    config.lock()
    for override in overrides:
        if override not in for_file:
            _override(config, override)
    check(config)
    return config


def check(config):
    """Raises ConfigError for fields that contradict each other."""
    data, train, decoder = config.data, config.train, config.model.decoder
    if train.batch_size % train.micro_batches:
        raise ConfigError(
            f"train.batch_size={train.batch_size} does not divide into train.micro_batches={train.micro_batches}"
        )
    if train.scales_per_step and not 1 <= train.scales_per_step <= len(config.model.scales):
        raise ConfigError(f"train.scales_per_step={train.scales_per_step}: model.scales has {config.model.scales}")
    if data.mixture and data.path:
        raise ConfigError("data.path and data.mixture are both set; name the folder in data.mixture alone")
    if (data.views is not None or data.targets) and not data.rows:
        raise ConfigError("data.views and data.targets are of a pack whose data.rows is set; set it, or neither")
    if data.targets and data.views is None:
        raise ConfigError("data.targets is of a pack whose data.views is set; set it, or leave both open")
    if data.too_long not in ("cut", "refuse"):
        raise ConfigError(f"data.too_long={data.too_long!r} is neither 'cut' nor 'refuse'")
    _check_visual_layout(config)
    if len(set(decoder.inject_layers)) != len(decoder.inject_layers):
        raise ConfigError(f"model.decoder.inject_layers={tuple(decoder.inject_layers)} names a layer twice")


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
    if data.aspect == "own" and not encoder.any_shape:
        raise ConfigError(f"data.aspect='own' needs an encoder of any shape, model.encoder='{model.encoder}' has one")
    # A map that is n times as fine as the grid is sampled onto it n · n times.
    of_encoder = sum(n * n for n in encoder.level_strides)
    layers = tuple(model.decoder.inject_layers)
    if len(layers) != visual.added + of_encoder:
        raise ConfigError(
            f"data.stacks='{data.stacks}' with data.tilings={visual.tilings} gives {visual.added} stacks, "
            f"the levels of the encoder (model.vision) {of_encoder}; model.decoder.inject_layers={layers} names "
            f"{len(layers)} layers, one is needed for each"
        )


def save_config(config, path):
    """Writes a config as JSON."""
    epath.Path(path).write_text(json.dumps(json.loads(config.to_json_best_effort()), indent=1) + "\n")


def read_config(path) -> ml_collections.ConfigDict:
    """Reads what `save_config` wrote; fields that are newer than the file have their defaults.

    Raises:
      ConfigError: it was written by another schema version, or has fields that no longer exist.
    """
    stored = json.loads(epath.Path(path).read_text())
    if stored.get("schema") != SCHEMA:
        raise ConfigError(f"{path} has config schema {stored.get('schema')}, this version reads {SCHEMA}")
    config, stored = base(), ml_collections.ConfigDict(_tuples(stored))
    use_encoder(config, stored.model.encoder)
    unknown = sorted(flatten(stored).keys() - flatten(config).keys())
    if unknown:
        raise ConfigError(f"{path} has fields that this version does not know: {', '.join(unknown)}")
    config.update(stored)
    return config.lock()


def flatten(config, prefix="") -> dict:
    """Dotted field names to values."""
    out = {}
    for key in config:
        value = config[key]
        nested = isinstance(value, ml_collections.ConfigDict)
        out.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return out


def _override(config, text):
    name, eq, value = text.partition("=")
    fields = flatten(config)
    if not eq or name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
        raise ConfigError(f"unknown config field '{name}'; did you mean '{near[0]}'? (now {fields[near[0]]!r})")
    node = config
    *parents, leaf = name.split(".")
    for parent in parents:
        node = node[parent]
    converted = _convert(f"config field {name}", value, fields[name], node.get_type(leaf))
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
    except (ValueError, SyntaxError):
        raise error from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is tuple and isinstance(value, int | float | list):
        return tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not kind:
        raise error
    return value


def _tuples(x):
    if isinstance(x, dict):
        return {k: _tuples(v) for k, v in x.items()}
    return tuple(map(_tuples, x)) if isinstance(x, list) else x
