"""A linear map that moves as few bytes as can be to gather weights and scatter their gradient, unlike XLA alone."""

import functools
import math

import jax
import numpy as np

from lmm_jax.sharding import constrain, devices, partition, rings


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def linear(x, kernel, inputs, outputs):
    """Contracts the last `len(inputs)` axes of `x` with the first of `kernel`.

    The gradient of the kernel lies as the kernel does. Where that is over devices that share out the batch, each
    device sums what its part of the batch contributes, and the sums are reduced and scattered; by itself XLA would
    reduce the whole gradient to every device, twice the bytes, and cut it then. On a slice of several axes that
    takes one scatter an axis, as libtpu (0.0.51) turns one over all of them into an all-reduce again.

    Args:
      x: `[B, …, inputs]`.
      kernel: `[inputs, outputs]` in the dtype of `x`.
      inputs, outputs: logical axes of the kernel.

    Returns:
      `[B, …, outputs]`.
    """
    return _product(x, kernel, inputs, outputs)


def _product(x, kernel, inputs, outputs):
    kernel = _gather(kernel, x.shape[0], inputs, outputs)
    return _contract(x, kernel, range(x.ndim - len(inputs), x.ndim), range(len(inputs)))


def _forward(x, kernel, inputs, outputs):
    # A frozen kernel needs no x in the backward pass, and where no gradient flows to x it needs no kernel.
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    # The product itself, not `linear` again, in which a policy of rematerialisation would not find it.
    return _product(x.value, kernel.value, inputs, outputs), saved


def _backward(inputs, outputs, saved, dy):
    x, kernel = saved
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        return None, None
    n, m = len(inputs), len(outputs)
    dx = None
    if kernel is not None:
        whole = _gather(kernel, dy.shape[0], inputs, outputs)
        dx = _contract(dy, whole, range(dy.ndim - m, dy.ndim), range(n, n + m))
    return dx, None if x is None else _kernel_gradient(x, dy, inputs, outputs)


linear.defvjp(_forward, _backward, symbolic_zeros=True)


def _contract(a, b, axes_a, axes_b):
    return jax.lax.dot_general(a, b, ((tuple(axes_a), tuple(axes_b)), ((), ())))


def _gather(kernel, packs, inputs, outputs):
    """The kernel as devices that share out `packs` need it, gathered ring by ring on a slice of three axes.

    Elsewhere XLA gathers it. Over three axes at a time libtpu (0.0.51) adds up what each device has and zeros
    instead, which is twice the bytes.
    """
    spec, tokens = partition(kernel.shape, *inputs, *outputs), _tokens(packs)
    over = [[name for name in _names(names) if name in tokens] for names in spec or ()]
    if all(len(rings(name)) < 3 for names in over for name in names):
        return kernel

    def local(kernel):
        for axis, names in enumerate(over):
            for name in reversed(names):
                for groups in reversed(list(_groups(rings(name)))):  # neighbours first, so that parts stay in order
                    kernel = jax.lax.all_gather(kernel, name, axis_index_groups=groups, axis=axis, tiled=True)
        return kernel

    part, whole = (
        jax.P(*(found if names else kept for kept, names, found in zip(spec, over, of_over, strict=True)))
        for of_over in (map(tuple, over), [None] * len(over))
    )
    return _on_every_device(local, part, whole)(kernel)


def _on_every_device(local, in_specs, out_specs):
    # What shares out positions too, the last of an axis' names, is left to XLA: manual axes cannot name it.
    sizes = jax.sharding.get_abstract_mesh().shape
    manual = {name for name, size in sizes.items() if name != "context" or size == 1}
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)


def _tokens(packs):
    """Mesh axes that share out so many packs."""
    spec = partition((packs,), "batch")
    return _names(spec and spec[0])


def _kernel_gradient(x, dy, inputs, outputs):
    n, leading = len(inputs), x.ndim - len(inputs)
    shape = (*x.shape[leading:], *dy.shape[leading:])
    spec = partition(shape, *inputs, *outputs)
    ends = ((x, inputs), (dy, outputs))
    alone = [None] * (leading - 1)
    lies = spec and [partition(a.shape, "batch", *alone, *map(_of_activation, names)) for a, names in ends]
    tokens = _tokens(x.shape[0])
    scattered = [axis for axis in (0, n) if spec and set(_names(spec[axis])) & set(tokens)]
    if len(scattered) != 1:
        return _here(x, dy, leading)
    (axis,) = scattered
    over = tuple(name for name in _names(spec[axis]) if name in tokens)
    if _names(spec[axis])[: len(over)] != over or devices(over) == 1:
        return _here(x, dy, leading)
    of_kernel = jax.P(*(over if i == axis else names for i, names in enumerate(spec)))

    def local(x, dy):
        # With the scattered axis first: as the last one its parts could be narrower than a vector register.
        kernel = _over_positions(x, dy, leading) if axis == 0 else _over_positions(dy, x, leading)
        for name in over:
            for groups in _groups(rings(name)):
                kernel = jax.lax.psum_scatter(kernel, name, axis_index_groups=groups, tiled=True)
        others = tuple(name for name in tokens if name not in over)
        kernel = jax.lax.psum(kernel, others) if others else kernel
        return kernel if axis == 0 else _swap(kernel, len(outputs))

    return constrain(_on_every_device(local, tuple(lies), of_kernel)(x, dy), *inputs, *outputs)


def _here(x, dy, leading):
    """The kernel's gradient without a scatter.

    A CPU transposes the first factor, together with all that gives it where that is recomputed, so it is the
    narrower one: SwiGLU's product of 4 × 672 positions, 1,408 wide, took 99 ms to be transposed (2026-11-21).
    """
    if x.size <= dy.size:
        return _over_positions(x, dy, leading)
    return _swap(_over_positions(dy, x, leading), dy.ndim - leading)


def _over_positions(a, b, leading):
    return _contract(a, b, range(leading), range(leading))


def _swap(kernel, first):
    """`kernel` with its `first` axes behind the others."""
    return kernel.transpose(*range(first, kernel.ndim), *range(first))


def _of_activation(name):
    """An activation is not shared out as the parameters of its width are."""
    return "act_embed" if name == "embed" else name


def _groups(sizes):
    """For each of the rings that a mesh axis falls into, its groups of positions along the axis, outer ring first."""
    positions = np.arange(math.prod(sizes)).reshape(sizes)
    for ring, size in enumerate(sizes):
        yield np.moveaxis(positions, ring, -1).reshape(-1, size).tolist() if len(sizes) > 1 else None


def _names(axes):
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
