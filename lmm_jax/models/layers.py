"""Linear layers and norms whose parameters name their logical axes; rotary positions.

Axis letters used throughout: G packs, V views of a pack, R rows of a pack, T positions of a row, P bank slots,
S stacks, K supervised positions of a pack, Q questions of a pack and I ids of each, L layers, H heads, D decoder
width, C encoder width.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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


def dropout(x, share, key):
    """`x` with a `share` of its numbers set to 0 and the others scaled up for it; `key`: the data of a random key."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - share, x.shape)
    return jnp.where(kept, x / (1 - share).astype(x.dtype), jnp.zeros((), x.dtype))


class Kernel(nn.LogicallyPartitioned):
    """The box of a linear layer's kernel, which says which of its axes are contracted: what an adapter must know.

    Attributes:
      inputs, outputs: how many of its last axes each are; axes before them are those of a scan.
    """

    inputs: int = flax.struct.field(default=1, pytree_node=False)
    outputs: int = flax.struct.field(default=1, pytree_node=False)


class Dense(nn.Module):
    """Linear map of the last `len(inputs)` axes to `features`; float32 parameters, computed in `dtype`.

    Where its parameters hold an adapter beside the kernel, see `training.adapters`, it adds what that gives: with
    `lora_a` `[inputs, r]`, `lora_b` `[r, outputs]` and the number `lora_scale`, scale · (x · a) · b (LoRA, Hu et al.
    2021, arXiv 2106.09685). Its `x` loses a share `lora_dropout` of its numbers where that and a `lora_key` are there
    too, as they are in a training step alone.

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

        def boxed(*args):
            return Kernel(kernel_init(*args), (*self.inputs, *self.outputs), inputs=n, outputs=len(self.outputs))

        kernel = self.param("kernel", boxed, shape, jnp.float32)
        y = contract(x, kernel, self.inputs, self.outputs, self.dtype)
        if self.has_variable("params", "lora_a"):
            y += self._adapter(x)
        if self.use_bias:
            init = nn.with_logical_partitioning(bias_init, self.outputs)
            y += self.param("bias", init, self.features, jnp.float32).astype(self.dtype)
        return y

    def _adapter(self, x):
        """What the adapter beside the kernel adds."""
        a, b, scale = (self.get_variable("params", name) for name in ("lora_a", "lora_b", "lora_scale"))
        if self.has_variable("params", "lora_key"):
            x = dropout(x, self.get_variable("params", "lora_dropout"), self.get_variable("params", "lora_key"))
        y = contract(x, a, self.inputs, ("lora",), self.dtype)
        return contract(y, b, ("lora",), self.outputs, self.dtype) * scale.astype(self.dtype)


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


# Kinds of `scale_frequencies`, and how many numbers go with each.
_SCALINGS = {"linear": 1, "llama3": 4, "yarn": 5}


def _is_rope_scaling(scaling):
    if scaling == ():
        return True
    kind, *numbers = scaling if type(scaling) is tuple else (None,)
    if _SCALINGS.get(kind) != len(numbers) or not all(map(number(0, above=True).holds, numbers)):
        return False
    return {"linear": True, "llama3": numbers[1:2] < numbers[2:3], "yarn": numbers[1:2] > numbers[2:3]}[kind]


ROPE_SCALINGS = Range(
    tuple,
    "(), ('linear', factor), ('llama3', factor, low_freq_factor, high_freq_factor, original_max_positions) with "
    "low_freq_factor below high_freq_factor, or ('yarn', factor, beta_fast, beta_slow, original_max_positions, "
    "attention_factor) with beta_fast above beta_slow, of positive numbers",
    _is_rope_scaling,
)
MULTIPLIERS = Range(
    tuple,
    "(), or four positive numbers: of embeddings, of what a layer adds, of attention's scores, and what logits are "
    "divided by",
    lambda x: x == () or (type(x) is tuple and len(x) == 4 and all(map(number(0, above=True).holds, x))),
)


def _are_axes(axes):
    if axes == ():
        return True
    if type(axes) is not tuple or len(axes) != 3 or not all(type(n) is int and n > 0 for n in axes):
        return False
    return 3 * max(axes[1:]) - 1 <= sum(axes)


ROPE_AXES = Range(
    tuple,
    "(), or how many frequencies turn with (time, row, column), of which time has the rest where they take turns: "
    "(24, 20, 20)",
    _are_axes,
)


def check_rope_axes(axes, head_width):
    """Raises ValueError if `axes` are not sections of the frequencies of heads of so many numbers."""
    if not ROPE_AXES.holds(axes):
        raise ValueError(f"model.decoder.rope_axes={axes!r}: expected {ROPE_AXES}")
    if axes and sum(axes) != head_width // 2:
        raise ValueError(
            f"model.decoder.rope_axes={axes!r} are {sum(axes)} frequencies, a head of {head_width} numbers has "
            f"{head_width // 2}"
        )


def check_rope_scaling(scaling):
    """Raises ValueError if `scaling` is none of those that `scale_frequencies` takes."""
    if not ROPE_SCALINGS.holds(scaling):
        raise ValueError(f"model.decoder.rope_scaling={scaling!r}: expected {ROPE_SCALINGS}")


def check_multipliers(multipliers):
    """Raises ValueError if `multipliers` are not those of a `Decoder`."""
    if not MULTIPLIERS.holds(multipliers):
        raise ValueError(f"model.decoder.multipliers={multipliers!r}: expected {MULTIPLIERS}")


def scale_frequencies(frequency, scaling, theta):
    """Frequencies of rotary positions for contexts longer than those a model was first trained on.

    `("linear", factor)` divides all by `factor`: position interpolation (Chen et al. 2023, arXiv 2306.15595).

    `("llama3", factor, low, high, original)` divides by `factor` those that turn less than `low` times in the
    `original` positions of the first training, keeps those that turn more than `high` times, and goes from one to
    the other in between, linearly in the turns (`apply_scaling` of Meta's LLaMA 3.1, `llama_models/llama3/model.py`).

    `("yarn", factor, fast, slow, original, attention)` keeps those that turn more than `fast` times, divides by
    `factor` those that turn less than `slow` times, and goes from one to the other linearly in the number of the
    frequency, from the last whole one to the next (Peng et al. 2023, arXiv 2309.00071, and its code). What `rope`
    gives is multiplied by `attention`, see `rotation_length`.

    Args:
      frequency: `[head_dim / 2]` float32, radians a position.
      scaling: `()` keeps the frequencies; see above for the others.
      theta: their base.

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
    if kind == "yarn":
        kept = 1 - _yarn_ramp(len(frequency), theta, *bounds[:3])
    else:
        low, high, original = bounds
        turns = original * frequency / (2 * math.pi)
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def _yarn_ramp(half, theta, fast, slow, original):
    """How far each of `half` frequencies is on its way to being divided, `[half]` float32 from 0 to 1."""

    def number_of(turns):  # frequency number i is theta^(-i / half)
        return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    # Bounds are cut off at the width of a head, not at the half that there are, as the reference does.
    first, last = max(math.floor(number_of(fast)), 0), min(math.ceil(number_of(slow)), 2 * half - 1)
    return jnp.clip((jnp.arange(half) - first) / (last - first or 0.001), 0, 1)


def rotation_length(scaling) -> float:
    """What queries and keys are multiplied by beside being rotated: YaRN's attention factor, or 1."""
    return scaling[-1] if scaling and scaling[0] == "yarn" else 1.0


def rope_axis(sections) -> np.ndarray:
    """Which axis of a position each frequency turns with, `[head_dim / 2]` int (Qwen3-VL's interleaved sections).

    Time, row and column take turns from the highest frequency on until a section is used up; time has the rest.

    Args:
      sections: frequencies of time, of the row and of the column, whose sum is half the width of a head.
    """
    axis = np.zeros(sum(sections), np.int32)
    for nth in (1, 2):
        axis[nth : 3 * sections[nth] : 3] = nth
    return axis


def rope(x, position, theta, scaling=(), axes=()):
    """Rotates `x` by its positions, in the half-split layout of LLaMA.

    Args:
      x: `[..., T, H, head_dim]`.
      position: `[..., T]` int; with `axes` `[..., T, 3]`, see `rope_axis`.
      theta: base of the frequencies.
      scaling: see `scale_frequencies`.
      axes: () or sections of the frequencies that each axis of a position has.

    Returns:
      Array like `x`; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = scale_frequencies(theta ** (-jnp.arange(half, dtype=jnp.float32) / half), scaling, theta)
    position = position[..., rope_axis(axes)][..., None, :] if axes else position[..., None, None]
    return rotate(x, position.astype(jnp.float32) * frequency, rotation_length(scaling))


def rotate(x, angle, length=1.0):
    """Rotates pairs of numbers, one of the first half of the last axis and one of the second.

    Args:
      x: `[..., T, H, head_dim]`.
      angle: `[..., T, 1, head_dim / 2]` float32.
      length: what they are multiplied by beside.

    Returns:
      Array like `x`, computed in float32.
    """
    cos, sin = jnp.cos(angle) * length, jnp.sin(angle) * length
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
