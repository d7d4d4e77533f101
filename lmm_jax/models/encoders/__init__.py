"""Vision encoders: pictures to grids of features.

An encoder is a Linen module. Its fields, `dtype` apart, are the section `config.model.vision`, so that whatever it
can be told can be set, stored with a run and read back. Beside them it says, as attributes or properties:

    side           of a square view, pixels
    grid           side of such a view's grid of features
    stride         side of the pixels that one feature stands for; what is left of a side at its end is not seen
    level_strides  how much finer than that grid each further map is that it returns, () if it returns one alone
    extra_views    views that each picture brings beside the whole one and that end inside the encoder, mostly 0
    inject_blocks  blocks before which these views are added to the whole one, a sample of them each; () without
    any_shape      whether views may be other than square, each with the `extent` that its picture takes
    mean           RGB in 0..1 of what stands beside a picture in its view

and, which is asked before anything is computed:

    RANGES         what each field may be, a `lmm_jax.ranges.Range` by its name; the others any of their type
    check()        raises ValueError for fields that contradict each other, naming them as fields of the config

What its fields mean stands in its docstring, under "Attributes:". `__call__(pixels, extent)` turns `[N, H, W, 3]`
uint8 views, of which `extent` `[N, 2]` (height, width) pixels are the picture's (None: all), into a tuple of maps
`[N, h, w, C]`: the grid's, then one for each of `level_strides`.

An encoder with a class token may also say how important each cell is, which some reductions need: `gives_importance`
is True then, and `__call__(pixels, extent, importance=True)` adds a last map `[N, h, w, 1]`, float32, the larger the
more important.
"""

import dataclasses
import inspect
import re

from lmm_jax.models.encoders.convnext import ConvNeXt
from lmm_jax.models.encoders.qwen_vit import QwenViT
from lmm_jax.models.encoders.vit import ViT
from lmm_jax.ranges import Range, like

ENCODERS = {"vit": ViT, "convnext": ConvNeXt, "qwen_vit": QwenViT}

_OF_ALL_PARTS = ("dtype", "parent", "name")  # fields that are no section's own: Flax's, and what `config.model` holds


def encoder_fields(name) -> dict:
    """The fields of an encoder with their defaults: the section `config.model.vision`.

    Raises:
      ValueError: an encoder that does not exist.
    """
    return {f.name: f.default for f in dataclasses.fields(_find(name)) if f.name not in _OF_ALL_PARTS}


def encoder_ranges(name) -> dict[str, Range]:
    """What each of these fields may be."""
    return {field: like(default) for field, default in encoder_fields(name).items()} | _find(name).RANGES


def encoder_meanings(name) -> dict[str, str]:
    """What each of these fields means, from the "Attributes:" of the encoder's docstring."""
    attributes = inspect.getdoc(_find(name)).partition("Attributes:\n")[2]
    entries = re.findall(r"^  ([\w, ]+): (.+(?:\n {4}.+)*)", attributes, re.MULTILINE)
    return {field: " ".join(text.split()) for fields, text in entries for field in fields.split(", ")}


def make_encoder(model):
    """The encoder that `config.model` describes.

    Raises:
      ValueError: it does not exist, or its fields contradict each other.
    """
    encoder = _find(model.encoder)(**model.vision, dtype=model.dtype)
    encoder.check()
    return encoder


def _find(name):
    if name not in ENCODERS:
        raise ValueError(f"model.encoder is '{name}', expected one of {sorted(ENCODERS)}")
    return ENCODERS[name]
