"""A small map of a model's layers, from the encoder to the answer: which stack is added before which of them."""

import dataclasses
import html

from lmm_jax.demo.drawing import colour

# What stands in the sequence for a picture, see `VisualLayout.sequence`.
SEQUENCE = {
    "whole": "the whole picture's tokens",
    "blank": "positions without content",
    "samples": "the samples of the tiles, one after the other",
    "whole+samples": "the whole picture's tokens, then the samples of its tiles",
    "flat": "the tokens of all views, one after the other",
    "grid": "the whole picture's tokens, then those of its tiles row by row",
    "unpad": "the whole picture's tokens, then those of its tiles row by row, without padding",
    "tiles": "the tokens of its tiles one by one, with marks between them, then the whole picture's",
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """What is added at the positions of visual tokens on their way through the layers.

    Attributes:
      name: where it comes from.
      part: "encoder" or "decoder", whose layer it is added before.
      layer: number of that layer, from 0.
    """

    name: str
    part: str
    layer: int


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the map.

    Attributes:
      part: "encoder", "sequence" or "decoder".
      text: of the layer, or of several that nothing is added before.
      stacks: numbers of the stacks that are added before it.
    """

    part: str
    text: str
    stacks: tuple[int, ...] = ()


def find_stacks(visual, model) -> list[Stack]:
    """The stacks of a model, numbered as those of `regions.figures`.

    Args:
      visual: its `VisualLayout`.
      model: the `LMM`, without parameters.
    """
    tiles = [f"sample {k} of the tiles" for k in range(max((c * r for c, r in visual.tilings), default=0))]
    of_data = {
        "samples": tiles,
        "copies": ["the whole picture again"] * visual.added,
        "whole": ["the whole picture"],
        "whole+samples": ["the whole picture", *tiles],
        "zoom": [f"sample {k} of the zoomed tiles" for k in range(visual.zoom**2)],
    }
    names = list(of_data.get(visual.stacks, ()))
    for number, stride in enumerate(model.vision.level_strides, start=1):
        of_map = f"earlier map {number} of the encoder"
        names += [of_map] if stride == 1 else [f"sample {k} of {of_map}" for k in range(stride**2)]
    names += [f"finer merge {k} beneath each token" for k in range(model.finer**2)]
    inside = zip(tiles, model.vision.inject_blocks, strict=False)
    return [Stack(name, "encoder", block) for name, block in inside] + [
        Stack(name, "decoder", layer) for name, layer in zip(names, model.decoder.inject_layers, strict=True)
    ]


def find_rows(visual, model) -> list[Row]:
    """The lines of the map, in the order in which a picture passes them; arguments as of `find_stacks`."""
    stacks = find_stacks(visual, model)
    height, width = visual.view_grid
    rows = [Row("encoder", f"vision encoder: {height} × {width} features of each view")]
    rows += [
        Row("encoder", f"vision encoder, block {stack.layer}", (number,))
        for number, stack in enumerate(stacks)
        if stack.part == "encoder"
    ]
    rows.append(Row("sequence", f"in the sequence: {SEQUENCE[visual.sequence]}"))
    begin, depth = 0, model.decoder.depth
    for layer in range(depth + 1):
        here = tuple(n for n, stack in enumerate(stacks) if (stack.part, stack.layer) == ("decoder", layer))
        if begin < layer and (here or layer == depth):
            rows.append(Row("decoder", _layers(begin, layer - 1)))
            begin = layer
        if here and layer < depth:
            rows.append(Row("decoder", _layers(layer, layer), here))
            begin = layer + 1
    return rows


def stack_label(number, stacks) -> str:
    """What a stack is and before which layer it is added, for legends; `stacks` of `find_stacks`."""
    stack = stacks[number]
    where = f"{'encoder block' if stack.part == 'encoder' else 'decoder layer'} {stack.layer}"
    return f"{stack.name} → {where}"


def draw_map(visual, model) -> str:
    """The map as HTML; arguments as of `find_stacks`."""
    stacks = find_stacks(visual, model)
    lines = []
    for row in find_rows(visual, model):
        added = "".join(
            f'<span class="added" style="border-color:{colour(n)}"><i style="background:{colour(n)}"></i>'
            f"{html.escape(stacks[n].name)}</span>"
            for n in row.stacks
        )
        arrow = '<span class="arrow">added before →</span>' if row.stacks else ""
        lines.append(
            f'<div class="adds">{added}{arrow}</div><div class="layer {row.part}">{html.escape(row.text)}</div>'
        )
    if stacks:
        note = "Nothing is added to the sequence: stacks are added to the visual tokens where they stand."
    else:
        note = "This model adds nothing on the way: what it sees of a picture stands in the sequence."
    return f'<div class="map{"" if stacks else " plain"}">{"".join(lines)}</div><p class="note">{note}</p>'


def _layers(first, last):
    return f"decoder layer {first}" if first == last else f"decoder layers {first} to {last}"
