"""Vision transformer of Qwen3-VL: pictures of any shape to grids of features, all of one model."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.models.attention.attention import attention
from lmm_jax.models.encoders.convnext import cover, space_to_depth
from lmm_jax.models.layers import Dense, LayerNorm, normalise, rotate
from lmm_jax.ranges import COLOUR, SPREAD, each, flag, number, whole
from lmm_jax.sharding import constrain

THETA = 10000.0  # base of the frequencies of its rotary positions


def grid_angles(rows, columns, width):
    """Angles of rotary positions in a plane: `[rows · columns, 1, width / 2]` float32, for `layers.rotate`.

    The first half of the frequencies turns with the row, the second with the column; both have the same ones.

    Args:
      rows, columns: of the grid.
      width: of a head of attention, a multiple of 4.
    """
    frequency = THETA ** (-jnp.arange(width // 4, dtype=jnp.float32) / (width // 4))
    row, column = (jnp.arange(n, dtype=jnp.float32)[:, None] * frequency for n in (rows, columns))
    shape = (rows, columns, width // 4)
    both = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None], shape)
    return jnp.concatenate(both, axis=-1).reshape(rows * columns, 1, width // 2)


def between(count, length, side):
    """Shares of a row of `side` learned vectors in each of `length` places, of which `count` are a picture's.

    The picture's first and last place have the first and last vector, and those between are interpolated linearly.

    Args:
      count: `[N]` int.
      length: int.
      side: int.

    Returns:
      `[N, length, side]` float32; of the picture's places each sums to 1.
    """
    at = jnp.arange(length, dtype=jnp.float32) * (side - 1) / jnp.maximum(count - 1, 1)[:, None]
    return jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(side, dtype=jnp.float32)), 0)


class QwenBlock(nn.Module):
    """Pre-norm transformer block over `[N, T, C]`, with rotary positions and attention inside segments."""

    heads: int
    mlp_dim: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x, angles, segment):
        """`angles`: of `grid_angles`; `segment`: `[N, T]` int, or None for one. Returns `x` anew, and None."""
        C = x.shape[-1]
        head = (self.heads, C // self.heads)
        y = LayerNorm(self.norm_eps, name="norm_1")(x)
        q, k, v = (Dense(head, ("embed",), ("heads", "head_dim"), True, self.dtype, name=name)(y) for name in "qkv")
        y = attention(rotate(q, angles), rotate(k, angles), v, segment, rows="views")
        x += Dense((C,), ("heads", "head_dim"), ("embed",), True, self.dtype, name="o")(y)
        y = LayerNorm(self.norm_eps, name="norm_2")(x)
        y = Dense((self.mlp_dim,), ("embed",), ("mlp",), True, self.dtype, name="up")(y)
        x += Dense((C,), ("mlp",), ("embed",), True, self.dtype, name="down")(nn.gelu(y))
        return constrain(x, "views", None, "act_embed"), None


class QwenViT(nn.Module):
    """Qwen3-VL's vision transformer, up to what its mergers take: those are the projectors here.

    It was made for clips, of which `frames` pictures at a time become one grid. A picture is a clip that shows it in
    each of them. Learned positions are interpolated to the grid that a picture has by itself, and cells that its
    canvas has beside it are attended to by none of its own, so that it gives what it gives alone.

    The blocks are scanned in runs, each named after its first block (`blocks_0`); a run ends behind each of
    `stack_levels`.

    Attributes:
      image_size: side of a square picture, pixels, which scales are counted for; others are allowed.
      patch_size: side of a patch, pixels.
      frames: pictures of a clip that a patch goes through.
      positions: learned positions, those of a square grid.
      width, depth, heads, mlp_dim: sizes.
      stack_levels: further hidden states to return, ascending: i is what i blocks give. Qwen3-VL's own numbers say
        after which block, counted from 0, so that its 8, 16 and 24 are 9, 17 and 25.
      norm_eps: of the layer norms.
      mean, std: pixel normalisation, RGB in 0..1.
      dtype: of the computation.
      remat: recomputes each block in the backward pass.
    """

    image_size: int = 768
    patch_size: int = 16
    frames: int = 2
    positions: int = 2304
    width: int = 1152
    depth: int = 27
    heads: int = 16
    mlp_dim: int = 4304
    stack_levels: tuple[int, ...] = (9, 17, 25)
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: str = "float32"
    remat: bool = True

    RANGES = {  # noqa: RUF012
        "image_size": whole(1, 65_536),
        "patch_size": whole(1, 65_536),
        "frames": whole(1, 64),
        "positions": whole(1, 1_000_000),
        "width": whole(1, 1_000_000),
        "depth": whole(1, 1_000),
        "heads": whole(1, 1_000_000),
        "mlp_dim": whole(1, 1_000_000),
        "stack_levels": each(whole(1, 1_000), distinct=True),
        "norm_eps": number(0, 0.1, above=True),
        "mean": COLOUR,
        "std": SPREAD,
        "remat": flag(),
    }

    def check(self):
        """Raises ValueError for fields that contradict each other, naming them as fields of the config."""
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.vision: pictures of {self.image_size} pixels (image_size) do not divide into patches of "
                f"{self.patch_size} (patch_size)"
            )
        if self.width % (4 * self.heads):
            raise ValueError(
                f"model.vision: width {self.width} does not divide into {self.heads} heads of a multiple of 4, as "
                "rotary positions in a plane need"
            )
        if math.isqrt(self.positions) ** 2 != self.positions:
            raise ValueError(f"model.vision.positions={self.positions} is no square of a number")
        levels = tuple(self.stack_levels)
        if list(levels) != sorted(set(levels)) or not all(0 < level <= self.depth for level in levels):
            raise ValueError(
                f"model.vision.stack_levels={levels}: expected hidden states from 1 to {self.depth}, the last of "
                f"model.vision.depth={self.depth}, in ascending order"
            )

    @property
    def side(self) -> int:
        """Side of a square view, pixels."""
        return self.image_size

    @property
    def grid(self) -> int:
        """Side of a square picture's feature grid."""
        return self.image_size // self.patch_size

    @property
    def stride(self) -> int:
        """Side of the pixels that one feature stands for."""
        return self.patch_size

    @property
    def extra_views(self) -> int:
        """None: every view goes through the whole encoder."""
        return 0

    @property
    def inject_blocks(self) -> tuple[int, ...]:
        """None: no view is added to another inside."""
        return ()

    @property
    def any_shape(self) -> bool:
        """Any number of rows and columns of patches."""
        return True

    @property
    def level_strides(self) -> tuple[int, ...]:
        """How much finer than the bank's grid each of `stack_levels` is."""
        return (1,) * len(self.stack_levels)

    def runs(self) -> list[tuple[int, int]]:
        """First block and end of each scanned run."""
        edges = sorted({0, *self.stack_levels, self.depth})
        return list(itertools.pairwise(edges))

    @nn.compact
    def __call__(self, pixels, extent=None):
        """Encodes `[N, H, W, 3]` uint8 pictures.

        Args:
          pixels: the pictures, each at the top left of its canvas.
          extent: `[N, 2]` int, height and width of each picture; None if they fill their canvases.

        Returns:
          `[N, H // patch_size, W // patch_size, C]` of the last block, then of each of `stack_levels`. Of
          cells beside a picture they say nothing.
        """
        p = self.patch_size
        x = space_to_depth(normalise(pixels, self.mean, self.std), p)
        N, h, w, _ = x.shape
        x = jnp.concatenate([x.reshape(N, h * w, -1)] * self.frames, axis=-1)
        x = Dense((self.width,), ("pixels",), ("embed",), True, self.dtype, name="patches")(x)
        x = constrain(x + self._positions(extent, N, h, w).astype(x.dtype), "views", None, "act_embed")
        angles = grid_angles(h, w, self.width // self.heads)
        segment = None if extent is None else cover(extent, h, w, p).reshape(N, h * w).astype(jnp.int32)
        states = {}
        for start, end in self.runs():
            x = self._run(start, end)(x, angles, segment)[0]
            states[end] = x.reshape(N, h, w, self.width)
        return states[self.depth], *(states[level] for level in self.stack_levels)

    def _positions(self, extent, N, h, w):
        """Learned positions, interpolated to the grid of each picture: `[N or 1, h · w, C]` float32."""
        side = math.isqrt(self.positions)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("positions", "embed"))
        table = self.param("position", init, (self.positions, self.width), jnp.float32)
        if extent is None:
            rows, columns = jnp.full(1, h), jnp.full(1, w)
        else:
            rows, columns = extent[:, 0] // self.patch_size, extent[:, 1] // self.patch_size
        # Matrices, as the gradient of a gather is slow on a TPU; of full precision there too.
        x = jnp.einsum(
            "nhp,nwq,pqc->nhwc",
            between(rows, h, side),
            between(columns, w, side),
            table.reshape(side, side, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        return x.reshape(len(rows), h * w, self.width)

    def _run(self, start, end):
        """The blocks from `start` to `end` (exclusive) as one scan."""
        blocks = nn.scan(
            nn.remat(QwenBlock, prevent_cse=False) if self.remat else QwenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=end - start,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return blocks(self.heads, self.mlp_dim, self.norm_eps, self.dtype, name=f"blocks_{start}")
