"""Linear layers and norms whose parameters name their logical axes; rotary positions.

Axis letters used throughout: G packs, V views of a pack, R rows of a pack, T positions of a row, P bank slots,
S stacks, K supervised positions of a pack, Q questions of a pack and I ids of each, L layers, H heads, D decoder
width, C encoder width.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.models.linear import linear
from lmm_jax.ranges import Range, number
from lmm_jax.sharding import constrain

fan_in_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def symmetric_uniform(bound):
    """Initializer, uniform in ± `bound`."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def normalise(pixels, mean, std):
    """uint8 RGB `[..., 3]` to float32, as CLIP was given it."""
    return (pixels.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def contract(x, kernel, inputs, outputs, dtype):
    """`linear.linear` of a float32 parameter, computed in `dtype`: `[B, …, inputs]` to `[B, …, outputs]`.

    Args:
      x: `[B, …, inputs]`.
      kernel: `[inputs, outputs]`.
      inputs, outputs: logical axes of the kernel.
      dtype: of the computation and of the result.
    """
    # Constrained in the dtype of the computation, so that it is gathered in that.
    kernel = constrain(kernel.astype(dtype), *inputs, *outputs)
    return linear(x.astype(dtype), kernel, inputs, outputs)


class Dense(nn.Module):
    """Linear map of the last `len(inputs)` axes to `features`; float32 parameters, computed in `dtype`.

    Attributes:
      features: sizes of the output axes, e.g. `(heads, head_dim)`.
      inputs: logical axes of the contracted axes.
      outputs: logical axes of the output axes.
      use_bias: adds a bias over the output axes.
      dtype: of the computation.
      start: "normal" of variance 1 / fan-in without bias, or "uniform" in ± fan-in^-1/2 with it, as PyTorch does.
    """

    features: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    use_bias: bool = False
    dtype: str = "float32"
    start: str = "normal"

    @nn.compact
    def __call__(self, x):
        n = len(self.inputs)
        shape = (*x.shape[-n:], *self.features)

        uniform = symmetric_uniform(math.prod(shape[:n]) ** -0.5)

        def normal(key, shape, dtype):
            flat = (math.prod(shape[:n]), math.prod(shape[n:]))
            return fan_in_normal(key, flat, dtype).reshape(shape)

        starts = {"normal": (normal, nn.initializers.zeros), "uniform": (uniform, uniform)}
        kernel_init, bias_init = starts[self.start]
        init = nn.with_logical_partitioning(kernel_init, (*self.inputs, *self.outputs))
        kernel = self.param("kernel", init, shape, jnp.float32)
        y = contract(x, kernel, self.inputs, self.outputs, self.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(bias_init, self.outputs)
            y += self.param("bias", init, self.features, jnp.float32).astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm of the last axis, computed in float32, returned in the dtype of `x`."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", ones, x.shape[-1:], jnp.float32)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm of the last axis, computed in float32, returned in the dtype of `x`."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, ("norm",)), x.shape[-1:], jnp.float32
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)), x.shape[-1:], jnp.float32
        )
        y = x.astype(jnp.float32)
        y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale + bias).astype(x.dtype)


def _is_rope_scaling(scaling):
    if scaling == ():
        return True
    kind, *numbers = scaling if type(scaling) is tuple else (None,)
    valid = kind in ("linear", "llama3") and {"linear": 1, "llama3": 4}[kind] == len(numbers)
    valid = valid and all(map(number(0, above=True).holds, numbers))
    return valid and (kind == "linear" or numbers[1] < numbers[2])


ROPE_SCALINGS = Range(
    tuple,
    "(), ('linear', factor) or ('llama3', factor, low_freq_factor, high_freq_factor, original_max_positions), of "
    "positive numbers with low_freq_factor below high_freq_factor",
    _is_rope_scaling,
)


def check_rope_scaling(scaling):
    """Raises ValueError if `scaling` is none of those that `scale_frequencies` takes."""
    if not ROPE_SCALINGS.holds(scaling):
        raise ValueError(f"model.decoder.rope_scaling={scaling!r}: expected {ROPE_SCALINGS}")


def scale_frequencies(frequency, scaling):
    """Frequencies of rotary positions for contexts longer than those a model was first trained on.

    `("linear", factor)` divides all by `factor`: position interpolation (Chen et al. 2023, arXiv 2306.15595).

    `("llama3", factor, low, high, original)` divides by `factor` those that turn less than `low` times in the
    `original` positions of the first training, keeps those that turn more than `high` times, and goes from one to
    the other in between, linearly in the turns (`apply_scaling` of Meta's LLaMA 3.1, `llama_models/llama3/model.py`).

    Args:
      frequency: `[head_dim / 2]` float32, radians a position.
      scaling: `()` keeps the frequencies; see above for the others.

    Returns:
      `[head_dim / 2]` float32.

    Raises:
      ValueError: another `scaling`, see `check_rope_scaling`.
    """
    check_rope_scaling(scaling)
    if not scaling:
        return frequency
    kind, factor, *bounds = scaling
    if kind == "linear":
        return frequency / factor
    low, high, original = bounds
    turns = original * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rope(x, position, theta, scaling=()):
    """Rotates `x` by its positions, in the half-split layout of LLaMA.

    Args:
      x: `[..., T, H, head_dim]`.
      position: `[..., T]` int.
      theta: base of the frequencies.
      scaling: see `scale_frequencies`.

    Returns:
      Array like `x`; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = scale_frequencies(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), scaling)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
