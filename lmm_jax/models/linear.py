"""A linear map whose kernel is shared out over devices: gathered for a product, its gradient summed and scattered.

Four devices of a mesh `fsdp=4` share out the packs of the batch and, over the same mesh axis, the rows of a kernel.
This is what each of them holds:

    device               0            1            2            3

    x        [B, …, D]   packs 0      packs 1      packs 2      packs 3
    kernel   [D, F]      rows 0       rows 1       rows 2       rows 3

    forward
      gather             rows 0–3     rows 0–3     rows 0–3     rows 0–3     the whole kernel, while the product lasts
      product            y, packs 0   y, packs 1   y, packs 2   y, packs 3   y = x · kernel

    backward
      gather, product    dx, packs 0  dx, packs 1  dx, packs 2  dx, packs 3  dx = dy · kernelᵀ
      product            rows 0–3     rows 0–3     rows 0–3     rows 0–3     xᵀ · dy: what the own packs contribute
      sum and scatter    rows 0       rows 1       rows 2       rows 3       of the sum: it lies as the kernel does

Left to itself, XLA gathers as well, but it sums the whole gradient on every device and cuts it afterwards, which
moves twice the bytes. So the backward pass is written here.

On a TPU slice of several axes a mesh axis falls into rings of neighbours, and libtpu (0.0.51) handles one ring at a
time well: a scatter over several becomes a sum on every device again, and a gather over three becomes a sum of each
part with zeros. So scatters, and gathers over three, go ring by ring. `fsdp=4` on a slice of 2 × 2 has an outer ring
and an inner one, of two devices each:

    0 ─ 1    scatter    outer ring, 0 with 2 and 1 with 3: rows 0–1 stay on 0 and 1, rows 2–3 on 2 and 3
    │   │               inner ring, 0 with 1 and 2 with 3: rows i stay on device i, now summed over all four
    2 ─ 3    gather     the same backwards: the inner ring, then the outer one

To find out whether something is wrong here or elsewhere, switch all this off: inside `plain()`, or in a process whose
environment has `LMM_PLAIN_LINEAR=1`, a linear map is one `dot_general` of which JAX takes the gradient, and XLA alone
decides what moves. The numbers are the same but for rounding.
"""

import contextlib
import contextvars
import functools
import math
import os

import jax
import numpy as np

from lmm_jax.sharding import constrain, current_mesh, partition

PLAIN = "LMM_PLAIN_LINEAR"  # environment variable: the whole process takes the plain path; off if unset, empty or 0

_plain = contextvars.ContextVar("plain", default=os.environ.get(PLAIN, "0") not in ("", "0"))


@contextlib.contextmanager
def plain():
    """Traces inside take one `dot_general` for a linear map, without the gather and scatter of this module.

    For debugging. It acts when a function is traced: what `jax.jit` has compiled before stays as it is.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def linear(x, kernel, inputs, outputs):
    """Contracts the last `len(inputs)` axes of `x` with the first of `kernel`.

    The kernel's gradient lies as the kernel does; see the module for what moves between devices.

    Args:
      x: `[B, …, inputs]`.
      kernel: `[inputs, outputs]` in the dtype of `x`.
      inputs, outputs: logical axes of the kernel.

    Returns:
      `[B, …, outputs]`.
    """
    if _plain.get():
        return _product(x, kernel, len(inputs))
    return _linear(x, kernel, inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _linear(x, kernel, inputs, outputs):
    return _product(x, _gather(kernel, x.shape[0], inputs, outputs), len(inputs))


def _forward(x, kernel, inputs, outputs):
    # A frozen kernel needs no x in the backward pass, and where no gradient flows to x it needs no kernel.
    saved = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    # The product itself, not `_linear` again, in which a policy of rematerialisation would not find it.
    whole = _gather(kernel.value, x.value.shape[0], inputs, outputs)
    return _product(x.value, whole, len(inputs)), saved


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


_linear.defvjp(_forward, _backward, symbolic_zeros=True)


def _product(x, kernel, n):
    """`x · kernel` over the last `n` axes of `x`."""
    return _contract(x, kernel, range(x.ndim - n, x.ndim), range(n))


def _contract(a, b, axes_a, axes_b):
    return jax.lax.dot_general(a, b, ((tuple(axes_a), tuple(axes_b)), ((), ())))


def _gather(kernel, packs, inputs, outputs):
    """The kernel as devices that share out `packs` need it: gathered ring by ring over three, else left to XLA."""
    spec, of_packs = partition(kernel.shape, *inputs, *outputs), _axes_of_packs(packs)
    gathered = [[name for name in _names(names) if name in of_packs] for names in spec or ()]  # of each kernel axis
    if all(len(rings(name)) < 3 for names in gathered for name in names):
        return kernel

    def local(kernel):
        for axis, names in enumerate(gathered):
            for name in reversed(names):
                for groups in reversed(list(_ring_groups(rings(name)))):  # the inner ring first: parts stay in order
                    kernel = jax.lax.all_gather(kernel, name, axis_index_groups=groups, axis=axis, tiled=True)
        return kernel

    # What shares out other things than packs, "tensor" or "context", stays as it is.
    part = jax.P(*(tuple(names) or kept for kept, names in zip(spec, gathered, strict=True)))
    whole = jax.P(*(None if names else kept for kept, names in zip(spec, gathered, strict=True)))
    return _on_every_device(local, part, whole)(kernel)


def _kernel_gradient(x, dy, inputs, outputs):
    """`xᵀ · dy` summed over all packs and positions, `[inputs, outputs]`, lying as the kernel does."""
    leading = x.ndim - len(inputs)  # axes of packs and positions
    shape = (*x.shape[leading:], *dy.shape[leading:])
    of_packs = _axes_of_packs(x.shape[0])
    axis, over = _scatter(shape, of_packs, inputs, outputs)
    if axis is None:
        return _unscattered_gradient(x, dy, leading)

    def local(x, dy):
        # With the scattered axis first: as the last one its parts could be narrower than a vector register.
        kernel = _over_positions(x, dy, leading) if axis == 0 else _over_positions(dy, x, leading)
        for name in over:
            for groups in _ring_groups(rings(name)):
                kernel = jax.lax.psum_scatter(kernel, name, axis_index_groups=groups, tiled=True)
        others = tuple(name for name in of_packs if name not in over)
        kernel = jax.lax.psum(kernel, others) if others else kernel
        return kernel if axis == 0 else _swap(kernel, len(outputs))

    positions = [None] * (leading - 1)
    of_x = partition(x.shape, "batch", *positions, *map(_of_activation, inputs))
    of_dy = partition(dy.shape, "batch", *positions, *map(_of_activation, outputs))
    of_kernel = list(partition(shape, *inputs, *outputs))
    of_kernel[axis] = over
    gradient = _on_every_device(local, (of_x, of_dy), jax.P(*of_kernel))(x, dy)
    return constrain(gradient, *inputs, *outputs)


def _scatter(shape, of_packs, inputs, outputs):
    """The axis of the kernel's gradient that is scattered, and the mesh axes that it is scattered over.

    That is the first of the inputs or of the outputs, whichever is shared out over mesh axes that share out packs
    too. `(None, ())` where none or both are, or where further mesh axes stand before these, so that a scatter would
    give other parts than the kernel's.
    """
    spec = partition(shape, *inputs, *outputs)
    if spec is None:
        return None, ()
    candidates = [axis for axis in (0, len(inputs)) if set(_names(spec[axis])) & set(of_packs)]
    if len(candidates) != 1:
        return None, ()
    (axis,) = candidates
    names = _names(spec[axis])
    over = tuple(name for name in names if name in of_packs)
    return (axis, over) if names[: len(over)] == over else (None, ())


def _unscattered_gradient(x, dy, leading):
    """The kernel's gradient where nothing is scattered, or XLA is left to do it.

    A CPU transposes the first factor, together with all that gives it where that is recomputed, so the first is the
    narrower one; see lmm_jax/bench/README.md for what the other way round took.
    """
    if x.size <= dy.size:
        return _over_positions(x, dy, leading)
    return _swap(_over_positions(dy, x, leading), dy.ndim - leading)


def _over_positions(a, b, leading):
    """`aᵀ · b`, summed over the `leading` axes that both have."""
    return _contract(a, b, range(leading), range(leading))


def _swap(kernel, first):
    """`kernel` with its `first` axes behind the others."""
    return kernel.transpose(*range(first, kernel.ndim), *range(first))


def _on_every_device(local, in_specs, out_specs):
    """`local` as each device runs it on its own parts, for all mesh axes but one that shares out positions.

    That one, the last of an axis' names, is left to XLA: manual axes cannot name it.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    manual = {name for name, size in sizes.items() if name != "context" or size == 1}
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False)


def _axes_of_packs(packs):
    """Mesh axes that share out so many packs."""
    spec = partition((packs,), "batch")
    return _names(spec and spec[0])


def _of_activation(name):
    """An activation is not shared out as the parameters of its width are."""
    return {"embed": "act_embed", "lora": None}.get(name, name)


def _names(axes):
    """An entry of a `PartitionSpec` as a tuple of mesh axes."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def rings(axis) -> tuple[int, ...]:
    """Sizes of the rings into which an axis of the current mesh falls along the axes of a TPU slice, outer first.

    64 devices along all of an 8 × 8 slice are (8, 8). Devices without such axes are one ring, `(size,)`.
    """
    mesh = current_mesh()
    line = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0]
    places = np.array([(*getattr(device, "coords", ()), getattr(device, "core_on_chip", 0)) for device in line])
    sizes = []
    while len(places) > 1:
        # From one device to the next one coordinate moves; the innermost ring ends where another one moves as well.
        moved = places != places[0]
        ends = (i for i in range(2, len(places)) if (moved[i] != moved[1]).any())
        size = next(ends, len(places))
        if len(places) % size:  # no rings that repeat
            return (mesh.shape[axis],)
        sizes.append(size)
        places = places[::size]  # the first device of each innermost ring: the ring around these
    return tuple(reversed(sizes)) or (1,)


def _ring_groups(sizes):
    """For each of the rings of a mesh axis, outer first, the groups of its devices that exchange among themselves.

    A group is a list of positions along the mesh axis. Of one ring it is None, which JAX takes as all positions.
    """
    if len(sizes) == 1:
        yield None
        return
    positions = np.arange(math.prod(sizes)).reshape(sizes)
    for ring, size in enumerate(sizes):
        yield np.moveaxis(positions, ring, -1).reshape(-1, size).tolist()
