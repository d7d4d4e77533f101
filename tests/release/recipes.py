"""Every published recipe at tiny size."""

import pathlib

import pytest

from lmm_jax.data.tokenizer.sentencepiece import SentencePiece, train_tokenizer

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
DECODER = (
    "model.dtype=float32",
    "model.decoder.width=32",
    "model.decoder.heads=4",
    "model.decoder.kv_heads=2",
    "model.decoder.mlp_dim=64",
    "model.decoder.depth=4",
    "data.length=512",
)
VIT = (
    "model.vision.image_size=32",
    "model.vision.patch_size=8",
    "model.vision.width=16",
    "model.vision.heads=2",
    "model.vision.mlp_dim=32",
    "model.vision.depth=4",
    "model.scales=(16,)",
)
CONVNEXT = (
    "model.vision.image_size=128",
    "model.vision.depths=(1,1,2,1,1)",
    "model.vision.widths=(8,8,16,16,24)",
    "model.scales=(4,)",
)
# recipe: config file, what makes it small, and the architecture of transformers that holds it
RECIPES = {
    "llava": ("llava.py", VIT, "llava"),
    "llava_next": ("llava.py:view=next", VIT, "llava_next"),
    "m3": ("m3.py", (*VIT[:-1], "model.scales=(1,4,16)"), "llava"),
    "convllava": ("convllava.py:pixels=768", CONVNEXT, "fast_vlm"),
    "deepstack_l": ("deepstack.py", (*VIT, "model.decoder.inject_layers=(0,1,2,3)"), "deepstack_llava"),
    "deepstack_hd": ("deepstack.py:recipe=hd", (*VIT, "model.decoder.inject_layers=(0,1,2,3)"), "deepstack_llava"),
    "deepstack_v": ("deepstack.py:recipe=v", (*VIT, "model.vision.regroup=(1,2)"), "deepstack_llava"),
}
LINES = ["What is it?", "Read the text in the picture.", "How many are there? a cat, a dog, 7 of them"] * 20
TOKENIZER = SentencePiece(train_tokenizer(LINES, 400, byte_fallback=True))


def by_default(*names):
    """All recipes, of which those that are not named need --long; DeepStack's own tests compare its by default."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.long) for name in RECIPES]
