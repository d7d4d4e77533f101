"""A page of packs as the model sees them: text, pictures where their tokens stand, and what is supervised.

The page is one HTML file that needs nothing else: no script, and each picture once in it. Three levels stand in it:

    pack        what travels through a training step; its pictures are shown with all their views
    row         of a pack: several records one after the other, then padding
    card        one copy of a record, at one scale

Everything is read from the arrays of the packs themselves, so that a fault in them shows.
"""

import base64
import functools
import html
import io
import itertools
import os
import pathlib
import unicodedata

import numpy as np
from PIL import Image

from lmm_jax.config import ConfigError, visual_layout
from lmm_jax.data.pipeline import Packs
from lmm_jax.tools.shown_pack import ShownPack
from lmm_jax.training.plan import check_data_is_named

SHOWN = 200  # pixels, the longer side of a picture on the page
ENLARGED = 96  # pixels: a smaller one is enlarged to about as many
BETWEEN_VIEWS, BETWEEN_TILES = 2, 6  # pixels between views that lie side by side, and between tiles that are zoomed
FOLDED = 200  # positions of text: as many, and more, are folded where an earlier copy has the same
NAMED = 8  # records that are named among those that were left out for one reason


def write_page(config, count, path) -> str:
    """Writes an HTML page of the first packs of the stream.

    Args:
      config: of a run.
      count: packs to show.
      path: of the file.

    Returns:
      the absolute path.

    Raises:
      ConfigError: the config names no data, or `count` is below 1.
      FileNotFoundError, ValueError: data that cannot be used, see `pipeline.Packs`.
    """
    if count < 1:
        raise ConfigError(f"a page shows 1 pack or more, got --packs {count}")
    check_data_is_named(config)
    tolerant = config.copy_and_resolve_references()
    with tolerant.unlocked():
        tolerant.data.max_left_out = 1.0  # a page shows what training refuses, and says so
    packs = Packs(tolerant, visual_layout(config), config.data.train, config.train.batch_size, shuffle=True)
    shown = [ShownPack.read(packs, position) for position in range(count)]
    pictures = "".join(
        f".{_name(pack, number)}{{background-image:url({data_url(_mosaic(views[:1]))})}}\n"
        for pack in shown
        for number, picture in enumerate(pack.pictures)
        if (views := pack.views(picture)) is not None
    )
    height, width = packs.layout.visual.canvas
    shape = f":root {{ --view: {width} / {height} }}\n"
    page = PAGE.format(
        title=_escape(", ".join(data.name for data in packs.datasets)),
        style=style(STYLE) + shape + pictures,
        summary=_summary(config, packs, shown),
        contents=" ".join(f'<a href="#pack-{pack.position}">{pack.position}</a>' for pack in shown),
        packs="".join(map(_pack, shown)),
    )
    with open(path, "w", encoding="utf-8") as f:
        f.write(page)
    return os.path.abspath(path)


# The head of the page.


def _summary(config, packs, shown):
    layout, mixture = packs.layout, packs.stream.mixture
    capacity, (positions, views) = packs.stream.capacity, packs.stream.usage()
    size, filled, supervised = (sum(getattr(p, name) for p in shown) for name in ("size", "filled", "supervised"))
    data = [
        f"<p>{_escape(d.name)}: {len(d.data):,} records, {len(d.used):,} of them in the stream"
        f"{f', {weight:.0%} of what is drawn' if len(packs.datasets) > 1 else ''}</p>"
        for d, weight in zip(packs.datasets, mixture.weights, strict=True)
    ]
    lines = {
        "data": "".join(data),
        "left out": "".join(_left_out(packs, config.data.max_left_out)) or "<p>nothing</p>",
        "text": f"<p>template <b>{_escape(layout.template)}</b>; a {_escape(packs.tokenizer.kind)} tokenizer of "
        f"{packs.tokenizer.vocab_size:,} pieces</p>",
        "pictures": _pictures_line(config, layout),
        "a pack": f"<p>{counted(capacity.rows, 'row')} of {capacity.length:,} positions, "
        f"{counted(capacity.views, 'view')}, up to {capacity.targets:,} supervised positions; "
        f"{counted(packs.per_step, 'pack')} a step</p>",
        "the whole stream": f"<p>{positions:.1%} of the positions and {views:.1%} of the views of its packs are used "
        "in the first round</p>",
        "shown here": f"<p>{counted(len(shown), 'pack')} with "
        f"{counted(sum(len(p.members) for p in shown), 'record')}; "
        f"<b>{filled / size:.1%}</b> of {size:,} positions used, <b>{supervised / max(filled, 1):.1%}</b> of those "
        f"supervised; {sum(p.views_filled for p in shown):,} of {len(shown) * capacity.views:,} views used"
        f"{''.join(_troubles(shown))}</p>",
    }
    return "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines.items())


def _left_out(packs, allowed):
    """A line for each reason why records are not in the stream, or rows not in the folder.

    Args:
      packs: the `Packs`.
      allowed: share of the records above which training refuses to begin.
    """
    for data in packs.datasets:
        where = f"{data.name}: " if len(packs.datasets) > 1 else ""
        for reason, records in data.why_left_out(packs.stream.capacity).items():
            named = ", ".join(map(str, records[:NAMED].tolist()))
            more = f" and {len(records) - NAMED:,} more" if len(records) > NAMED else ""
            numbers = f"({'record' if len(records) == 1 else 'records'} {named}{more})"
            share = f"{len(records):,} of {counted(len(data.data), 'record')}"
            yield (
                f'<p class="warn">{_escape(where)}<b>{share}</b> left out of the stream: {_escape(reason)} '
                f"<small>{numbers}</small></p>"
            )
        if len(data.left_out) > allowed * len(data.data):
            enough = f"data.length={data.length_that_holds(0.99)} would hold 99 % of the records"
            yield (
                f'<p class="warn">{_escape(where)}<b>lmm train refuses to begin</b> if more than '
                f"data.max_left_out={allowed:g} is left out; {enough}</p>"
            )
        for reason, count in data.data.about["refused"].items():
            yield (
                f'<p class="warn">{_escape(where)}<b>{counted(count, "row")}</b> refused by lmm prepare: '
                f"{_escape(reason)}</p>"
            )


def _troubles(shown):
    cut = sum(bool(pack.cut(member)) for pack in shown for member in range(len(pack.members)))
    bad = sum(len(pack.faults) for pack in shown)
    if cut:
        yield f'; <b class="warn">{counted(cut, "record")} cut</b>'
    if bad:
        yield f'; <b class="warn">{counted(bad, "record")} replaced by padding, as they cannot be read</b>'


def _pictures_line(config, layout):
    visual = layout.visual
    height, width = visual.canvas
    parts = [f"views of {width} × {height} pixels", f"data.aspect '{visual.aspect}'"]
    if visual.tilings:
        parts.append("tiles " + ", ".join(f"{columns} × {rows}" for columns, rows in visual.tilings))
    if visual.shrink:
        parts.append(f"their tokens shrunk to about those of {counted(visual.shrink, 'view')}")
    if visual.tiled_alone:
        parts.append("pictures of a conversation that has several are seen whole")
    parts.append(f"in the sequence: '{visual.sequence}'" + (", a newline after each row" if visual.newline else ""))
    if visual.added:
        layers = ", ".join(map(str, config.model.decoder.inject_layers))
        parts.append(f"{counted(visual.added, 'stack')} '{visual.stacks}', added before decoder layers {layers}")
    elif visual.stacks:
        parts.append(f"stacks '{visual.stacks}'")
    parts.append(f"trained at {_scales(layout.scales)}, which counts the tokens of a whole picture")
    return f"<p>{_escape('; '.join(parts))}</p>"


# A pack and its pictures.


def _pack(pack):
    layout, arrays = pack.layout, pack.arrays
    rows = "".join(_row(pack, row) for row in range(len(arrays["segment"])))
    pictures = "".join(_picture(pack, number, picture) for number, picture in enumerate(pack.pictures))
    if pictures:
        pictures = (
            f"<details open><summary><h3>{counted(len(pack.pictures), 'picture')}</h3></summary>"
            f'<div class="pictures">{pictures}</div></details>'
        )
    copies = f", {counted(len(pack.copies), 'copy', 'copies')}" if len(pack.copies) > len(pack.members) else ""
    return (
        f'<section class="pack" id="pack-{pack.position}"><h2>Pack {pack.position}</h2>'
        f"<p>{counted(len(pack.members), 'record')}{copies}; {pack.filled:,} of {pack.size:,} positions used "
        f"({pack.filled / pack.size:.0%}), {pack.supervised:,} of them supervised; {pack.views_filled} of "
        f"{counted(layout.views, 'view')} used</p>{pictures}{rows}</section>"
    )


def _picture(pack, number, picture):
    """A picture with its views as they lie, and how many tokens it has at each scale."""
    layout, visual = pack.layout, pack.layout.visual
    views = pack.views(picture)
    shown = "".join(_views(pack, number, views)) if views is not None else ""
    first, count = picture.first_grid, visual.grids_of_tiling(picture.tiling)
    tokens = [len(layout.slots(picture, scale)) for scale in layout.scales]
    table = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{value:,}</td>' for value in values)}</tr>"
        for name, values in (("scale", layout.scales), ("tokens", tokens))
    )
    return (
        f'<div class="picture"><p><b>{_of_record(pack, number)}</b> of {_record_name(pack, pack.picture_of[number])}'
        f"<br><small>{picture.size[0]:,} × {picture.size[1]:,} pixels; {_span('grid', first, count)}</small></p>"
        f'<div class="views">{shown}</div><table>{table}</table></div>'
    )


def _views(pack, number, views):
    """A figure for each mosaic of a picture's views; see `views.make_views` for their order."""
    picture, zoom = pack.pictures[number], pack.layout.visual.zoom
    at = 0
    for factor in (1, zoom) if zoom > 1 else (1,):
        for columns, rows in ((1, 1), picture.tiling) if picture.tiling else ((1, 1),):
            count = columns * rows * factor**2
            many = columns * rows > 1
            what = f"{columns} × {rows} tiles" if many else "whole picture"
            zoomed = f"{', each' * many} in {factor} × {factor}" if factor > 1 else ""
            if at:
                image = f'<img alt="" src="{data_url(_mosaic(views[at : at + count], (columns, rows), factor))}">'
            else:
                image = _thumbnail(pack, number)
            seen = _span("view", picture.first_view + at, count)
            yield f"<figure>{image}<figcaption>{what}{zoomed}<br>{seen}</figcaption></figure>"
            at += count


def _thumbnail(pack, number):
    """The first view of a picture. It stands on the page once, in the style, however often it is shown."""
    label = _of_record(pack, number)
    return f'<span class="thumb {_name(pack, number)}" role="img" aria-label="{label}"></span>'


def _name(pack, number):
    return f"p{pack.position}-{number}"


def _of_record(pack, number):
    """ "picture 2": as the texts of its record count it."""
    return f"picture {number - pack.picture_of.index(pack.picture_of[number]) + 1}"


def _mosaic(views, tiling=(1, 1), factor=1):
    """One picture of views `[n, H, W, 3]` as they lie, with gaps between them.

    Args:
      views: row by row; if `factor` is more than 1, `factor` · `factor` of each tile one after the other.
      tiling: `(columns, rows)` of tiles.
      factor: views along each side of a tile.
    """
    (columns, rows), (height, width) = tiling, views.shape[1:3]
    longest = max(columns * factor * width, rows * factor * height)
    scale = SHOWN / longest if longest > SHOWN else max(1, round(ENLARGED / longest))
    width, height = max(1, int(width * scale)), max(1, int(height * scale))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST

    def place(view, side):
        """Of view number `view` along a side of views with `side` pixels."""
        return view * (side + BETWEEN_VIEWS) + view // factor * (BETWEEN_TILES - BETWEEN_VIEWS) * (factor > 1)

    across, down = columns * factor, rows * factor
    out = Image.new("RGB", (place(across - 1, width) + width, place(down - 1, height) + height), "white")
    for number, view in enumerate(views):
        tile, inside = divmod(number, factor**2)
        x, y = tile % columns * factor + inside % factor, tile // columns * factor + inside // factor
        out.paste(Image.fromarray(view).resize((width, height), method), (place(x, width), place(y, height)))
    return out


def data_url(picture):
    """A picture within the page: PNG if that is small, as of few colours, else JPEG."""
    files = {kind: io.BytesIO() for kind in ("png", "jpeg")}
    for kind, file in files.items():
        picture.save(file, kind)
    kind = min(files, key=lambda kind: len(files[kind].getvalue()))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind].getvalue()).decode()}"


# A row, its copies of records, and their text.


def _row(pack, row):
    copies = sorted((copy for copy in pack.copies if copy.row == row), key=lambda copy: copy.begin)
    length = pack.arrays["segment"].shape[1]
    used = sum(copy.end - copy.begin for copy in copies)
    padding = f'<p class="padding">{counted(length - used, "position")} of padding</p>' if used < length else ""
    bar = "".join(_bar(pack, copy) for copy in copies)
    by = f", by {counted(len(copies), 'copy of a record', 'copies of records')}" if copies else ""
    return (
        f'<section class="row"><h3>Row {row} <small>{used:,} of {length:,} positions used{by}</small></h3>'
        f'<div class="bar" aria-hidden="true">{bar}</div>'
        f"{''.join(_card(pack, copy) for copy in copies)}{padding}</section>"
    )


def _bar(pack, copy):
    """A copy's part of the bar that shows at a glance what a row holds."""
    length = pack.arrays["segment"].shape[1]
    visual = pack.of_copy("slot", copy) >= 0
    kinds = np.where(visual, "v", np.where(copy.supervised, "s", "r"))
    edges = np.flatnonzero(np.concatenate([[True], kinds[1:] != kinds[:-1], [True]]))
    parts = "".join(
        f'<span class="{kinds[first]}" style="width:{(last - first) / len(kinds):.2%}"></span>'
        for first, last in itertools.pairwise(edges)
    )
    return f'<div style="width:{len(kinds) / length:.3%}">{parts}</div>'


def _card(pack, copy):
    visual, supervised = int((pack.of_copy("slot", copy) >= 0).sum()), int(copy.supervised.sum())
    pictures = pack.picture_of.count(copy.member)
    facts = [
        f"positions {copy.begin:,}…{copy.end - 1:,}",
        f"{counted(pictures, 'picture')}, {counted(visual, 'visual token')}" if pictures else "text alone",
        f"{supervised:,} supervised",
    ]
    cut, fault = pack.cut(copy.member), pack.faults.get(copy.member)
    notes = [f'<span class="note">{_escape(cut)}</span>'] if cut else []
    if fault:
        notes = [f'<span class="note bad">replaced by padding: {_escape(fault["reason"])}</span>']
    loss = f"loss of {_scales(copy.scales)}" if copy.scales else "in no loss"
    return (
        f'<details class="card" open><summary>{_record_name(pack, copy.member)} '
        f'<span class="id">{_escape(pack.identity(copy.member))}</span> <span class="loss">{loss}</span> '
        f"<small>{'; '.join(facts)}</small>{''.join(notes)}</summary>"
        f"{'' if fault else _text(pack, copy)}</details>"
    )


def _text(pack, copy):
    """What a copy says: blocks of what is read, pictures in them, and blocks of what is supervised."""
    blocks, behind, last = [], 0, 0  # blocks up to the last picture, and the position behind it
    for begin, end, number in _runs(pack, copy):
        is_picture = number is not None
        kind = "s" if copy.supervised[begin] else "r"
        if not blocks or blocks[-1][0] != kind:
            blocks.append((kind, []))
        show = functools.partial(_visual, number) if is_picture else _tokens
        blocks[-1][1].append(show(pack, copy, begin, end))
        behind, last = (len(blocks), end) if is_picture else (behind, last)
    shown = [f'<div class="text {kind}">{"".join(parts)}</div>' for kind, parts in blocks]
    earlier = next(other for other in pack.copies if other.member == copy.member)
    again = earlier is not copy and np.array_equal(pack.text_ids(earlier), pack.text_ids(copy))
    if not again or copy.end - copy.begin - last < FOLDED:
        return "".join(shown)
    said = f"the same text as in the copy of {_scales(earlier.scales)}"
    return f"{''.join(shown[:behind])}<details><summary>{said}</summary>{''.join(shown[behind:])}</details>"


def _runs(pack, copy):
    """The parts of a copy: `(begin, end, picture)`, from its own position 0 on, the number of a picture or None."""
    slots = pack.of_copy("slot", copy)
    pictures = iter(number for number, member in enumerate(pack.picture_of) if member == copy.member)
    begin = 0
    while begin < len(slots):
        picture = None
        if slots[begin] >= 0:
            picture = next(pictures)  # all pictures of a copy have the same scale
            count = len(pack.layout.slots(pack.pictures[picture], copy.scales[0]))
        else:
            changes = (slots[begin:] >= 0) | (copy.supervised[begin:] != copy.supervised[begin])
            count = int(changes.argmax()) if changes.any() else len(changes)
        yield begin, begin + count, picture
        begin += count


def _visual(number, pack, copy, begin, end):
    """A thumbnail of picture `number` in the place of its visual tokens."""
    slots, newline = pack.of_copy("slot", copy)[begin:end], pack.layout.newline
    cells = slots[slots < newline]
    slot = f"slots {cells.min():,}…{cells.max():,}" if len(cells) > 1 else f"slot {cells[0]:,}"
    newlines = len(slots) - len(cells)
    lines = f"<br>{counted(newlines, 'newline')} among them" if newlines else ""
    return (
        f'<span class="visual">{_thumbnail(pack, number)}<span><b>{_of_record(pack, number)}</b><br>'
        f"{counted(len(slots), 'token')}{lines}<br>{slot}</span></span>"
    )


def _tokens(pack, copy, begin, end):
    """Tokens of a run of text, each with its position and id for who points at it."""
    ids = pack.of_copy("id", copy)[begin:end].tolist()
    positions = pack.of_copy("position", copy)[begin:end].tolist()
    out, at = [], 0
    for shown in pack.packs.tokenizer.shown(ids):
        title = f"{positions[at]}: {', '.join(map(str, ids[at : at + shown.count]))}"
        kind = ' class="c"' if shown.control else ' class="broken"' if shown.broken else ""
        out.append(f'<i{kind} title="{title}">{visible(shown.text)}</i>')
        at += shown.count
    return "".join(out)


def visible(text):
    """HTML of a text in which line breaks and characters that show nothing are to be seen."""
    return "".join(map(_character, text))


def _character(character):
    if character == "\n":
        return "<b>↵</b>\n"
    if character == "\t":
        return "<b>→</b>\t"
    joins = character in "\u200c\u200d"  # within words of some scripts, and within emoji
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joins:
        return f"<b>U+{ord(character):04X}</b>"
    return _escape(character)


# Words.


def _record_name(pack, member):
    """Number of a record in its prepared folder, which is named too if there are several."""
    dataset, record = pack.members[member]
    several = len(pack.packs.datasets) > 1
    return f"<b>record {record}</b>" + f" of {_escape(pack.packs.datasets[dataset].name)}" * several


def _escape(text):
    return html.escape(str(text))


def counted(count, one, several=None):
    """ "1 view", "3 views"."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def _span(what, first, count):
    return f"{what}s {first}…{first + count - 1}" if count > 1 else f"{what} {first}"


def _scales(scales):
    return f"{'scales' if len(scales) > 1 else 'scale'} {', '.join(map(str, scales))}"


STYLE = pathlib.Path(__file__).with_suffix(".css")


def style(path) -> str:
    """The style that the pages of this room have in common, and that of one of them in a file beside it."""
    return path.with_name("page.css").read_text() + path.read_text()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body>
<h1>What the model is given</h1>
<dl>{summary}</dl>
<div class="legend">
<span><span class="swatch r"></span>text that is read</span>
<span><span class="swatch s"></span>supervised: what the model is to say</span>
<span><span class="swatch v"></span>visual tokens of a picture, and their slots in the bank</span>
<span><span class="swatch p"></span>padding</span>
<span><small>small and grey: control ids, ↵ line breaks; point at a token for its position and id</small></span>
</div>
<p style="margin-top:1rem">Packs: {contents}</p>
{packs}
</body></html>
"""
