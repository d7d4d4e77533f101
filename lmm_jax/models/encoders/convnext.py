"""ConvNeXt: pictures of any aspect ratio to grids of features, with ConvLLaVA's fifth stage."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.models.layers import Dense, LayerNorm, normalise, symmetric_uniform
from lmm_jax.ranges import COLOUR, SPREAD, each, flag, number, whole
from lmm_jax.sharding import constrain, platform

KERNEL = 7
CELL = 4  # side of the cells of a gradient that are added at a time to that of the kernel


def space_to_depth(x, side):
    """Cuts `[N, h, w, C]` into `side` × `side` cells, `[N, h // side, w // side, side² · C]`; remainders are dropped.

    A convolution whose stride is its kernel's size is this and a matmul.
    """
    N, h, w, C = x.shape
    h, w = h // side, w // side
    x = x[:, : h * side, : w * side].reshape(N, h, side, w, side, C)
    return x.swapaxes(2, 3).reshape(N, h, w, side * side * C)


def depthwise(x, kernel):
    """Depthwise convolution with zero padding, in the form that is the fastest where it runs.

    On a CPU these are shifted multiply-adds, which XLA fuses into one loop, with a gradient of their own: XLA's
    grouped convolution is many times slower there. On a TPU that convolution is the faster one by the estimate of
    XLA's compiler, although it takes longer to compile; it rounds the kernel to the dtype of `x`, as every matmul's
    is. On a GPU it is cuDNN's; nothing was measured there. The figures stand in lmm_jax/bench/README.md.

    Args:
      x: `[N, h, w, C]`.
      kernel: `[k, k, C]`, k odd.

    Returns:
      `[N, h, w, C]` in the dtype of `x`, summed in float32.
    """
    if platform() == "cpu":
        return _shifted(x, kernel)
    kernel = kernel.astype(x.dtype)[:, :, None]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=x.shape[-1]
    )


@jax.custom_vjp
def _shifted(x, kernel):
    (h, w), k = x.shape[1:3], kernel.shape[0]
    padded = _pad(x, k)
    total = sum(padded[:, i : i + h, j : j + w] * kernel[i, j] for i in range(k) for j in range(k))
    return total.astype(x.dtype)


def _pad(x, k):
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))


def _shifted_fwd(x, kernel):
    return _shifted(x, kernel), (x, kernel)


def _shifted_bwd(saved, dy):
    """The kernel's gradient is a convolution whose window is `dy`; CELL × CELL of its terms are added at a time."""
    x, kernel = saved
    (N, h, w, C), k = x.shape, kernel.shape[0]
    rows, columns = -(-h // CELL), -(-w // CELL)
    room = ((0, 0), (0, rows * CELL - h), (0, columns * CELL - w), (0, 0))
    padded, wide = jnp.pad(_pad(x, k), room), jnp.pad(dy.astype(jnp.float32), room)

    def cell(i, total):
        def cut(array, side):
            return jax.lax.dynamic_slice(array, (0, *at, 0), (N, side, side, C))

        at = i // columns * CELL, i % columns * CELL
        under, of_dy = cut(padded, CELL + k - 1), cut(wide, CELL)
        terms = (
            under[:, a : a + k, b : b + k] * of_dy[:, a : a + 1, b : b + 1] for a in range(CELL) for b in range(CELL)
        )
        return total + sum(terms)

    total = jax.lax.fori_loop(0, rows * columns, cell, jnp.zeros((N, k, k, C)))
    return _shifted(dy, kernel[::-1, ::-1]), total.sum(axis=0).astype(kernel.dtype)


_shifted.defvjp(_shifted_fwd, _shifted_bwd)


def cover(extent, height, width, stride):
    """Cells that a picture covers wholly: `[N, height, width, 1]` bool.

    Args:
      extent: `[N, 2]` int, height and width of each picture in pixels, which stands at the top left.
      height, width: of the grid.
      stride: pixels a cell.
    """
    rows, columns = extent[:, 0] // stride, extent[:, 1] // stride
    inside = (jnp.arange(height) < rows[:, None])[:, :, None] & (jnp.arange(width) < columns[:, None])[:, None]
    return inside[..., None]


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, layer norm, MLP with exact GELU, layer scale, residual (spec: ConvNeXt, section 2)."""

    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(self, x, mask):
        """`x`: `[N, h, w, C]`; `mask`: `[N, h, w, 1]` or None. What lies outside is zero to the convolution."""
        C = x.shape[-1]
        y = (x if mask is None else jnp.where(mask, x, 0)).astype(self.dtype)
        y = Depthwise(name="depthwise")(y)
        y = LayerNorm(self.norm_eps, name="norm")(y)
        y = Dense((4 * C,), ("embed",), ("mlp",), True, self.dtype, "uniform", name="up")(y)
        y = Dense((C,), ("mlp",), ("embed",), True, self.dtype, "uniform", name="down")(nn.gelu(y, approximate=False))
        small = nn.with_logical_partitioning(nn.initializers.constant(1e-6), ("norm",))
        x += self.param("scale", small, (C,), jnp.float32).astype(x.dtype) * y
        return constrain(x, "views", None, None, "act_embed"), None


class Depthwise(nn.Module):
    """Parameters of a depthwise convolution, uniform in ± 1 / k as PyTorch starts one."""

    @nn.compact
    def __call__(self, x):
        C = x.shape[-1]
        uniform = symmetric_uniform(1 / KERNEL)
        kernel = nn.with_logical_partitioning(uniform, ("window", "window_2", "norm"))
        kernel = self.param("kernel", kernel, (KERNEL, KERNEL, C), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(uniform, ("norm",)), (C,), jnp.float32)
        return depthwise(x, kernel) + bias.astype(x.dtype)


class Stage(nn.Module):
    """Norm and 2×2 reduction (not before the first stage), then blocks as one scan."""

    depth: int
    width: int
    reduce: bool
    norm_eps: float
    dtype: str
    remat: bool

    @nn.compact
    def __call__(self, x, extent, stride):
        if self.reduce:
            x = space_to_depth(LayerNorm(self.norm_eps, name="norm")(x), 2)
            x = Dense((self.width,), ("pixels",), ("embed",), True, self.dtype, "uniform", name="reduce")(x)
        mask = None if extent is None else cover(extent, *x.shape[1:3], stride)
        blocks = nn.scan(
            nn.remat(ConvNeXtBlock, prevent_cse=False) if self.remat else ConvNeXtBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return blocks(self.norm_eps, self.dtype, name="blocks")(x, mask)[0]


class ConvNeXt(nn.Module):
    """ConvNeXt of any number of stages, without the last norm; ConvLLaVA's has five (2405.15738, section 3).

    A picture that covers only a part of its canvas gives what it gives alone: each stage masks what lies outside
    before every depthwise convolution, by the picture's own chain of floor divisions.

    Attributes:
      image_size: side of a square picture, pixels; others are allowed.
      patch_size: stride of the stem.
      depths, widths: blocks and channels of each stage.
      stack_levels: stages, counted from 1, whose maps are returned beside the last one's.
      norm_eps: of every norm: 1e-6, but 1e-5 in the xxlarge model.
      mean, std: pixel normalisation, RGB in 0..1.
      dtype: of the computation.
      remat: recomputes each block in the backward pass.
    """

    image_size: int = 1536
    patch_size: int = 4
    depths: tuple[int, ...] = (3, 3, 27, 3, 6)
    widths: tuple[int, ...] = (192, 384, 768, 1536, 3072)
    stack_levels: tuple[int, ...] = ()
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    dtype: str = "float32"
    remat: bool = True

    RANGES = {  # noqa: RUF012
        "image_size": whole(1, 65_536),
        "patch_size": whole(1, 65_536),
        "depths": each(whole(1, 1_000), 1, 16),
        "widths": each(whole(1, 1_000_000), 1, 16),
        "stack_levels": each(whole(1, 15)),
        "norm_eps": number(0, 0.1, above=True),
        "mean": COLOUR,
        "std": SPREAD,
        "remat": flag(),
    }

    def check(self):
        """Raises ValueError for fields that contradict each other, naming them as fields of the config."""
        stages = len(self.depths)
        if len(self.widths) != stages or not all(0 < level < stages for level in self.stack_levels):
            raise ValueError(
                f"model.vision.depths={self.depths}, model.vision.widths={self.widths} and model.vision.stack_levels="
                f"{self.stack_levels} do not agree: as many widths as depths, levels from 1 to {stages - 1}"
            )
        if not self.grid:
            raise ValueError(
                f"model.vision: pictures of {self.image_size} pixels (image_size) are less than the {self.stride} "
                f"that one feature of {stages} stages stands for (patch_size, depths)"
            )

    @property
    def stride(self) -> int:
        """Side of the pixels that one feature stands for."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def side(self) -> int:
        """Side of a square view, pixels."""
        return self.grid * self.stride

    @property
    def grid(self) -> int:
        """Side of a square picture's feature grid."""
        return self.image_size // self.stride

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
        """Convolutions take any: see `cover`."""
        return True

    @property
    def level_strides(self) -> tuple[int, ...]:
        """How much finer than the bank's grid each of `stack_levels` is."""
        return tuple(2 ** (len(self.depths) - level) for level in self.stack_levels)

    @nn.compact
    def __call__(self, pixels, extent=None):
        """Encodes `[N, H, W, 3]` uint8 pictures.

        Args:
          pixels: the pictures, each at the top left of its canvas.
          extent: `[N, 2]` int, height and width of each picture; None if they fill their canvases.

        Returns:
          `[N, H // stride, W // stride, C]` of the last stage, then the finer map of each of `stack_levels`.
        """
        x = space_to_depth(normalise(pixels, self.mean, self.std), self.patch_size)
        x = Dense((self.widths[0],), ("pixels",), ("embed",), True, self.dtype, "uniform", name="patches")(x)
        x = LayerNorm(self.norm_eps, name="norm_pre")(x)
        maps, stride = {}, self.patch_size
        for nth, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True), start=1):
            stride *= 2 if nth > 1 else 1
            stage = Stage(depth, width, nth > 1, self.norm_eps, self.dtype, self.remat, name=f"stage_{nth}")
            x = constrain(stage(x, extent, stride), "views", None, None, "act_embed")
            maps[nth] = x
        return x, *(maps[level] for level in self.stack_levels)
