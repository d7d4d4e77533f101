"""A picture with what its visual tokens stand for drawn over it, as SVG: sharp at every size, and no script in it."""

import html

from PIL import Image

from lmm_jax.tools.batch_page import counted, data_url

SHOWN = 1000  # pixels, the longer side of a picture within the page; a larger one is shrunk
ENLARGED = 200  # pixels: the longer side of a picture whose own pixels are shown as squares
FINE = 300  # tokens: the outlines of more are drawn with thin lines
# Told apart by people who see colours differently, too (Okabe and Ito), and then again from the first.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7a5195", "#8c564b")


def colour(number) -> str:
    """The colour of a stack, on drawings and in the map of layers."""
    return COLOURS[number % len(COLOURS)]


def draw(picture, figure, names) -> str:
    """An HTML `<figure>`: the picture, outlines of its tokens, and what becomes a stack in the stack's colour.

    Args:
      picture: an upright RGB `PIL.Image`.
      figure: of `regions.figures` for this picture.
      names: of the stacks, by their numbers; text.
    """
    left, top, right, bottom = figure.box
    width, height = picture.size
    stacks = "".join(
        f'<path class="stack" style="fill:{colour(number)}" d="{_path(areas)}"/>' for number, areas in figure.stacks
    )
    fine = ' class="fine"' if len(figure.tokens) > FINE else ""
    small = ' class="pixels"' if max(width, height) <= ENLARGED else ""
    legend = "".join(
        f'<span><i style="background:{colour(number)}"></i>{html.escape(names[number])}</span>'
        for number, _ in figure.stacks
    )
    return (
        f'<figure class="drawing"><svg{fine} viewBox="{left:g} {top:g} {right - left:g} {bottom - top:g}" role="img" '
        f'aria-label="{html.escape(caption(figure))}">'
        f'<rect class="padding" x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"/>'
        f'<image{small} width="{width}" height="{height}" preserveAspectRatio="none" href="{_shown(picture)}"/>'
        f'{stacks}<path class="unused" d="{_path(figure.unused)}"/>'
        f'<path class="halo" d="{_path(figure.tokens)}"/><path class="token" d="{_path(figure.tokens)}"/>'
        f'<path class="tile" d="{_path(figure.tiles)}"/></svg>'
        f'<figcaption>{html.escape(caption(figure))}<span class="legend">{legend}</span></figcaption></figure>'
    )


def caption(figure) -> str:
    """A sentence about a figure of `regions.figures`."""
    said = []
    if figure.in_sequence:
        said.append(f"{counted(figure.in_sequence, 'visual token')} in the sequence")
    if figure.newlines:
        said.append(f"{counted(figure.newlines, 'newline')} at the ends of their rows")
    if figure.stacks:
        said.append(f"{counted(len(figure.stacks), 'stack')} added over the tokens")
    if len(figure.unused):
        said.append("what is dimmed is left out")
    name = figure.views[0].upper() + figure.views[1:]
    return f"{name}: {', '.join(said)}"


def _shown(picture):
    """The picture as a data URL, of at most `SHOWN` pixels a side."""
    if max(picture.size) > SHOWN:
        picture = picture.copy()
        picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return data_url(picture)


def _path(areas):
    """The rectangles of areas `[n, 4]` as the data of an SVG path."""
    rounded = areas.round(2).tolist()
    return "".join(f"M{left:g} {top:g}H{right:g}V{bottom:g}H{left:g}Z" for left, top, right, bottom in rounded)
