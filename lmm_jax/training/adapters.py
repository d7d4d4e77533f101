"""Adapters of low rank beside the kernels of linear layers (LoRA, Hu et al. 2021, arXiv 2106.09685).

An adapter lies in the parameter tree beside the kernel that it adapts, so that scans, remat, sharding and decoding
need to know nothing of it; `models.layers.Dense` adds what it gives:

    decoder/layers/q/kernel      [L, D, H, d]   frozen
    decoder/layers/q/lora_a      [L, D, r]      trains; drawn as PEFT draws it
    decoder/layers/q/lora_b      [L, r, H, d]   trains; zeros, so that the run begins as the model was
    decoder/layers/q/lora_scale  [L]            alpha / r

Dropout needs a random key in each layer of a scan. A training step puts keys into the tree in the same way, see
`with_dropout`; they are no parameters, and no state holds them.
"""

import fnmatch
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.models.layers import Kernel

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
LEAVES = (A, B, SCALE)
# Linear layers that never have one: the loss reads the head as a matrix, and no layout of others has a router.
NEVER = ("decoder/head", "router")


def is_adapter(path) -> bool:
    """Whether a parameter path is a part of an adapter."""
    return path.rpartition("/")[2] in LEAVES


def without(params):
    """Nested parameters, of any kind of leaf, without their adapters."""
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: x for path, x in flat.items() if not is_adapter(path)}, sep="/")


def layers(params) -> list[str]:
    """Paths of the layers that have an adapter, of nested or flat parameters."""
    flat = flatten_dict(params, sep="/")
    return [path.rpartition("/")[0] for path in flat if path.endswith(f"/{A}")]


def plain_config(config):
    """The config of the same model once its adapters are merged, all parameters float32."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lora.rank, config.optimizer.frozen_dtype = 0, "float32"
    return config


def alpha(lora) -> float:
    """Of a config's `lora`: twice the rank where it is not set, as in LLaVA's `finetune_lora.sh`."""
    return 2.0 * lora.rank if lora.alpha is None else float(lora.alpha)


def add_boxes(boxed, lora):
    """Boxed abstract parameters with those of the adapters that `config.lora` describes.

    Raises:
      ValueError: a pattern that matches no parameter or no linear layer, or a rank above a side of a layer.
    """
    flat = flatten_dict(boxed, sep="/")
    for layer in _chosen(flat, lora):
        kernel = flat[f"{layer}/kernel"]
        before, inputs, outputs = _axes(kernel.value.shape, kernel.inputs, kernel.outputs)
        side = min(math.prod(inputs), math.prod(outputs))
        if lora.rank > side:
            raise ValueError(
                f"lora.rank={lora.rank}: {layer} is a map from {math.prod(inputs)} to {math.prod(outputs)} numbers, "
                f"so that a rank above {side} would be more than all of it; set a smaller one, or leave it out of "
                "lora.paths"
            )
        of_before, of_inputs, of_outputs = _axes(kernel.names, kernel.inputs, kernel.outputs)
        shapes = {A: (*before, *inputs, lora.rank), B: (*before, lora.rank, *outputs), SCALE: before}
        names = {A: (*of_before, *of_inputs, "lora"), B: (*of_before, "lora", *of_outputs), SCALE: of_before}
        for leaf, shape in shapes.items():
            value = jax.ShapeDtypeStruct(shape, jnp.float32)
            counts = {A: (kernel.inputs, 1), B: (1, kernel.outputs), SCALE: (0, 0)}[leaf]
            flat[f"{layer}/{leaf}"] = Kernel(value, names[leaf], inputs=counts[0], outputs=counts[1])
    return unflatten_dict(flat, sep="/")


def _axes(axes, inputs, outputs):
    """The axes of a kernel, shape or names, as those of scans, of what is contracted, and of what comes out."""
    first = len(axes) - inputs - outputs
    return tuple(axes[:first]), tuple(axes[first : first + inputs]), tuple(axes[first + inputs :])


def _chosen(flat, lora):
    """Paths of the layers that `lora.paths` chooses, in the order of the tree."""
    linear = {path.removesuffix("/kernel") for path, box in flat.items() if isinstance(box, Kernel)}
    allowed = {layer for layer in linear if not any(_under(layer, never) for never in NEVER)}
    chosen = set()
    for pattern in lora.paths:
        found = {layer for layer in allowed if _under(layer, pattern)}
        if not found:
            raise ValueError(f"lora.paths: {_why_not(pattern, flat, linear)}")
        chosen |= found
    return [path.removesuffix("/kernel") for path in flat if path.removesuffix("/kernel") in chosen]


def _why_not(pattern, flat, linear):
    """Why a pattern gives no layer that may have an adapter."""
    if any(_under(layer, pattern) for layer in linear):
        why = "the head is read as a matrix by the loss" if pattern.startswith("decoder") else "a router is small"
        return f"'{pattern}' cannot have an adapter, as {why}; let optimizer.groups train it whole, or leave it out"
    if any(_under(path, pattern) for path in flat):
        return f"'{pattern}' is no linear layer and holds none, so that nothing there can have an adapter"
    parts = sorted({"/".join(layer.split("/")[:2]) for layer in linear})
    return f"no parameter lies under '{pattern}'; there are linear layers under {', '.join(parts)}"


def _under(path, pattern):
    """Whether a path begins with the names of a pattern, in which `*` stands for a name or a part of one."""
    names, wanted = path.split("/"), pattern.rstrip("/").split("/")
    return len(names) >= len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted))


def init(key, boxed, lora) -> dict:
    """Flat first values of the adapters of `add_boxes`: A uniform in ± fan-in^-1/2, as PEFT draws it, and B zeros."""
    flat, out = flatten_dict(boxed, sep="/"), {}
    for layer in layers(flat):
        a, b, scale = (flat[f"{layer}/{leaf}"] for leaf in LEAVES)
        bound = math.prod(_axes(a.value.shape, a.inputs, a.outputs)[1]) ** -0.5
        drawn = jax.random.uniform(_key_of(key, layer), a.value.shape, jnp.float32, -bound, bound)
        out[f"{layer}/{A}"], out[f"{layer}/{B}"] = drawn, jnp.zeros(b.value.shape, jnp.float32)
        out[f"{layer}/{SCALE}"] = jnp.full(scale.value.shape, alpha(lora) / lora.rank, jnp.float32)
    return out


def with_dropout(params, share, key):
    """Parameters with what `Dense` needs to leave out a share of the numbers that adapters read, drawn from `key`."""
    flat = flatten_dict(params, sep="/")
    for layer in layers(flat):
        before = flat[f"{layer}/{SCALE}"].shape
        keys = jax.random.split(_key_of(key, layer), math.prod(before)).reshape(before)
        flat[f"{layer}/lora_key"] = jax.random.key_data(keys)
        flat[f"{layer}/lora_dropout"] = jnp.full(before, share, jnp.float32)
    return unflatten_dict(flat, sep="/")


def _key_of(key, layer):
    """A key of its own for each layer, whichever others have an adapter."""
    return jax.random.fold_in(key, zlib.crc32(layer.encode()))


def merge(params, shardings):
    """Parameters without adapters, in float32: each kernel is W + scale · A · B. One kernel is computed at a time.

    Args:
      params: nested arrays.
      shardings: nested, of the parameters without adapters.
    """
    flat, placed = flatten_dict(params, sep="/"), flatten_dict(shardings, sep="/")
    adapted = set(layers(flat))
    for layer in adapted:
        parts = [flat.pop(f"{layer}/{leaf}") for leaf in LEAVES]
        path = f"{layer}/kernel"
        flat[path] = _merge_on(placed[path])(flat[path], *parts)
    return unflatten_dict({path: x.astype(jnp.float32) for path, x in flat.items()}, sep="/")


@functools.cache
def _merge_on(sharding):
    return jax.jit(functools.partial(_merged, precision=jax.lax.Precision.HIGHEST), out_shardings=sharding)


def _merged(kernel, a, b, scale, **options):
    first = scale.ndim
    a = a.reshape(*a.shape[:first], -1, a.shape[-1])
    b = b.reshape(*b.shape[: first + 1], -1)
    product = jnp.matmul(a, b, **options) * scale[..., None, None]
    return kernel.astype(jnp.float32) + product.reshape(kernel.shape)


def merge_on_host(kernel, a, b, scale):
    """`merge` of one kernel in numpy, a layer at a time."""
    out = np.array(kernel, np.float32)
    if scale.ndim:
        for layer, parts in enumerate(zip(a, b, scale, strict=True)):
            out[layer] = merge_on_host(out[layer], *parts)
        return out
    out += (scale * (a.reshape(-1, a.shape[-1]) @ b.reshape(b.shape[0], -1))).reshape(out.shape)
    return out
