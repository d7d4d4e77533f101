"""From features of the encoder to vectors of the decoder: linear layers, of which one token may take several cells.

LLaVA's projector is two linear layers. Later families first *shuffle* the grid (space to depth): k × k cells become
one, of k² times as many channels, so that a grid costs k² times fewer positions and loses nothing before the first
linear layer. What each does beside that is a field:

| family | shuffle | order | norm | hidden | bias | positions | mid_norm, last_norm |
|---|---|---|---|---|---|---|---|
| LLaVA, LLaVA-OneVision | (1,) | | "" | output | yes | no | no |
| SmolVLM, Idefics3 | (4,) | cells | "" | one layer | no | no | no |
| Qwen3-VL, bank | (2,) | cells | cells | input | yes | no | no |
| Qwen3-VL, levels | (2,) | cells | block | input | yes | no | no |
| Granite-Docling, bank | (4, 2) | cells | cells | output | no | yes | yes |
| Granite-Docling, levels | (4, 2) | cells | block | output | yes | no | no |
| Mistral 3 | (2,) | channels | cells | | | | |
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from lmm_jax.models.layers import Dense, LayerNorm
from lmm_jax.ranges import each, flag, number, one_of, whole

ORDERS = ("cells", "channels")
NORMS = ("", "cells", "block")
HIDDEN = ("output", "input")


def shuffle(grids, k, order="cells"):
    """Makes k × k cells one: `[..., h, w, C]` to `[..., h / k, w / k, k² · C]`; what is left over is dropped.

    Args:
      grids: the features.
      k: cells a side of a block.
      order: of what a block becomes. "cells": all channels of its first cell, then of the next in its row (Idefics3,
        SmolVLM, Granite-Docling, InternVL, Qwen3-VL). "channels": all cells of the first channel, then of the next
        (Mistral 3).
    """
    if k == 1:
        return grids
    *lead, h, w, C = grids.shape
    rows, columns = h // k, w // k
    x = grids[..., : rows * k, : columns * k, :].reshape(*lead, rows, k, columns, k, C)
    x = x.swapaxes(-4, -3)  # [..., rows, columns, k, k, C]
    if order == "channels":
        x = jnp.moveaxis(x, -1, -3)
    return x.reshape(*lead, rows, columns, k * k * C)


def sine_positions(rows, columns, width) -> np.ndarray:
    """Fixed positions of a grid, `[rows, columns, width]` float32 (Granite-Docling, after ViT-MAE).

    A quarter of the channels each is sine and cosine of the column, then sine and cosine of the row, of frequencies
    from 1 down to 1 / 10,000.
    """
    frequency = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = (np.arange(n)[:, None] * frequency for n in (rows, columns))
    row, column = (np.concatenate([np.sin(x), np.cos(x)], axis=1) for x in (row, column))
    shape = (rows, columns, width // 2)
    both = np.broadcast_to(column[None], shape), np.broadcast_to(row[:, None], shape)
    return np.concatenate(both, axis=-1).astype(np.float32)


class Projector(nn.Module):
    """`depth` linear layers with exact GELU between them, after a shuffle: LLaVA's `mlp2x_gelu` by default.

    Attributes:
      width: decoder width D.
      depth: linear layers.
      shuffle: cells a side that become one token; several where the model has a *path* for each number of tokens, of
        which each scale takes one, see `reduction.factor_of`.
      order: of a shuffled block, see `shuffle`.
      norm: a layer norm of each cell before the shuffle ("cells"), of each block behind it ("block"), or "" for none.
      hidden: width of what stands between the layers: that of the "output" D, or that of the "input".
      bias: of the linear layers.
      positions: `sine_positions` are added to what the first layer gives.
      mid_norm: a layer norm before each GELU.
      last_norm: a layer norm behind the last layer.
      shared: of several paths the norms and all layers but the first are the same; else each has its own.
      norm_eps: of the norms.
      dtype: of the computation.
    """

    width: int = 4096
    depth: int = 2
    shuffle: tuple[int, ...] = (1,)
    order: str = "cells"
    norm: str = ""
    hidden: str = "output"
    bias: bool = True
    positions: bool = False
    mid_norm: bool = False
    last_norm: bool = False
    shared: bool = False
    norm_eps: float = 1e-5
    dtype: str = "float32"

    RANGES = {  # noqa: RUF012
        "depth": whole(1, 64),
        "shuffle": each(whole(1, 64), least=1, distinct=True),
        "order": one_of(ORDERS),
        "norm": one_of(NORMS),
        "hidden": one_of(HIDDEN),
        "bias": flag(),
        "positions": flag(),
        "mid_norm": flag(),
        "last_norm": flag(),
        "shared": flag(),
        "norm_eps": number(0, 0.1, above=True),
    }

    @nn.compact
    def __call__(self, x, factor=None):
        """Projects features `[..., h, w, C]` to `[..., h / factor, w / factor, D]`.

        Args:
          x: the features.
          factor: one of `shuffle`, the first if None.
        """
        factor = self.shuffle[0] if factor is None else factor
        own = f"_by_{factor}" if len(self.shuffle) > 1 else ""
        common = "" if self.shared else own
        if self.norm == "cells":
            x = LayerNorm(self.norm_eps, name=f"norm{common}")(x)
        x = shuffle(x, factor, self.order)
        if self.norm == "block":
            x = LayerNorm(self.norm_eps, name=f"norm{common}")(x)
        between = self.width if self.hidden == "output" else x.shape[-1]
        for i in range(self.depth):
            if i and self.mid_norm:
                x = LayerNorm(self.norm_eps, name=f"norm_{i}{common}")(x)
            x = nn.gelu(x, approximate=False) if i else x
            axes = ("embed", "mlp") if i % 2 == 0 else ("mlp", "embed")
            width = self.width if i == self.depth - 1 else between
            name = f"linear_{i}{common if i else own}"
            x = Dense((width,), axes[:1], axes[1:], self.bias, self.dtype, name=name)(x)
            if i == 0 and self.positions:
                x += sine_positions(*x.shape[-3:]).astype(x.dtype)
        return LayerNorm(self.norm_eps, name=f"norm_last{common}")(x) if self.last_norm else x
