"""Tables of parameters and their shardings, and a page of packs as the model sees them."""

import base64
import html
import io
import math
import os

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from lmm_jax.config import ConfigError, flatten, visual_layout
from lmm_jax.data.pipeline import Packs
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


def batch_page(config, count, path) -> str:
    """Writes an HTML page of the first packs of the stream: views, text, what is supervised, slots.

    Returns:
      `path`.

    Raises:
      ConfigError: the config names no data.
    """
    if not config.data.path and not config.data.mixture:
        raise ConfigError("config field 'data.path' is not set; name the folder that `lmm prepare` wrote")
    packs = Packs(config, visual_layout(config), config.data.train, config.train.batch_size, shuffle=True)
    body = "".join(_pack_html(packs, position) for position in range(count))
    with open(path, "w") as f:
        f.write(PAGE.format(body=body, title=html.escape(", ".join(f"{d.folder} ({d.split})" for d in packs.data))))
    return os.path.abspath(path)


PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px system-ui; margin: 2em; max-width: 75em }} img {{ image-rendering: pixelated }}
.pack {{ border-top: 1px solid #ccc; padding: 1em 0 }} .row {{ margin: .5em 0; line-height: 1.9 }}
.t {{ background: #eee; border-radius: 3px; padding: 1px 3px; margin: 1px; white-space: pre }}
.grid {{ display: inline-block; line-height: 0; vertical-align: top; margin-right: 10px }} .grid img {{ margin: 1px }}
.s {{ background: #b6e3b6 }} .v {{ background: #cfd8f5 }} small {{ color: #666 }}
</style><h1>{title}</h1><p><span class="t">read</span> <span class="t s">supervised</span>
<span class="t v">visual tokens (slots)</span></p>{body}"""


def _pack_html(packs, position):
    pack, tokenizer = packs[position], packs.tokenizer
    pictures = _pictures_html(pack["pixels"], packs, position) if "pixels" in pack else ""
    group = np.zeros(pack["id"].size, np.int64)
    used = pack["group"] > 0
    group[pack["target_at"][used]] = pack["group"][used]
    rows = []
    for r in range(pack["id"].shape[0]):
        at = r * pack["id"].shape[1]
        for number in range(1, pack["segment"][r].max() + 1):
            where = np.flatnonzero(pack["segment"][r] == number)
            if len(where):
                rows.append(_segment_html(pack, tokenizer, r, where, group[at + where], packs.layout))
    n_targets = int(used.sum())
    filled = (pack["segment"] > 0).mean()
    records = ", ".join(html.escape(packs.name(*member)) for member in packs.members(position))
    faults = "".join(f"<p>replaced: {html.escape(fault['reason'])}</p>" for fault in pack["faults"])
    return (
        f'<div class="pack"><p>position {position}: {records} '
        f"<small>{n_targets} supervised, {filled:.0%} of {pack['id'].size} positions used</small></p>"
        f"{faults}{pictures}{''.join(rows)}</div>"
    )


def _pictures_html(pixels, packs, position):
    """Each picture of a pack: the whole, its tiles as they lie, then the zoomed tiles of each."""
    layout, out = packs.layout, []
    a = layout.visual
    sizes = [size for member in packs.members(position) for size in packs.sizes(*member)]
    for number, p in enumerate(layout.place(sizes), start=1):
        views = pixels[p.first_view : p.first_view + a.views_of_tiling(p.tiling)]
        tiles = math.prod(p.tiling) if p.tiling else 0
        grids = [(1, 1), *([p.tiling] if tiles else []), *[(a.zoom, a.zoom)] * (a.zoom > 1) * (1 + tiles)]
        shown, at = [], 0
        for columns, rows in grids:
            cut = [
                f'<img height="{120 // rows}" src="data:image/png;base64,{_png(v)}">'
                for v in views[at : at + rows * columns]
            ]
            at += rows * columns
            lines = ["".join(cut[r * columns : (r + 1) * columns]) for r in range(rows)]
            shown.append(f'<span class="grid">{"<br>".join(lines)}</span>')
        seen = _span("view", p.first_view, len(views))
        grids_of = _span("grid", p.first_grid, a.grids_of_tiling(p.tiling))
        tiled = f", {p.tiling[0]} × {p.tiling[1]} tiles" if tiles else ""
        out.append(
            f"<p><small>picture {number}: {p.size[0]} × {p.size[1]} pixels{tiled}, "
            f"{seen}, {grids_of}</small><br>{''.join(shown)}</p>"
        )
    return "".join(out)


def _span(what, first, count):
    return f"{what}s {first}…{first + count - 1}" if count > 1 else f"{what} {first}"


def _segment_html(pack, tokenizer, r, where, group, layout):
    """One copy: its tokens, runs of visual tokens folded, a token green if the position before predicts it."""
    parts, run = [], []

    def close_run():
        if run:
            slots = [slot for slot in run if slot < layout.newline]
            shown = f"{slots[0]}…{slots[-1]}" if len(slots) > 1 else "".join(map(str, slots))
            lines = f", {len(run) - len(slots)} newlines" if len(slots) < len(run) else ""
            parts.append(f'<span class="t v">{len(slots)} visual: {shown}{lines}</span>')
            run.clear()

    for i, at in enumerate(where):
        slot = pack["slot"][r, at]
        if slot >= 0:
            run.append(slot)
            continue
        close_run()
        piece = html.escape(tokenizer.piece(pack["id"][r, at]).replace("▁", " "))
        supervised = i > 0 and group[i - 1] > 0
        parts.append(f'<span class="t{" s" if supervised else ""}">{piece}</span>')
    close_run()
    members = [str(s) for i, s in enumerate(layout.scales) if np.bitwise_or.reduce(group) >> i & 1]
    return f'<div class="row"><small>row {r}, loss groups {", ".join(members)}:</small> {"".join(parts)}</div>'


def _png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return base64.b64encode(out.getvalue()).decode()


def _leaves(tree):
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _shape(shape):
    return "×".join(map(str, shape))


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
