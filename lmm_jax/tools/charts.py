"""Charts as plain SVG for pages that need nothing else: axes, intervals, lines, and bars of shares.

Text keeps its size on wide and narrow screens, as a chart is drawn about as wide as it is shown. Every point says its
numbers when one points at it. Series differ in their marks as well as in their colours, which are told apart by those
who see no red or green (Okabe and Ito).
"""

import dataclasses
import html
import itertools
import math

BLUE, ORANGE, GREEN, PURPLE, BLACK = "#0072b2", "#c24e00", "#007a5a", "#a8487e", "#1b1e24"
# From few tokens to many: shares that are ordered are shades of one colour, told apart without colour too.
SHADES = ("#cfe3f3", "#9cc7e6", "#62a5d6", "#2a74b0", "#155a97", "#0b3765")
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 12, 44  # pixels around the area of a chart
APART = 30  # pixels at least between two labels of an axis


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
      label: what it shows, with its unit.
      low, high: its ends.
      ticks: `(value, label)` pairs.
      log: logarithmic.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value) -> float:
        """Where a value lies, 0 at the low end and 1 at the high end."""
        change = math.log if self.log else float
        low, high = change(self.low), change(self.high)
        return (change(value) - low) / (high - low)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point, with its interval in y if it has one, and what is said of it when one points at it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    says: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
      name: in the legend.
      points: from left to right.
      color, mark: of its points; marks are "circle", "square", "diamond", "triangle" and "star".
      line: "" for none, else the dashes of an SVG line, "0" for a solid one.
      size: half the height of a mark, in pixels.
      mixes: draw the line as what a mixture of two points gives, straight in x; on a logarithmic axis it is bent.
    """

    name: str
    points: tuple[Point, ...]
    color: str = BLUE
    mark: str = "circle"
    line: str = "0"
    size: float = 4.5
    mixes: bool = False


def token_axis(values, label="visual tokens of a picture (logarithmic)", ticks=None) -> Axis:
    """A logarithmic axis around positive values, with ticks at `ticks`, else at round numbers."""
    low, high = min(values), max(values)
    wider = 1.15 if high > low else 2.0
    low, high = low / wider, high * wider
    ticks = sorted(set(ticks)) if ticks is not None else _round_numbers(low, high)
    return Axis(label, low, high, tuple((t, f"{t:,.10g}") for t in ticks if low <= t <= high), log=True)


def _round_numbers(low, high):
    """1, 2, 5, 10, … between two positive numbers; finer steps where these are too few."""
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            return found
    return _steps(low, high)


def _steps(low, high):
    """About four evenly spaced round numbers between two numbers."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (step * factor) >= 3 or factor == 1)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def share_axis(values, label="accuracy") -> Axis:
    """An axis in per cent that shows all values, shares of about 0 … 1, and ends at round numbers."""
    low, high = min(values), max(values)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if high - low <= 5 * s or s == 0.2)
    low, high = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    high += high == low
    ticks = tuple((n * step, percent(n * step, 0)) for n in range(low, high + 1))
    return Axis(label, low * step, high * step, ticks)


def percent(share, digits=1) -> str:
    """ "37.5 %", in one line."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def chart(x, y, series, says, width=600, height=330, diagonal=False) -> str:
    """An SVG of series between two axes.

    Args:
      x, y: `Axis`.
      series: `Series`; later ones lie above earlier ones.
      says: what the chart shows, for who does not see it.
      width, height: in pixels.
      diagonal: draw the line where y equals x.
    """

    def at(px, py):
        return (
            LEFT + x.place(px) * (width - LEFT - RIGHT),
            height - BOTTOM - y.place(py) * (height - TOP - BOTTOM),
        )

    parts = [*_grid(x, y, at, width, height)]
    if diagonal:
        (x0, y0), (x1, y1) = at(x.low, x.low), at(x.high, x.high)
        parts.append(f'<line class="diagonal" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')
    for of in series:
        places = [at(point.x, point.y) for point in of.points]
        if of.line and len(places) > 1:
            line = _mixed(of.points, at) if of.mixes else places
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in line)
            parts.append(f'<polyline points="{path}" fill="none" {_stroke(of)}/>')
        for point, (px, py) in zip(of.points, places, strict=True):
            parts.append(f"<g>{_interval(point, px, at, of.color)}{_mark(of, px, py)}{_says(point.says)}</g>")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(says)}" '
        f'style="max-width:{width * 1.15:.0f}px">{"".join(parts)}</svg>'
    )


def _mixed(points, at):
    """Places of points and, between two of them, of mixtures."""
    for a, b in itertools.pairwise(points):
        for share in (n / 16 for n in range(16)):
            yield at(a.x + share * (b.x - a.x), a.y + share * (b.y - a.y))
    yield at(points[-1].x, points[-1].y)


def _grid(x, y, at, width, height):
    """The frame, ticks and labels of a chart."""
    for value, label in y.ticks:
        _, py = at(x.low, value)
        yield f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{html.escape(label)}</text>'
    last = -APART
    for value, label in x.ticks:
        px, _ = at(value, y.low)
        yield f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        if px - last >= APART:
            yield f'<text x="{px:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{html.escape(label)}</text>'
            last = px
    middle = LEFT + (width - LEFT - RIGHT) / 2
    yield f'<text class="axis" x="{middle:.0f}" y="{height - 8}" text-anchor="middle">{html.escape(x.label)}</text>'
    middle = TOP + (height - TOP - BOTTOM) / 2
    yield (
        f'<text class="axis" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y.label)}</text>"
    )


def _interval(point, px, at, color):
    if point.low is None:
        return ""
    (_, low), (_, high) = at(point.x, point.low), at(point.x, point.high)
    lines = ((px, low, px, high), (px - 5, low, px + 5, low), (px - 5, high, px + 5, high))
    path = "".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for a, b, c, d in lines)
    return f'<path d="{path}" stroke="{color}" stroke-width="1.5" fill="none"/>'


def _stroke(series):
    dashes = f' stroke-dasharray="{series.line}"' if series.line != "0" else ""
    return f'stroke="{series.color}" stroke-width="2"{dashes}'


def _mark(series, px, py):
    r, color = series.size, series.color
    if series.mark == "circle":
        return f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{r}" fill="{color}"/>'
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
        "triangle": [(0, -1.2), (1.2, 1), (-1.2, 1)],
        "star": [
            (math.sin(n * math.pi / 5) * (1.9, 0.8)[n % 2], -math.cos(n * math.pi / 5) * (1.9, 0.8)[n % 2])
            for n in range(10)
        ],
    }[series.mark]
    path = " ".join(f"{px + a * r:.1f},{py + b * r:.1f}" for a, b in corners)
    edge = ' stroke="#fff" stroke-width="1.2"' if series.mark == "star" else ""
    return f'<polygon points="{path}" fill="{color}"{edge}/>'


def _says(words):
    return f"<title>{html.escape(words)}</title>" if words else ""


def legend(series) -> str:
    """HTML that says which series is which."""
    items = []
    for of in series:
        line = ""
        if of.line:
            line = f'<line x1="0" x2="34" y1="9" y2="9" {_stroke(of)}/>'
        swatch = f'<svg width="34" height="18" aria-hidden="true">{line}{_mark(of, 17, 9)}</svg>'
        items.append(f"<span>{swatch}{html.escape(of.name)}</span>")
    return f'<div class="legend">{"".join(items)}</div>'


def shade(number, count) -> str:
    """The colour of part `number` of `count` ordered ones."""
    return SHADES[round(number * (len(SHADES) - 1) / max(1, count - 1))] if count > 1 else SHADES[3]


def share_bar(shares, says) -> str:
    """HTML of a bar whose parts are shares of a whole, in `shade`s; what is missing from the whole is hatched.

    Args:
      shares: of ordered parts, together at most 1.
      says: for each part, and for the rest, what is said when one points at it.
    """
    parts = []
    for n, share in enumerate(shares):
        color = shade(n, len(shares))
        ink = "#fff" if SHADES.index(color) > 2 else BLACK
        parts.append(_part(share, f"background:{color};color:{ink}", "", says[n]))
    rest = max(0.0, 1 - sum(shares))
    return f'<div class="shares">{"".join(parts)}{_part(rest, "", " unsolved", says[-1])}</div>'


def _part(share, style, kind, says):
    if share < 0.0005:
        return ""
    label = percent(share, 0) if share >= 0.06 else ""
    return f'<span class="share{kind}" style="width:{share:.3%};{style}" title="{html.escape(says)}">{label}</span>'
