"""CLIP-style vision transformer: pictures to grids of features."""

import flax.linen as nn
import jax.numpy as jnp

from lmm_jax.models.attention import attention
from lmm_jax.models.layers import Dense, LayerNorm
from lmm_jax.sharding import constrain


def quick_gelu(x):
    """`x · sigmoid(1.702 x)`, the activation CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


class ViTBlock(nn.Module):
    """Pre-norm transformer block over `[N, T, C]`."""

    heads: int
    mlp_dim: int
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        C = x.shape[-1]
        head = (self.heads, C // self.heads)
        y = LayerNorm(self.norm_eps, name="norm_1")(x)
        q, k, v = (Dense(head, ("embed",), ("heads", "head_dim"), True, self.dtype, name=name)(y) for name in "qkv")
        y = attention(q, k, v)
        x += Dense((C,), ("heads", "head_dim"), ("embed",), True, self.dtype, name="o")(y)
        y = LayerNorm(self.norm_eps, name="norm_2")(x)
        y = quick_gelu(Dense((self.mlp_dim,), ("embed",), ("mlp",), True, self.dtype, name="up")(y))
        x += Dense((C,), ("mlp",), ("embed",), True, self.dtype, name="down")(y)
        return constrain(x, "batch", None, "act_embed"), None


class ViT(nn.Module):
    """CLIP ViT up to one hidden level, without class token in the result and without the last norm.

    Attributes:
      image_size: side of a picture, pixels.
      patch_size: side of a patch, pixels.
      width, depth, heads, mlp_dim: of the whole CLIP model; blocks past `level` are not built.
      level: hidden state to return as Python counts them, -1 the last block's output, -2 the one before (LLaVA).
      norm_eps: of the layer norms.
      mean, std: pixel normalisation, RGB in 0..1.
      dtype: of the computation.
      remat: recomputes each block in the backward pass.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_dim: int = 4096
    level: int = -2
    norm_eps: float = 1e-5
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"
    remat: bool = True

    @property
    def grid(self) -> int:
        """Side of the feature grid."""
        return self.image_size // self.patch_size

    @nn.compact
    def __call__(self, pixels):
        """Encodes `[N, image_size, image_size, 3]` uint8 pictures to `[N, grid, grid, C]`.

        Raises:
          ValueError: pictures of another size, or `level` outside the blocks.
        """
        N, H, W, _ = pixels.shape
        if not H == W == self.image_size:
            raise ValueError(f"ViT wants {self.image_size}×{self.image_size} pictures, got {H}×{W}")
        if not -self.depth <= self.level <= -1:
            raise ValueError(f"vision.level must be in [-{self.depth}, -1], got {self.level}")
        g, p = self.grid, self.patch_size
        x = (pixels.astype(jnp.float32) / 255 - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        x = x.reshape(N, g, p, g, p, 3).swapaxes(2, 3).reshape(N, g * g, p * p * 3)
        x = Dense((self.width,), ("pixels",), ("embed",), False, self.dtype, name="patches")(x)
        normal = nn.initializers.normal(0.02)
        cls = self.param("cls", nn.with_logical_partitioning(normal, ("norm",)), (self.width,), jnp.float32)
        position = self.param(
            "position",
            nn.with_logical_partitioning(normal, ("positions", "embed")),
            (1 + g * g, self.width),
            jnp.float32,
        )
        cls = jnp.broadcast_to(cls.astype(x.dtype), (N, 1, self.width))
        x = jnp.concatenate([cls, x], axis=1) + position.astype(x.dtype)
        x = constrain(LayerNorm(self.norm_eps, name="norm_pre")(x), "batch", None, "act_embed")
        block = nn.remat(ViTBlock, prevent_cse=False) if self.remat else ViTBlock
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth + 1 + self.level,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(self.heads, self.mlp_dim, self.norm_eps, self.dtype, name="blocks")(x, None)
        return x[:, 1:].reshape(N, g, g, self.width)
