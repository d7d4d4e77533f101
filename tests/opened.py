"""What a config alone says of its stream and of its packs, for tests that have nothing else to say about either."""

from lmm_jax.config import visual_layout
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.pipeline import Packs


def open_packs(config, *args, **kwargs):
    """`Packs` with the visual layout of its config."""
    return Packs(config, visual_layout(config), *args, **kwargs)


def pack_layout(config, capacity=None):
    """`PackLayout` with the visual layout of its config."""
    return PackLayout.from_config(config, visual_layout(config), capacity)
