"""One mesh, one table of logical axes, and the checks that Flax and JAX leave to us.

Parameters and activations name *logical* axes (`"embed"`, `"heads"`, …) where they are created; `config.rules`
maps each to mesh axes. A misspelt name is an error here (Flax replicates silently), and so is a large parameter
that a mesh axis does not divide.
"""

import contextlib
import contextvars
import math

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Every logical axis that a module may name: what it is, for `lmm show sharding` and error messages.
LOGICAL_AXES = {
    "batch": "packs of a batch",
    "length": "text positions",
    "views": "pictures of all packs, flat",
    "layers": "stacked layers of a scan",
    "vocab": "vocabulary rows",
    "embed": "model width, of parameters",
    "act_embed": "model width, of activations",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "width of one head",
    "mlp": "hidden width of a feed-forward layer",
    "pixels": "one patch's pixel values",
    "positions": "learned positions",
    "window": "rows of a convolution's window",
    "window_2": "columns of a convolution's window",
    "lora": "rank of adapters",
    "norm": "scales and biases of norms",
}

# Below this many elements a parameter that does not divide over its mesh axis is replicated instead.
SMALL = 1 << 16

_mesh = contextvars.ContextVar("mesh", default=None)


def make_mesh(shape, devices=None) -> Mesh:
    """Builds the `(data, fsdp, tensor, context)` mesh; one axis may be -1 and takes the remaining devices.

    Axes are always `Auto`: Linen's constraints assert under the `Explicit` axes that `jax.make_mesh` defaults to.

    Args:
      shape: mapping of mesh axis to size; axes that are not named have size 1.
      devices: devices to use; all by default.

    Raises:
      ValueError: an unknown axis, more than one -1, or a product that is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = sorted(set(shape) - set(MESH_AXES))
    if unknown:
        raise ValueError(f"config.mesh: unknown mesh axes {unknown}; known are {list(MESH_AXES)}")
    sizes = [shape.get(axis, 1) for axis in MESH_AXES]
    if sizes.count(-1) > 1:
        raise ValueError(f"config.mesh: only one axis may be -1, got {dict(zip(MESH_AXES, sizes, strict=True))}")
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"config.mesh: {dict(zip(MESH_AXES, sizes, strict=True))} needs {math.prod(sizes)} devices, "
            f"there are {len(devices)}; an axis of -1 takes those that the others leave"
        )
    return Mesh(_arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes, devices):
    """Devices as an array of `sizes`, neighbours along axes; several TPU slices stand behind each other in "data"."""
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices < 2:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, *others = sizes
    if data % slices:
        raise ValueError(f"config.mesh.data={data} does not divide over the {slices} slices that there are")
    inside = (data // slices, *others)
    outside = (slices, *(1 for _ in others))
    return mesh_utils.create_hybrid_device_mesh(inside, outside, devices, allow_split_physical_axes=True)


@contextlib.contextmanager
def use(mesh, rules):
    """Makes `mesh` and the logical axis table current, for tracing and for running.

    Raises:
      ValueError: the table names an axis that no module uses, or a mesh axis that does not exist.
    """
    check_rules(rules)
    token = _mesh.set(mesh)
    try:
        with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
            yield mesh
    finally:
        _mesh.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of `use` with its devices, which JAX's abstract mesh leaves out; None outside `use`."""
    return _mesh.get()


def platform() -> str:
    """`"cpu"`, `"gpu"` or `"tpu"`: what the current mesh is made of, so that kernels follow the compile target."""
    mesh = current_mesh()
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def check_rules(rules):
    """Raises ValueError for a logical or mesh axis in `config.rules` that does not exist."""
    for name, target in rules.items():
        _check_name(name)
        for axis in _as_tuple(target):
            if axis not in MESH_AXES:
                raise ValueError(f"config.rules.{name}: no mesh axis '{axis}'; known are {list(MESH_AXES)}")


def constrain(x, *names):
    """Constrains activation `x` to the mesh axes of its logical axes `names` (None = not sharded).

    Outside `use` it returns `x` unchanged, so that modules can be called on one device without ceremony. A mesh
    axis that does not divide its dimension is dropped.
    """
    spec = partition(x.shape, *names)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def partition(shape, *names) -> PartitionSpec | None:
    """The mesh axes that `constrain` gives an array of `shape`; None outside `use`."""
    for name in names:
        _check_name(name)
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    if mesh.empty or not rules:
        return None
    return PartitionSpec(*_divisible(shape, names, mesh.shape, rules))


def ways(name) -> int:
    """Devices over which the current mesh shares out what divides of logical axis `name`; 1 outside `use`."""
    return devices(_mesh_axes(name, dict(nn.get_logical_axis_rules())))


def devices(axes) -> int:
    """Devices that share out a dimension with the `axes` of a `PartitionSpec`: None, one name or several."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in _as_tuple(axes))


def param_shardings(boxed, mesh, rules):
    """Shardings of a tree of boxed abstract parameters.

    Args:
      boxed: what `jax.eval_shape(model.init, …)["params"]` returned, boxes included.
      mesh: the mesh.
      rules: logical to mesh axes.

    Returns:
      The same tree, unboxed, of `NamedSharding`.

    Raises:
      ValueError: a parameter without axis names, an unknown name, or a large parameter that does not divide.
    """

    def one(path, box):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(box, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {where} names no logical axes")
        shape, names = box.value.shape, box.names
        if len(names) != len(shape):
            raise ValueError(f"parameter {where}: {len(names)} axis names {names} for shape {shape}")
        wanted = [tuple(a for a in _mesh_axes(name, rules) if mesh.shape[a] > 1) for name in names]
        spec = _divisible(shape, names, mesh.shape, rules)
        # Of an adapter either side may be shared out, or neither: it is a small part of its kernel.
        if math.prod(shape) > SMALL and "lora" not in names:
            for dim, name, want, got in zip(shape, names, wanted, spec, strict=True):
                size = math.prod(mesh.shape[a] for a in want)
                if size > 1 and not got and dim % size == 0:
                    others = [other for other, axes in zip(names, wanted, strict=True) if set(axes) & set(want)]
                    raise ValueError(
                        f"parameter {where} {shape}: its axes {' and '.join(map(repr, others))} all go to mesh axes "
                        f"{want}, which can share out one of them; change config.rules.{name}"
                    )
                if size > 1 and not got:
                    raise ValueError(
                        f"parameter {where} {shape}: axis '{name}' of size {dim} does not divide over "
                        f"{want} = {size} devices; change config.mesh or config.rules.{name}"
                    )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def batch_sharding(mesh, rules) -> NamedSharding:
    """Sharding of batch leaves `[micro-batches, packs, …]`: packs over the batch axes, the rest replicated."""
    return NamedSharding(mesh, PartitionSpec(None, _mesh_axes("batch", rules) or None))


def check_packs(mesh, rules, packs, what="train.batch_size / train.micro_batches"):
    """Raises ValueError if the packs of a micro-batch, set by `what`, do not divide over the mesh's batch axes."""
    axes = _mesh_axes("batch", rules)
    size = math.prod(mesh.shape[a] for a in axes)
    if packs % size:
        raise ValueError(
            f"{what}: {packs} packs a micro-batch do not divide over the {size} "
            f"devices of mesh.{'·'.join(axes)}; set a multiple of {size}"
        )


def check_length(mesh, rules, length):
    """Raises ValueError if rows of `length` positions do not divide over their axes of the mesh."""
    axes = _mesh_axes("length", rules)
    shared = sorted({a for name in ("batch", "heads", "kv_heads") for a in _mesh_axes(name, rules) if a in axes})
    if shared:
        raise ValueError(f"config.rules.length={axes}: {shared} also share out packs or heads; name others")
    size = math.prod(mesh.shape[a] for a in axes)
    if size > 1 and length % (2 * size):
        raise ValueError(
            f"data.length={length} does not divide into {2 * size} chunks, two for each of the {size} devices of "
            f"mesh.{'·'.join(axes)}; set a multiple of {2 * size}"
        )


def local_packs(mesh, rules, shape) -> np.ndarray:
    """Flat pack numbers `[n]` of a `[micro-batches, packs]` batch that this host's devices hold, ascending.

    Raises:
      ValueError: the packs do not divide over the batch axes of the mesh.
    """
    check_packs(mesh, rules, shape[1])
    numbers = np.arange(math.prod(shape)).reshape(shape)
    blocks = batch_sharding(mesh, rules).addressable_devices_indices_map(shape).values()
    return np.unique(np.concatenate([numbers[index].reshape(-1) for index in blocks]))


def to_global(batch, packs, mesh, rules, shape):
    """Turns this host's packs into global arrays.

    Args:
      batch: dict of arrays `[len(packs), …]`.
      packs: what `local_packs` returned.
      shape: `(micro-batches, packs)` of the global batch.

    Returns:
      dict of global arrays `[micro-batches, packs, …]`.
    """
    sharding = batch_sharding(mesh, rules)
    place = np.full(math.prod(shape), -1)
    place[packs] = np.arange(len(packs))
    numbers = place.reshape(shape)

    def one(x):
        return jax.make_array_from_callback((*shape, *x.shape[1:]), sharding, lambda index: x[numbers[index[:2]]])

    return {name: one(x) for name, x in batch.items()}


def replicated(mesh) -> NamedSharding:
    """The sharding of values that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def assert_sharded(tree, shardings, what):
    """Raises AssertionError naming the first leaf of `tree` whose sharding is not the planned one.

    An optimizer state created without output shardings lands on one device and only fails after a restore.
    """

    def one(path, x, want):
        if not x.sharding.is_equivalent_to(want, x.ndim):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise AssertionError(f"{what}: {name} {x.shape} has sharding {x.sharding}, planned was {want}")

    jax.tree_util.tree_map_with_path(one, tree, shardings)


def _check_name(name):
    if name is not None and name not in LOGICAL_AXES:
        raise ValueError(f"unknown logical axis '{name}'; known are {sorted(LOGICAL_AXES)}")


def _as_tuple(target):
    return () if target is None else (target,) if isinstance(target, str) else tuple(target)


def _mesh_axes(name, rules):
    if name is None:
        return ()
    _check_name(name)
    return _as_tuple(rules.get(name))


def _divisible(shape, names, sizes, rules):
    """Mesh axes per dimension, leaving out those that do not divide it, are of size 1, or are already used."""
    spec, used = [], set()
    for dim, name in zip(shape, names, strict=True):
        axes = tuple(a for a in _mesh_axes(name, rules) if sizes[a] > 1 and a not in used)
        fits = axes and dim % math.prod(sizes[a] for a in axes) == 0
        used.update(axes if fits else ())
        spec.append((axes if len(axes) > 1 else axes[0]) if fits else None)
    return spec
