"""Every field of a config: its default, what it may be, and what it means, in one table.

`lmm show config` prints the table, `config.base` makes a config of it, and `config.check` holds a config to it and
says which fields contradict each other. The fields of `model.vision` are those of the encoder, which states their
ranges itself: see `lmm_jax.models.encoders`.
"""

import dataclasses
from typing import Any

from lmm_jax import families
from lmm_jax.data.conversation import TOO_LONG
from lmm_jax.data.views import ASPECTS
from lmm_jax.data.visual_layout import CHOICES, MOST_SHRINK, SAMPLINGS, SEQUENCES, STACKS
from lmm_jax.models.decoder import REMAT_POLICIES
from lmm_jax.models.encoders import ENCODERS, encoder_fields, encoder_meanings, encoder_ranges
from lmm_jax.models.layers import MULTIPLIERS, ROPE_AXES, ROPE_SCALINGS
from lmm_jax.models.projector import Projector
from lmm_jax.ranges import Range, each, either, flag, number, one_of, text, together, unset, whole
from lmm_jax.reduction import REDUCTIONS
from lmm_jax.sharding import LOGICAL_AXES, MESH_AXES

SCHEMA = 1  # raised when a stored config.json of an older version can no longer be read


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config.

    Attributes:
      name: with dots, as `--config.NAME=VALUE` takes it.
      default: where a config file says nothing; None if it is not set then.
      valid: what it may be.
      meaning: what it does.
    """

    name: str
    default: Any
    valid: Range
    meaning: str


SIZE = whole(1, 1_000_000)  # of a part of a model
DEPTH = whole(1, 1_000)
PACKS = whole(1, 1_000_000)
FOLDER = text("the path of a folder")
RATE = number(0, 1)
SECONDS = number(0, 1e7, special="0 = any time")
SPLIT = text("the name of a split")
PREFIX = text("the first names of a parameter's path, such as vision or decoder/layers")
PATTERN = text("the first names of a parameter's path, such as decoder/layers/q or vision/blocks_*/q")
RATES = each(
    together(PREFIX, RATE, what=""), what="pairs (path prefix, learning rate from 0 to 1): (('vision', 0.0),)"
)
FOLDERS = each(
    together(FOLDER, number(0, above=True), what=""), what="pairs (folder, weight above 0): (('data/a', 1.0),)"
)
TILINGS = each(
    together(whole(1, 64), whole(1, 64), what=""),
    distinct=True,
    what="different pairs (columns, rows) of 1 to 64 tiles: ((2, 2), (1, 3))",
)
CANVAS = either(
    each(whole(1, 65_536), least=2, most=2, what="(height, width) in pixels"), each(whole(), most=0, what="()")
)
CANVASES = each(
    each(whole(1, 65_536), least=2, most=2, what="(height, width)"),
    distinct=True,
    what="different pairs (height, width) in pixels: ((1536, 1536), (1024, 2048))",
)
AXIS = either(one_of(MESH_AXES), each(one_of(MESH_AXES), distinct=True, what="a tuple of these, () for none"))
AXES = dataclasses.replace(AXIS, kind=tuple)
DEVICES = either(whole(1, 1_000_000), Range(int, "-1 for the devices that are left", lambda x: x == -1))


PROJECTOR = {field.name: field.default for field in dataclasses.fields(Projector)}
PROJECTOR_FIELDS = {
    name: (Projector.RANGES[name], meaning)
    for name, meaning in {
        "depth": "linear layers between encoder and decoder, with GELU between",
        "shuffle": "k × k cells of the encoder's become one token; several k: a path for each number of tokens",
        "order": "of a shuffled block: cell by cell, or channel by channel",
        "norm": "a norm before the first layer: of the cells before they are shuffled, or of the block; '' = none",
        "hidden": "width between the layers: that of the output, or of the input",
        "bias": "of the layers",
        "positions": "fixed sine positions are added behind the first layer",
        "mid_norm": "a norm before each GELU",
        "last_norm": "a norm behind the last layer",
        "shared": "of several paths all but the first layer is the same",
        "norm_eps": "of these norms",
    }.items()
}


def shared_fields() -> list[Field]:
    """Every field but those of `model.vision`; made anew at each call, as the doors' tables may have grown."""
    return [
        Field("schema", SCHEMA, whole(SCHEMA, SCHEMA), "version of this table"),
        Field("seed", 0, whole(), "of parameters and of the data order"),
        # The model. `model.<part>` is the fields of the Flax module that the part is.
        Field(
            "model.dtype",
            "bfloat16",
            one_of(("bfloat16", "float32")),
            "of the computation; parameters, softmax, norms and loss are float32",
        ),
        Field(
            "model.scales",
            (576,),
            each(SIZE, least=1, distinct=True),
            "visual tokens per grid, one bank region and one loss group each",
        ),
        Field(
            "model.reduction",
            "pool",
            one_of(REDUCTIONS),
            "how a grid becomes so many tokens: see lmm_jax/reduction.py",
        ),
        Field("model.newline", False, flag(), "a learned vector at the end of each row of a picture's tiles"),
        Field("model.newline_in_stacks", True, flag(), "which every stack adds once more, as DeepStack-L-HD does"),
        Field(
            "model.families.vision",
            "",
            one_of(["", *families.ENCODERS]),
            "the published family of the encoder: what loading and exporting call it; '' for one of our own",
        ),
        Field(
            "model.families.decoder", families.DEFAULT_DECODER, one_of(families.DECODERS), "likewise of the decoder"
        ),
        Field(
            "model.families.projector",
            "",
            one_of(["", *families.PROJECTORS]),
            "likewise of the projector; '' for LLaVA's",
        ),
        Field(
            "model.encoder",
            "vit",
            one_of(ENCODERS),
            "which module the vision encoder is; `config.use_encoder` sets it",
        ),
        *(
            Field(f"model.projector.{name}", PROJECTOR[name], valid, meaning)
            for name, (valid, meaning) in PROJECTOR_FIELDS.items()
        ),
        *(
            Field(
                f"model.level_projector.{name}", None, unset(valid), f"of the encoder's levels, if other: {meaning}"
            )
            for name, (valid, meaning) in PROJECTOR_FIELDS.items()
            if name != "shuffle"
        ),
        Field(
            "model.finer",
            0,
            whole(0, 64, "0 = none"),
            "n: the n × n finer merges beneath each visual token are stacks (DeepStack-E); divides projector.shuffle",
        ),
        Field("model.decoder.vocab_size", 32000, whole(2, 16_000_000), "pieces of the tokenizer"),
        Field("model.decoder.width", 4096, SIZE, "of the residual stream"),
        Field("model.decoder.depth", 32, DEPTH, "layers"),
        Field("model.decoder.heads", 32, SIZE, "heads of attention"),
        Field("model.decoder.kv_heads", 32, SIZE, "fewer than heads: grouped-query attention; divides them"),
        Field("model.decoder.mlp_dim", 11008, whole(1, 16_777_216), "hidden width of a feed-forward layer"),
        Field("model.decoder.head_dim", 0, whole(0, 1_000_000, "0 = width / heads"), "width of a head of attention"),
        Field("model.decoder.tied", False, flag(), "the token table is the head too, which then has no parameters"),
        Field("model.decoder.qk_norm", False, flag(), "queries and keys are normed before they are rotated (Qwen3)"),
        Field("model.decoder.qkv_bias", False, flag(), "the maps to queries, keys and values have biases (Qwen2)"),
        Field("model.decoder.rope_theta", 10000.0, number(1, 1e12, above=True), "base of the rotary positions"),
        Field("model.decoder.rope_scaling", (), ROPE_SCALINGS, "for rows longer than a model was first trained on"),
        Field("model.decoder.rope_axes", (), ROPE_AXES, "positions have three axes: frequencies of each (Qwen3-VL)"),
        Field("model.decoder.multipliers", (), MULTIPLIERS, "of embeddings, layers, scores and logits (Granite)"),
        Field("model.decoder.norm_eps", 1e-5, number(0, 0.1, above=True), "of every norm"),
        Field(
            "model.decoder.inject_layers",
            (),
            each(whole(0, 1_000), distinct=True),
            "stack s is added before layer inject_layers[s]",
        ),
        Field(
            "model.decoder.vocab_multiple",
            128,
            whole(1, 65_536),
            "rows of the token table are a multiple of it, so that they divide over meshes",
        ),
        Field(
            "model.decoder.remat",
            "full",
            one_of(REMAT_POLICIES),
            "a layer recomputes: nothing, all but matmuls (dots), all, or all with its input on the host (offload)",
        ),
        Field(
            "model.router.width",
            0,
            whole(0, 1_000_000, "0 = no router"),
            "of a head that says how likely a question is answered right at each of the scales",
        ),
        Field("model.router.heads", 16, SIZE, "queries by which a question looks at its pictures; divides the width"),
        Field("model.router.tokens", 64, whole(1, 65_536), "of a question that it reads; those behind are left out"),
        Field(
            "model.density_router.width",
            0,
            whole(0, 1_000_000, "0 = none"),
            "of a head that says whether pictures need the largest scale (Granite-Docling); it is read, not trained",
        ),
        Field("model.density_router.threshold", 0.4, number(0, 1), "probability from which on they do"),
        # What a run starts with.
        Field("init.from", None, unset(FOLDER), "workdir whose newest parameters a run starts with"),
        Field("init.vision", None, unset(FOLDER), "folder of a CLIP, a ConvNeXt or a whole model, for the encoder"),
        Field("init.language", None, unset(FOLDER), "folder of a LLaMA or of a whole model, for the decoder"),
        Field("init.projector", None, unset(FOLDER), "folder of a whole model, for projector and newline"),
        Field("init.lora", None, unset(FOLDER), "folder of adapters as PEFT writes them, for those of lora.paths"),
        Field(
            "init.allow_pickle", False, flag(), "reads PyTorch's .bin files in these, by torch's weights-only reader"
        ),
        Field(
            "init.new", (), each(PREFIX, distinct=True), "path prefixes of parameters that start fresh nevertheless"
        ),
        # The data.
        Field("data.path", None, unset(FOLDER), "prepared folder, see `lmm prepare`"),
        Field("data.mixture", (), FOLDERS, "several prepared folders with their weights, instead of data.path"),
        Field("data.train", "train", SPLIT, "split to train on"),
        Field("data.validation", "validation", SPLIT, "split for the validation loss, if the data has it"),
        Field(
            "data.template",
            "qa",
            one_of(families.prompts()),
            "text around the turns, see lmm_jax/data/conversation.py",
        ),
        Field(
            "data.too_long",
            "refuse",
            one_of(TOO_LONG),
            "a conversation longer than a row is left out, or cut after the last answer that fits",
        ),
        Field(
            "data.max_left_out",
            0.05,
            number(0, 1),
            "stop if more of the records than this share cannot be used, mostly as they are too long",
        ),
        Field(
            "data.views", None, unset(whole(0, 1_000_000)), "views of a pack; what leaves the least unused if not set"
        ),
        Field("data.aspect", "pad", one_of(ASPECTS), "how a picture becomes a view: see lmm_jax/data/views.py"),
        Field(
            "data.canvas",
            (),
            CANVAS,
            "of a view with aspect own or native; image_size², or a square of max_pixels, if empty",
        ),
        Field(
            "data.canvases",
            (),
            CANVASES,
            "several of them, of which each step has one: pictures of like shape go together",
        ),
        Field("data.min_pixels", 65_536, whole(1), "of a picture with aspect native, which is enlarged to that"),
        Field("data.max_pixels", 16_777_216, whole(1), "of a picture with aspect native, which is made smaller"),
        Field("data.tilings", (), TILINGS, "tiles of a picture, those that keep most of it if several; () = none"),
        Field(
            "data.zoom",
            1,
            whole(1, 16),
            "every view once more so many times as large, in zoom² tiles (DeepStack-L-HD)",
        ),
        Field(
            "data.sequence",
            "whole",
            one_of(SEQUENCES),
            "what of a picture stands in the sequence: see the table of lmm_jax/data/visual_layout.py",
        ),
        Field("data.stacks", "", one_of(STACKS), "what is added over it in the decoder's layers: see there"),
        Field("data.choice", "most", one_of(CHOICES), "which of several tilings a picture has: see there"),
        Field("data.marks", "", one_of(["", *families.MARKS]), "text inside a picture's block, beside its tiles"),
        Field(
            "data.shrink",
            0,
            whole(0, MOST_SHRINK, "0 = never"),
            "the tiles' tokens are shrunk to about so many views' worth, with data.sequence unpad (LLaVA-OneVision)",
        ),
        Field(
            "data.tiled_alone",
            False,
            flag(),
            "pictures of a conversation that has several are seen whole, padded, without tiles (LLaVA-OneVision)",
        ),
        Field("data.sampling", "2d", one_of(SAMPLINGS), "how tiles become samples: see there"),
        Field("data.rows", None, unset(whole(1, 65_536)), "rows of a pack; as few as leave little unused if not set"),
        Field("data.length", 2048, whole(2, 16_777_216), "positions of a row"),
        Field("data.targets", None, unset(whole(1)), "supervised positions of a pack; all positions if not set"),
        Field("data.threads", 1, whole(1, 1_024), "reader threads"),
        Field("data.workers", 0, whole(0, 1_024, "0 reads in the training process"), "reader processes"),
        Field(
            "data.max_bad_share", 0.001, number(0, 1), "stop when more of the records (of 10,000 at least) are broken"
        ),
        Field("data.max_bad_run", 32, whole(1), "stop when so many records one after another are broken"),
        # Training.
        Field("train.steps", 1000, whole(1), "updates"),
        Field("train.batch_size", 32, PACKS, "packs of a step, over all hosts and micro-batches"),
        Field("train.micro_batches", 1, PACKS, "gradient accumulation; equal to one batch to rounding"),
        Field(
            "train.scales_per_step",
            None,
            unset(whole(1, 1_000)),
            "train so many scales a step, in rotation; all if not set",
        ),
        Field("train.log_every", 50, whole(1), "steps between lines of metrics"),
        Field("train.eval_every", 500, whole(0, special="0 = never"), "steps between validation losses"),
        Field("train.eval_batches", 8, whole(1), "batches of a validation loss"),
        Field("train.save_every", 500, whole(1), "steps between checkpoints; the last step is always saved"),
        Field("train.keep", 2, whole(1), "newest checkpoints to keep"),
        Field("train.keep_every", 0, whole(0, special="0 = none"), "and all whose step this divides"),
        Field("train.max_failed_saves", 3, whole(1), "stop when so many saves one after another failed"),
        Field("train.max_skipped", 10, whole(1), "stop after so many skipped updates in a row"),
        Field(
            "train.skip_spikes",
            False,
            flag(),
            "skip updates whose loss is 6 standard deviations above the latest 128, as those that are not finite",
        ),
        Field(
            "train.compare_every",
            500,
            whole(0, special="0 = only before each save"),
            "steps between comparisons of what several devices hold alike",
        ),
        Field("train.deadline_batch", 600.0, SECONDS, "seconds that the next batch may take"),
        Field("train.deadline_compile", 7200.0, SECONDS, "seconds that a step may take which is compiled first"),
        Field("train.deadline_step", 600.0, SECONDS, "seconds that any other step may take"),
        Field("train.deadline_save", 1800.0, SECONDS, "seconds that a checkpoint may take to be written"),
        Field("optimizer.learning_rate", 2e-5, RATE, "peak"),
        Field("optimizer.groups", (), RATES, "rates of their own: the first match counts, rate 0 freezes"),
        Field("optimizer.warmup", 0.03, number(0, 1, below=True), "share of the steps, not their number"),
        Field("optimizer.final", 0.0, number(0, 1), "learning rate at the end, as a share of the peak"),
        Field("optimizer.b1", 0.9, number(0, 1, below=True), "AdamW's decay of the mean of gradients"),
        Field("optimizer.b2", 0.999, number(0, 1, below=True), "and of the mean of their squares"),
        Field(
            "optimizer.weight_decay",
            0.0,
            number(0, 10),
            "of matrices; norms, biases and tables of positions never decay",
        ),
        Field("optimizer.clip", 1.0, number(0, 1e9, special="0 = no clipping"), "global gradient norm"),
        Field(
            "optimizer.moments",
            "float32",
            one_of(("float32", "bfloat16")),
            "what AdamW's two moments are stored in; bfloat16 is rounded up or down at random",
        ),
        Field(
            "optimizer.second_moment",
            "full",
            one_of(("full", "factored")),
            "factored keeps its means over rows and columns alone, as Adafactor does, and Adam becomes that",
        ),
        Field(
            "optimizer.frozen_dtype",
            "float32",
            one_of(("float32", "bfloat16")),
            "what kernels and the token table are held in if they do not train; bfloat16 needs model.dtype=bfloat16",
        ),
        # Adapters.
        Field("lora.rank", 0, whole(0, 65_536, "0 = no adapters"), "of adapters beside frozen kernels; LLaVA: 128"),
        Field(
            "lora.alpha",
            None,
            unset(number(0, 1e6, above=True)),
            "what adapters give is scaled by alpha / rank; twice the rank if not set, as LLaVA has it",
        ),
        Field(
            "lora.dropout", 0.05, number(0, 1, below=True), "share of what adapters read that is left out in training"
        ),
        Field(
            "lora.paths",
            ("decoder/layers",),
            each(PATTERN, least=1, distinct=True),
            "the linear layers that have one, by the first names of their path; never the head or a router",
        ),
        # Devices.
        Field("mesh.data", 1, DEVICES, "devices over which packs are shared out, with a copy of the parameters each"),
        Field("mesh.fsdp", -1, DEVICES, "devices over which packs and parameters are shared out"),
        Field("mesh.tensor", 1, DEVICES, "devices over which heads and hidden widths are shared out"),
        Field("mesh.context", 1, DEVICES, "devices over which the positions of a row are shared out"),
        Field("rules.batch", ("data", "fsdp"), AXES, f"mesh axes for {LOGICAL_AXES['batch']}"),
        Field("rules.views", ("data", "fsdp", "context"), AXES, f"mesh axes for {LOGICAL_AXES['views']}"),
        Field("rules.length", "context", AXIS, f"mesh axes for {LOGICAL_AXES['length']}"),
        Field("rules.embed", ("fsdp", "context"), AXES, f"mesh axes for {LOGICAL_AXES['embed']}"),
        Field("rules.vocab", "tensor", AXIS, f"mesh axes for {LOGICAL_AXES['vocab']}"),
        Field("rules.heads", "tensor", AXIS, f"mesh axes for {LOGICAL_AXES['heads']}"),
        Field("rules.kv_heads", "tensor", AXIS, f"mesh axes for {LOGICAL_AXES['kv_heads']}"),
        Field("rules.mlp", "tensor", AXIS, f"mesh axes for {LOGICAL_AXES['mlp']}"),
        Field("rules.lora", ("fsdp", "context"), AXES, f"mesh axes for {LOGICAL_AXES['lora']}"),
        # Beside metrics.jsonl.
        Field("log.tensorboard", False, flag(), "writes metrics for TensorBoard too: extra tensorboard"),
        Field("log.wandb", False, flag(), "sends metrics to Weights & Biases too: extra wandb"),
    ]


def vision_fields(encoder) -> list[Field]:
    """The fields of `model.vision` for an encoder of `models.encoders.ENCODERS`."""
    ranges, meanings = encoder_ranges(encoder), encoder_meanings(encoder)
    return [
        Field(f"model.vision.{name}", default, ranges[name], meanings.get(name, ""))
        for name, default in encoder_fields(encoder).items()
    ]


def all_fields(encoder) -> dict[str, Field]:
    """Every field by its name, those of `model.vision` for an encoder of `models.encoders.ENCODERS`."""
    shared = {field.name: field for field in shared_fields()}
    return shared | {field.name: field for field in vision_fields(encoder)}


def rule(axis) -> Field:
    """The field of a logical axis that the table leaves replicated, and that `config.rules` may name nevertheless."""
    return Field(f"rules.{axis}", (), AXES, f"mesh axes for {LOGICAL_AXES[axis]}")
