"""Vision transformer of CLIP and of SigLIP: pictures to grids of features."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.models.attention.attention import attention
from lmm_jax.models.layers import Dense, LayerNorm, normalise
from lmm_jax.models.visual_tokens import sample_strided, tile_mosaic
from lmm_jax.ranges import COLOUR, SPREAD, Range, each, flag, number, one_of, together, whole
from lmm_jax.sharding import constrain


def quick_gelu(x):
    """`x · sigmoid(1.702 x)`, the activation CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": nn.gelu,
}

REGROUPINGS = Range(
    tuple,
    "(), or (layer, n): the tiles, n · n of 2 to 16, enter before that layer",
    lambda x: x == () or together(whole(0, 1_000), whole(2, 16), what="").holds(x),
)


def class_attention(q, k):
    """What share of the class token's attention each patch receives, the mean over heads.

    Args:
      q: queries `[N, T, H, d]`, the class token's first.
      k: keys, as `q`.

    Returns:
      `[N, T - 1]` float32; what is missing to a sum of 1 is the class token's attention to itself.
    """
    logits = jnp.einsum("nhd,nthd->nht", q[:, 0] * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return nn.softmax(logits).mean(axis=1)[:, 1:]


class ViTBlock(nn.Module):
    """Pre-norm transformer block over `[N, T, C]`, with a stack added first where `number` is not negative.

    `stacks` are `[S, N, cells, C]`; a class token before the cells receives nothing. Beside the hidden states it
    gives the block's `class_attention` if `importance` is set, or else None.
    """

    heads: int
    mlp_dim: int
    norm_eps: float
    dtype: str
    importance: bool = False
    activation: str = "quick_gelu"

    @nn.compact
    def __call__(self, x, number, stacks):
        if stacks is not None:
            added = jax.lax.dynamic_index_in_dim(stacks, jnp.maximum(number, 0), keepdims=False)
            x = jnp.where(number >= 0, x.at[:, x.shape[1] - added.shape[1] :].add(added), x)
        C = x.shape[-1]
        head = (self.heads, C // self.heads)
        y = LayerNorm(self.norm_eps, name="norm_1")(x)
        q, k, v = (Dense(head, ("embed",), ("heads", "head_dim"), True, self.dtype, name=name)(y) for name in "qkv")
        y = attention(q, k, v, rows="views")
        x += Dense((C,), ("heads", "head_dim"), ("embed",), True, self.dtype, name="o")(y)
        y = LayerNorm(self.norm_eps, name="norm_2")(x)
        y = Dense((self.mlp_dim,), ("embed",), ("mlp",), True, self.dtype, name="up")(y)
        y = ACTIVATIONS[self.activation](y)
        x += Dense((C,), ("mlp",), ("embed",), True, self.dtype, name="down")(y)
        return constrain(x, "views", None, "act_embed"), class_attention(q, k) if self.importance else None


class ViT(nn.Module):
    """ViT up to one hidden state, without class token in the result.

    The defaults are those of CLIP; SigLIP has no class token and no norm before its blocks, but biases of patches.

    The blocks are scanned in runs, each named after its first block (`blocks_0`); a run ends where a hidden state is
    wanted or where tiles enter.

    Attributes:
      image_size: side of a picture, pixels.
      patch_size: side of a patch, pixels.
      cut_rest: pixels at the right and lower edge that fill no patch are not seen (SigLIP at 384, of patches of 14).
      width, depth, heads, mlp_dim: of the whole model; blocks past `level` are not built.
      level: hidden state to return as Python counts them, -1 the last block's output, -2 the one before (LLaVA).
      stack_levels: further hidden states to return, below `level`; i ≥ 0 is what i blocks give.
      regroup: `(s, n)`: pictures come as one whole and n · n tiles, of which all run through s blocks; from there on
        only the whole ones go on, and before block s + k the tiles' k-th sample is added to them (DeepStack-V).
      class_token: a learned token stands before those of the patches, attends and is attended to.
      patch_bias: the map from pixels to patches has a bias.
      pre_norm: a norm before the blocks.
      post_norm: a norm behind the blocks, of the hidden state at `level`; `stack_levels` are returned without it.
      activation: of the feed-forward layers: "quick_gelu", "gelu" or "gelu_tanh".
      norm_eps: of the layer norms.
      mean, std: pixel normalisation, RGB in 0..1.
      dtype: of the computation.
      remat: recomputes each block in the backward pass.
    """

    image_size: int = 336
    patch_size: int = 14
    cut_rest: bool = False
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    level: int = -2
    stack_levels: tuple[int, ...] = ()
    regroup: tuple[int, ...] = ()
    class_token: bool = True
    patch_bias: bool = False
    pre_norm: bool = True
    post_norm: bool = False
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"
    remat: bool = True

    RANGES = {  # noqa: RUF012
        "image_size": whole(1, 65_536),
        "patch_size": whole(1, 65_536),
        "cut_rest": flag(),
        "width": whole(1, 1_000_000),
        "depth": whole(1, 1_000),
        "heads": whole(1, 1_000_000),
        "mlp_dim": whole(1, 1_000_000),
        "level": whole(-1_000, -1),
        "stack_levels": each(whole(-1_000, 1_000)),
        "regroup": REGROUPINGS,
        "class_token": flag(),
        "patch_bias": flag(),
        "pre_norm": flag(),
        "post_norm": flag(),
        "activation": one_of(ACTIVATIONS),
        "norm_eps": number(0, 0.1, above=True),
        "mean": COLOUR,
        "std": SPREAD,
        "remat": flag(),
    }

    def check(self):
        """Raises ValueError for fields that contradict each other, naming them as fields of the config."""
        if self.image_size < self.patch_size or (self.image_size % self.patch_size and not self.cut_rest):
            raise ValueError(
                f"model.vision: pictures of {self.image_size} pixels (image_size) do not divide into patches of "
                f"{self.patch_size} (patch_size)"
            )
        if self.width % self.heads:
            raise ValueError(f"model.vision: width {self.width} does not divide into {self.heads} heads")
        self.runs()

    @property
    def side(self) -> int:
        """Side of a view, pixels."""
        return self.image_size

    @property
    def grid(self) -> int:
        """Side of the feature grid."""
        return self.image_size // self.patch_size

    @property
    def stride(self) -> int:
        """Side of the pixels that one feature stands for."""
        return self.patch_size

    @property
    def extra_views(self) -> int:
        """Views that each picture brings beside the whole one, to be regrouped inside."""
        return self.regroup[1] ** 2 if self.regroup else 0

    @property
    def inject_blocks(self) -> tuple[int, ...]:
        """Blocks before which the tiles' samples are added, one each."""
        return tuple(self.regroup[0] + k for k in range(self.extra_views))

    @property
    def gives_importance(self) -> bool:
        """A class token attends to every patch."""
        return self.class_token

    @property
    def any_shape(self) -> bool:
        """A ViT has one size: that of its table of positions."""
        return False

    @property
    def level_strides(self) -> tuple[int, ...]:
        """How much finer than the bank's grid each of `stack_levels` is."""
        return (1,) * len(self.stack_levels)

    def runs(self) -> list[tuple[int, int]]:
        """First block and end of each scanned run.

        Raises:
          ValueError: a level or the regrouping layer lies outside the blocks.
        """
        if not -self.depth <= self.level <= -1:
            raise ValueError(
                f"model.vision.level={self.level} is none of the hidden states -{self.depth} to -1 that "
                f"model.vision.depth={self.depth} gives"
            )
        end = self.depth + 1 + self.level
        first = self.regroup[0] if self.regroup else 0
        levels = {level % (self.depth + 1) for level in self.stack_levels}
        if not (first < end and all(first < level < end for level in levels)):
            raise ValueError(
                f"model.vision.stack_levels={self.stack_levels} must lie between model.vision.regroup="
                f"{self.regroup} (its first, or 0) and the {end} blocks that model.vision.level={self.level} leaves"
            )
        edges = sorted({0, first, *levels, end})
        return list(itertools.pairwise(edges))

    @nn.compact
    def __call__(self, pixels, extent=None, importance=False):
        """Encodes `[N, image_size, image_size, 3]` uint8 pictures.

        Args:
          pixels: the pictures; whole, tiles, whole, … when regrouping.
          extent: must be None: a ViT has one size.
          importance: static, whether to say how important each patch is.

        Returns:
          `[N', grid, grid, C]` of `level`, after the last norm if there is one, then of each of `stack_levels`;
          N' = N, or N / (1 + n²) when regrouping.
          With `importance` also, as the last, `[N', grid, grid, 1]` float32: the `class_attention` of the last block
          that is built.

        Raises:
          ValueError: pictures of another size.
        """
        N, H, W, _ = pixels.shape
        if not H == W == self.image_size or extent is not None:
            raise ValueError(f"ViT wants {self.image_size}×{self.image_size} pictures, got {H}×{W}")
        g, p = self.grid, self.patch_size
        x = normalise(pixels[:, : g * p, : g * p], self.mean, self.std)
        x = x.reshape(N, g, p, g, p, 3).swapaxes(2, 3).reshape(N, g * g, p * p * 3)
        x = Dense((self.width,), ("pixels",), ("embed",), self.patch_bias, self.dtype, name="patches")(x)
        x = self._positioned(x)
        if self.pre_norm:
            x = LayerNorm(self.norm_eps, name="norm_pre")(x)
        x = constrain(x, "views", None, "act_embed")
        states, stacks = {}, None
        for start, end in self.runs():
            if self.regroup and start == self.regroup[0]:
                x, stacks = self._regroup(x)
            x, weights = self._run(x, start, end, stacks, importance)
            states[end] = x[:, self._first :].reshape(x.shape[0], g, g, self.width)
        if stacks is not None:
            # The reference adds a sample to a block's input in place, so that the hidden state it has recorded holds
            # the sample too. The features are the input of block `end`, which is not built: where the tiles have a
            # sample for that block it is added here.
            sample = end - self.regroup[0]
            if sample < len(stacks):
                states[end] += stacks[sample].reshape(states[end].shape)
        if self.post_norm:
            states[end] = LayerNorm(self.norm_eps, name="norm_post")(states[end])
        of_patches = (weights[-1].reshape(-1, g, g, 1),) if importance else ()
        return states[end], *(states[level % (self.depth + 1)] for level in self.stack_levels), *of_patches

    @property
    def _first(self):
        """Number of the first token that is a patch."""
        return int(self.class_token)

    def _positioned(self, x):
        """Patches `[N, cells, C]` behind the class token, if there is one, with their positions."""
        normal = nn.initializers.normal(0.02)
        if self.class_token:
            cls = self.param("cls", nn.with_logical_partitioning(normal, ("norm",)), (self.width,), jnp.float32)
            cls = jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
        init = nn.with_logical_partitioning(normal, ("positions", "embed"))
        position = self.param("position", init, (x.shape[1], self.width), jnp.float32)
        return x + position.astype(x.dtype)

    def _run(self, x, start, end, stacks, importance):
        """The blocks from `start` to `end` (exclusive) as one scan.

        Returns:
          hidden states `[N', T, C]` after the last, and the `class_attention` of each, `[end - start, N', T - 1]`, if
          `importance` is set.
        """
        numbers = None
        if stacks is not None:  # block `regroup[0] + k` adds stack k; blocks after the last stack add none
            numbers = np.arange(start, end) - self.regroup[0]
            numbers = jnp.asarray(np.where(numbers < len(stacks), numbers, -1))
        block = nn.remat(ViTBlock, prevent_cse=False) if self.remat else ViTBlock
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=end - start,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        name = f"blocks_{start}"
        run = blocks(self.heads, self.mlp_dim, self.norm_eps, self.dtype, importance, self.activation, name=name)
        return run(x, numbers, stacks)

    def _regroup(self, x):
        """Whole pictures `[N', T, C]`, and the samples of their tiles' mosaics as stacks `[n², N', T - 1, C]`."""
        n, g = self.regroup[1], self.grid
        x = x.reshape(-1, 1 + n * n, *x.shape[1:])
        tiles = x[:, 1:, self._first :].reshape(-1, n, n, g, g, self.width)
        stacks = sample_strided(tile_mosaic(tiles), n)
        return x[:, 0], stacks.reshape(n * n, -1, g * g, self.width)
