"""Tables of parameters and their shardings, and of the fields of a config."""

import math

import flax.linen as nn
import jax

from lmm_jax.config import flatten
from lmm_jax.fields import all_fields, rule
from lmm_jax.generation.model import load
from lmm_jax.hf.load import report
from lmm_jax.sharding import make_mesh
from lmm_jax.training.state import make_program


def param_table(config) -> str:
    """Every parameter: path, shape, logical axes, number, peak learning rate; totals by part."""
    program = make_program(config, make_mesh({}, jax.devices()[:1]))
    rows, totals = [("parameter", "shape", "axes", "number", "rate")], {}
    for path, box in _leaves(program.boxed):
        size = math.prod(box.value.shape)
        totals[path.split("/")[0]] = totals.get(path.split("/")[0], 0) + size
        rate = program.rates[path]
        axes = ",".join(str(name) for name in box.names)
        rows.append((path, _shape(box.value.shape), axes, f"{size:,}", f"{rate:g}" if rate else "frozen"))
    rows += [("", "", "", "", "")] + [(part, "", "", f"{n:,}", "") for part, n in totals.items()]
    return _table([*rows, ("all", "", "", f"{sum(totals.values()):,}", "")])


def config_table(config) -> str:
    """Every field: its value, marked where it is not the default, what it may be, and what it means."""
    rows = [("field", "value", "what it may be", "what it means")]
    values, table = flatten(config), all_fields(config.model.encoder)
    table |= {name: rule(name.removeprefix("rules.")) for name in values.keys() - table.keys()}
    for name, field in table.items():
        value = values[name]
        changed = "" if value == field.default else " *"
        rows.append((name, f"{value!r}{changed}", field.valid.words, field.meaning))
    return _table([*rows, ("", "", "", ""), ("* is not the default", "", "", "")])


def tensor_table(folder, allow_pickle=False) -> str:
    """What becomes of every tensor of a model's folder: loaded, or ignored and why."""
    return report(load(folder, allow_pickle=allow_pickle).table)


def sharding_table(config) -> str:
    """Every parameter on the mesh of these devices: shape, partition, bytes a device, whether it is replicated."""
    program = make_program(config)
    rows, bytes_total = [("parameter", "shape", "partition", "KiB a device", "")], 0
    specs = dict(_leaves(program.shardings.params))
    for path, box in _leaves(program.boxed):
        shape = box.value.shape
        held = math.prod(specs[path].shard_shape(shape)) * box.value.dtype.itemsize
        bytes_total += held
        note = "replicated" if specs[path].is_fully_replicated else ""
        rows.append((path, _shape(shape), str(tuple(specs[path].spec)), f"{held / 1024:,.1f}", note))
    rows.append(("all", "", "", f"{bytes_total / 1024:,.1f}", ""))
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    return f"mesh: {mesh}\n" + _table(rows)


def _leaves(tree):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _shape(shape):
    return "×".join(map(str, shape))


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
