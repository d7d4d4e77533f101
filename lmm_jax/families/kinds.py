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
      flat: ours has several axes where theirs has one, as biases by heads do.
    """

    order: tuple[int, ...] = ()
    inputs: int = 1
    side: int | str | None = None
    flat: bool = False


SAME, FLAT = Layout(), Layout(flat=True)
LINEAR, FROM_HEADS = Layout((1, 0)), Layout((1, 0), inputs=2)
DEPTHWISE = Layout((2, 3, 1, 0))
PATCHES, HALVING = Layout((2, 3, 1, 0), side="patch_size"), Layout((2, 3, 1, 0), side=2)

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
      captions: one picture turn and its caption; what the user says is dropped.
      apart: pieces of text are stripped and tokenised on their own, and pictures stay where they are.
    """

    opening: str = ""
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "</s>")
    system: str = ""
    captions: bool = False
    apart: bool = False


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
      keys: key of `config.json` by field of the decoder.
      constants: keys of `config.json` that must have one of these values where they stand; the first is written where
        it is not None.
      defaults: what transformers leaves out of `config.json` because it is its default.
      tensors: by our path below `decoder/`; empty of a family of which the prompt alone is known.
      aliases: (pattern, original name) of the same tensors in other layouts, the first match counts.
      ignored: patterns of tensors that a checkpoint may hold and no model of ours reads, and why.
      tokenizer: kind of its tokenizer, see `data.tokenizer`.
      prompts: its layouts of a conversation by the name in `config.data.template`.
      types: pattern of what a checkpoint says its decoder is, for finding the prompt.
      prompt_rules: (pattern of the checkpoint's name, name of the prompt): the first match counts, None is refused.
    """

    name: str
    title: str
    model_types: tuple[str, ...] = ()
    architecture: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Tensors = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: str = "sentencepiece"
    prompts: Mapping[str, Prompt] = dataclasses.field(default_factory=dict)
    types: str = ""
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
      mean, std: of its published pixel normalisation, RGB in 0..1.
      keys: key of `config.json` by field of the module.
      counts, lasts: further keys that are written: how many entries a field has, and its last one.
      constants, defaults: as of a decoder.
      towers: `config.json` of encoders that a whole model may name without saying what they are.
      told_apart: fields that a folder's `config.json` says and its tensors do not, compared with a run's.
      prefix: of its tensors inside a whole model's tower.
      tensors: by our path below `vision/`.
      blocks: prefix of the numbered blocks, of which those past the hidden state that is read are left out; "" if all
        are read.
      level: (field of the hidden state that is read, field of the depth) that say which, or ().
      unread_norm: the norm behind the last block, which transformers builds and nothing reads; () if there is none:
        its name, and the field whose value, or last value, is its width.
      class_token: whether a token stands before those of the grid, which transformers counts and drops.
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
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    lasts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    towers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    told_apart: tuple[str, ...] = ()
    prefix: str = ""
    tensors: Tensors = dataclasses.field(default_factory=dict)
    blocks: str = ""
    level: tuple[str, ...] = ()
    unread_norm: tuple[str, ...] = ()
    class_token: bool = False
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A family of whole models in the layout of transformers: what its class computes, and what it calls things.

    Attributes:
      name: of the architecture.
      model_type: in `config.json`.
      architecture, processor: its classes in transformers, or in the code that the folder ships.
      encoders: families of encoders that it is made with.
      accepts: values that fields of our config may have, by dotted name.
      nested: whether smaller scales of a grid may be trained beside the whole one.
      image_processors: class of the image processor for each `data.aspect` that it can.
      names: (prefix of LLaVA's original name, prefix here) of tensors, the first match counts.
      constants: keys of `config.json`, as of a decoder.
      level: hidden state of the encoder that is read if `config.json` does not say.
      tilings_key: of the sizes that a picture is tiled to, (height, width) in pixels each; "" if it has none.
      fields: keys of `config.json` that hold a field of our config as it is, by dotted name.
      picture_fields: the same, of `preprocessor_config.json`.
      read_as: fields of our config that no key says, by dotted name.
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
    nested: bool = True
    constants: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    level: int = -2
    tilings_key: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    picture_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    read_as: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
