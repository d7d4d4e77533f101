"""What there is to say of a published model family: of a decoder, of an encoder, and of a whole model made of both.

A family is data: names, sizes, constants. Whatever reads or writes published models asks it, so that another family
is another file beside this one and a line in the tables of `lmm_jax.families`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a published tensor lies beside the parameter of ours that it becomes.

    Attributes:
      order: axes of theirs, in our order; () keeps them.
      inputs: of a matrix, how many of our leading axes are its inputs: 2 where they are heads and their width.
      side: of a convolution whose stride is its kernel, which is a matrix of ours: the side of its kernel, or the
        field of the module that holds it.
      frames: of a convolution over pictures in time too, the field of how many.
      flat: ours has several axes where theirs has one, as biases by heads do.
      fused: names of ours, one beside the other in a module, of which theirs has one after the other along its first
        axis: queries, keys and values, or gate and up.
    """

    order: tuple[int, ...] = ()
    inputs: int = 1
    side: int | str | None = None
    frames: str = ""
    flat: bool = False
    fused: tuple[str, ...] = ()


SAME, FLAT = Layout(), Layout(flat=True)
LINEAR, FROM_HEADS = Layout((1, 0)), Layout((1, 0), inputs=2)
FUSED_QKV, FUSED_GATE_UP = (Layout((1, 0), fused=names) for names in (("q", "k", "v"), ("gate", "up")))
FUSED_QKV_BIAS = Layout(flat=True, fused=("q", "k", "v"))
DEPTHWISE = Layout((2, 3, 1, 0))
PATCHES, HALVING = Layout((2, 3, 1, 0), side="patch_size"), Layout((2, 3, 1, 0), side=2)
CLIPS = Layout((2, 3, 4, 1, 0), side="patch_size", frames="frames")

# Of a name in the tables below: `{layer}` is the number of the layer, of which ours holds all of a scan in one array,
# and `{stage}` that of a stage. In our paths `blocks_#` is a scan that begins with block #, `stage_#` counts from 1.
Tensors = Mapping[str, tuple[str, Layout]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text around each turn; control pieces in it (`</s>`, `<|end|>`) become ids where the tokenizer has them.

    What stands in `assistant` is supervised, and is where generation begins. Its end is where an answer stops.

    Attributes:
      opening: before the first user's text; `SYSTEM` in it is where a system turn goes.
      user: before a later user's text, and after each.
      assistant: before and after an assistant's text.
      system: system prompt of a conversation without a system turn.
      without_system: before the first user's text, in place of `opening`, where there is no system turn; None of a
        layout that has a system prompt of its own, or never one.
      picture: before and after each picture, which stays where it is; a line break behind `<image>` belongs to the
        tag and is left out. None as LLaVA has it: a single picture stands before the text, on a line of its own.
      before_text: before a user's text that does not begin with a picture.
      trimmed: white space around what is said is left out.
      captions: one picture turn and its caption; what the user says is dropped.
      apart: pieces of text are stripped and tokenised on their own, and pictures stay where they are.
    """

    opening: str = ""
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "</s>")
    system: str = ""
    without_system: str | None = None
    picture: tuple[str, str] | None = None
    before_text: str = ""
    trimmed: bool = False
    captions: bool = False
    apart: bool = False


MOST_SIDE = 16  # tiles that a side of a picture may have where no tilings are listed
SYSTEM = "{system}"  # where the system prompt goes in `Prompt.opening`


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A family of language models.

    Attributes:
      name: in our configs, `config.model.families.decoder`.
      title: for readers.
      model_types: in `config.json`; the first is written, all are read.
      architecture: its class in transformers.
      sizes: fields of `models.decoder.Decoder` by the name of a size.
      fields: fields of the decoder that the family fixes, such as whether queries and keys are normed; a model that
        differs in one is not of the family.
      keys: key of `config.json` by field of the decoder; of a field of several numbers a key for each.
      rope_types: kinds of `model.decoder.rope_scaling` that its class computes.
      axes_key: key, beside those of rotary positions, of `model.decoder.rope_axes`; "" if positions have one axis.
      axes_constants: as `constants`, of keys beside it.
      window: key of `config.json` of how many positions attention looks back, no fewer than a row has; ""
        if there is none. `window_switch` is a key that must be true for it to count.
      constants: keys of `config.json` that must have one of these values where they stand; the first is written where
        it is not None.
      defaults: what transformers leaves out of `config.json` because it is its default.
      tensors: by our path below `decoder/`; empty of a family of which the prompt alone is known.
      aliases: (pattern, original name) of the same tensors in other layouts, the first match counts.
      ignored: patterns of tensors that a checkpoint may hold and no model of ours reads, and why.
      tokenizer: kind of its tokenizer, see `data.tokenizer`.
      prompts: its layouts of a conversation by the name in `config.data.template`.
      types: pattern of what a checkpoint says its decoder is, for finding the prompt.
      wholes: pattern of `model_type` of whole models that have its prompts, whatever their decoder is.
      prompt_rules: (pattern of the checkpoint's name and type, name of the prompt): the first match counts, None is
        refused.
    """

    name: str
    title: str
    model_types: tuple[str, ...] = ()
    architecture: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str | tuple[str, ...]] = dataclasses.field(default_factory=dict)
    rope_types: tuple[str, ...] = ()
    axes_key: str = ""
    axes_constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    window: str = ""
    window_switch: str = ""
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Tensors = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: str = "sentencepiece"
    prompts: Mapping[str, Prompt] = dataclasses.field(default_factory=dict)
    types: str = ""
    wholes: str = ""
    prompt_rules: tuple[tuple[str, str | None], ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A family of vision encoders.

    Attributes:
      name: in our configs, `config.model.families.vision`.
      title: for readers.
      encoder: module that computes it, in `models.encoders.ENCODERS`.
      model_types: in `config.json`; the first is written, all are read.
      told_by: key of `config.json` that tells it where no `model_type` does.
      sizes: fields of the module by the name of a size.
      fields: fields of the module that the family fixes; a model that differs in one is not of the family.
      usual: fields that a model of the family starts with, and may change.
      mean, std: of its published pixel normalisation, RGB in 0..1.
      keys: key of `config.json` by field of the module.
      counts, lasts: further keys that are written: how many entries a field has, and its last one.
      constants, defaults: as of a decoder.
      positives: keys of numbers that leave tensors out where they are not above 0.
      towers: `config.json` of encoders that a whole model may name without saying what they are.
      told_apart: fields that a folder's `config.json` says and its tensors do not, compared with a run's.
      prefix: of its tensors inside a whole model's tower.
      tensors: by our path below `vision/`.
      blocks: prefix of the numbered blocks, of which those past the hidden state that is read are left out; "" if all
        are read.
      level: (field of the hidden state that is read, field of the depth) that say which, or ().
      table: field of how many positions its square table has, those of the square view that scales are counted for;
        "" where `config.json` says the side of a view.
      levels_key: of the blocks, counted from 0, whose outputs are `stack_levels`; "" if none are read.
      unread_norm: the norm behind the last block, which transformers builds and nothing reads; () if there is none:
        its name, and the field whose value, or last value, is its width.
      class_token: whether a token stands before those of the grid, which transformers counts and drops.
      misplaced: features a side of square views at which its class gives some of them another position than ours.
      image_processor: class of transformers that makes its pixels.
      aliases: (pattern, name below `prefix`) of the same tensors in other layouts, the first match counts.
      ignored: as of a decoder.
    """

    name: str
    title: str
    encoder: str
    model_types: tuple[str, ...]
    told_by: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_processor: str
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lasts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    positives: tuple[str, ...] = ()
    towers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    told_apart: tuple[str, ...] = ()
    prefix: str = ""
    tensors: Tensors = dataclasses.field(default_factory=dict)
    blocks: str = ""
    level: tuple[str, ...] = ()
    table: str = ""
    levels_key: str = ""
    unread_norm: tuple[str, ...] = ()
    class_token: bool = False
    misplaced: tuple[int, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Projector:
    """A family of what stands between encoder and decoder, where it is not LLaVA's, which is named "".

    Attributes:
      name: in our configs, `config.model.families.projector`.
      title: for readers.
      fields: fields of `models.projector.Projector` that it fixes; a model that differs in one is not of the family.
      level_fields: the same of what stands behind the encoder's levels, where those differ.
      paths: what it calls its paths, those of `shuffle` in order; `{path}` in the names below.
      tensors: by our path below `projector/` without the number of its path, under the names of the whole model.
      level_tensors: by our path below `level_projectors_#/`; `{level}` is that number.
      prefixes: with which all of their names begin.
      shuffle_key: of the first of `shuffle`.
      finer_key: where this is true there is a second path, of half that; "" if there is only one.
      finer_word: argument of the whole model's processor that, if true, asks for the second path; "" as finer_key.
      width_key: of the decoder's width among the keys of the encoder; "" if none says it.
      of_tower: whether these keys stand among those of the encoder, or else among those of the whole model.
    """

    name: str
    title: str
    fields: Mapping[str, Any]
    tensors: Tensors
    prefixes: tuple[str, ...]
    shuffle_key: str
    paths: tuple[str, ...] = ("",)
    level_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    level_tensors: Tensors = dataclasses.field(default_factory=dict)
    finer_key: str = ""
    finer_word: str = ""
    width_key: str = ""
    of_tower: bool = True


@dataclasses.dataclass(frozen=True)
class Marks:
    """Text inside the block of a picture, around what stands for its views; control pieces become ids.

    Attributes:
      alone: before and after a picture that is seen whole, without tiles.
      tile: before each tile; `{row}` and `{column}` count from 1.
      row_end: behind each row of tiles.
      whole: before and after the whole picture, which follows the tiles.
    """

    alone: tuple[str, str] = ("", "")
    tile: str = ""
    row_end: str = ""
    whole: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True)
class Whole:
    """A family of whole models in the layout of transformers: what its class computes, and what it calls things.

    Attributes:
      name: of the architecture.
      model_type: in `config.json`.
      architecture, processor: its classes in transformers, or in the code that the folder ships.
      encoders: families of encoders that it is made with.
      decoders: families of decoders that it is made with; () for all that no other whole names.
      projector: family of its projector, "" for LLaVA's.
      marks: name in `families.MARKS` of the text inside a picture's block, "" for none.
      accepts: values that fields of our config may have, by dotted name.
      nested: whether smaller scales of a grid may be trained beside the whole one.
      divides_logits: whether its class divides logits by the last of Granite's multipliers, as that of the decoder
        alone does; LLaVA's classes have a head of their own, which does not.
      image_processors: class of the image processor for each `data.aspect` that it can.
      names: (prefix of LLaVA's original name, prefix here) of tensors, the first match counts.
      modules: (prefix of a tensor's name here, prefix of its module in transformers 5), where they differ.
      constants: keys of `config.json`, as of a decoder.
      defaults: of `config.json` and `preprocessor_config.json`, as of a decoder.
      picture_constants: keys of `preprocessor_config.json`, as of a decoder; empty if the code that the folder ships
        asks none of them.
      picture_defaults: what its image processor has where that file says nothing or null, if other than CLIP's.
      level: hidden state of the encoder that is read if `config.json` does not say.
      tilings_key: of the sizes that a picture is tiled to, (height, width) in pixels each; "" if it has none.
      shrink_key: of "anyres_max_n", where n is `data.shrink`; "" if tiles are never shrunk.
      most_tiles_key, fewest_tiles_key: of the image processor, how many tiles a picture may have, of which each side
        is at most `MOST_SIDE`; "" where tilings are listed or there are none.
      tile_key: of the image processor, the side of a tile of pictures of aspect "longest", whose own longest side is
        its size; "" of others.
      llava_keys: whether `config.json` says which features are read, as LLaVA's classes do.
      image_key: of the id of a picture's placeholder.
      image_piece: that placeholder.
      piece_keys: piece by key of `config.json` that holds its id, of those that the tokenizer has.
      pixels: whether the sizes of the image processor are how many pixels a picture has at least and at most.
      inside: whether that id is one of the tokenizer's pieces, so that the table has rows behind it.
      optional: as `fields`, of keys that may be missing or null, which stand for the field's default.
      fields: keys of `config.json` that hold a field of our config as it is, by dotted name.
      picture_fields: the same, of `preprocessor_config.json`.
      read_as: fields of our config that no key says, by dotted name.
      processor_needs: packages that its processor in transformers asks for, beside torch: those that take films too
        do not begin without the packages for these.
      auto_map: of the code that the folder ships, which lies in `hf/NAME/`; empty if transformers has the class.
      aliases: (pattern, LLaVA's original name) of tensors in the layouts of transformers, the first match counts.
    """

    name: str
    model_type: str
    architecture: str
    processor: str
    encoders: tuple[str, ...]
    accepts: Mapping[str, tuple[Any, ...]]
    image_processors: Mapping[str, str]
    names: tuple[tuple[str, str], ...]
    modules: tuple[tuple[str, str], ...] = ()
    decoders: tuple[str, ...] = ()
    projector: str = ""
    marks: str = ""
    nested: bool = True
    divides_logits: bool = False
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    picture_constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    picture_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    level: int = -2
    tilings_key: str = ""
    shrink_key: str = ""
    most_tiles_key: str = ""
    fewest_tiles_key: str = ""
    tile_key: str = ""
    llava_keys: bool = True
    image_key: str = "image_token_index"
    image_piece: str = "<image>"
    piece_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    pixels: bool = False
    inside: bool = False
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    picture_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read_as: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processor_needs: tuple[str, ...] = ()
    auto_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()

    @property
    def code(self) -> tuple[str, ...]:
        """Files of the code that the folder ships."""
        return tuple(sorted({f"{name.split('.')[0]}.py" for name in self.auto_map.values()}))


@dataclasses.dataclass(frozen=True)
class Original:
    """The layout in which a project's own code releases whole models, beside that of transformers.

    Attributes:
      name: of the layout, for `lmm export --layout`.
      title: whose it is, for readers.
      told_by: key of `config.json` that no other layout has.
      architecture, model_type: that are written.
      tower, projector, newline: prefixes of the tensors of the encoder and of the projector, and name of the newline.
      constants: keys of `config.json`, as of a decoder.
      picture_constants: as of a whole model.
      keys: key of `config.json` of what it says, by a word of ours: see `hf.read_config`.
      merges: `data.sequence` of each way to put tiles together.
      stacking: words for what is stacked, see `Stacking`.
    """

    name: str
    title: str
    told_by: str
    architecture: str
    model_type: str
    tower: str
    projector: str
    newline: str
    constants: Mapping[str, tuple[Any, ...]]
    picture_constants: Mapping[str, tuple[Any, ...]]
    keys: Mapping[str, str]
    merges: Mapping[str, str]
    stacking: "Stacking"


@dataclasses.dataclass(frozen=True)
class Stacking:
    """How an original layout says which tokens are stacked, and where.

    Attributes:
      aspect: value of the aspect's key that says so.
      crops, sampling, first, interval, doubled, words: its keys: the most tiles, how they are sampled, the first
        layer and the distance between layers, whether tiles are doubled, and further words, joined by "+".
      square: the word for tiles n · n alone.
      keeps_aspect: words that keep the aspect ratio of tiles; the first is written.
      inside: the word for stacks inside the encoder, and the beginning of the one that says from which block.
      changes: fields of `config.data` by further words.
    """

    aspect: str
    crops: str
    sampling: str
    first: str
    interval: str
    doubled: str
    words: str
    square: str
    keeps_aspect: tuple[str, ...]
    inside: tuple[str, str]
    changes: Mapping[str, Mapping[str, Any]]
