"""Charts as SVG: where points lie, and what is said of them."""

import re
import xml.etree.ElementTree

import numpy as np
import pytest

from lmm_jax.tools import charts
from lmm_jax.tools.charts import Axis, Point, Series


def parsed(svg):
    return xml.etree.ElementTree.fromstring(svg)


def test_points_lie_where_the_axes_say():
    x, y = charts.token_axis([1, 36], ticks=[1, 4, 9, 36]), Axis("accuracy", 0, 1, ((0, "0"), (1, "1")))
    points = tuple(Point(tokens, 0.5, 0.4, 0.6) for tokens in (1, 6, 36))
    root = parsed(charts.chart(x, y, [Series("a", points)], "says"))
    circles = list(root.iter("circle"))
    left, middle, right = (float(circle.get("cx")) for circle in circles)
    assert middle == pytest.approx((left + right) / 2, abs=0.2)  # 6 is in the middle between 1 and 36 by factors
    assert {float(circle.get("cy")) for circle in circles} == {charts.TOP + (330 - charts.TOP - charts.BOTTOM) / 2}
    assert len(list(root.iter("path"))) == 3  # an interval each
    assert [text.text for text in root.iter("text")][2:6] == ["1", "4", "9", "36"]


def test_a_line_of_mixtures_is_straight_in_x():
    x, y = charts.token_axis([1, 100]), charts.share_axis([0, 1])
    series = Series("a", (Point(1, 0), Point(100, 1)), mixes=True)
    (line,) = parsed(charts.chart(x, y, [series], "says")).iter("polyline")
    places = np.array([pair.split(",") for pair in line.get("points").split()], float)
    assert len(places) == 17
    half = places[8]  # of the way in tokens and in accuracy
    assert half[1] == pytest.approx((places[0, 1] + places[-1, 1]) / 2, abs=0.1)
    assert half[0] == pytest.approx(places[0, 0] + np.log(50.5) / np.log(100) * np.ptp(places[:, 0]), abs=0.5)


@pytest.mark.parametrize(
    "values", [(0.3,), (0, 1), (0.84, 0.87), (0.001, 0.0012), (1, 1), (0.2, 0.95), (0, 0), (-0.1, 1.2)]
)
def test_an_axis_of_shares_shows_all_and_ends_at_its_ticks(values):
    axis = charts.share_axis(values)
    assert axis.low <= min(values) + 1e-9 and axis.high >= max(values) - 1e-9 and axis.low < axis.high
    assert axis.ticks[0][0] == pytest.approx(axis.low) and axis.ticks[-1][0] == pytest.approx(axis.high)
    assert 2 <= len(axis.ticks) <= 9 and len({label for _, label in axis.ticks}) == len(axis.ticks)


@pytest.mark.parametrize("values", [(5,), (0.0104, 0.0244), (1, 2880), (0.3, 0.31), (1e-6, 1e6), (100.0, 100.001)])
def test_an_axis_of_factors_has_its_values_inside_and_a_few_ticks(values):
    axis = charts.token_axis(values)
    assert 0 < axis.low < min(values) and axis.high > max(values)
    assert len(axis.ticks) >= 2 and all(axis.low <= value <= axis.high for value, _ in axis.ticks)
    assert len({label for _, label in axis.ticks}) == len(axis.ticks)


def test_labels_that_would_lie_on_each_other_are_left_out():
    x = charts.token_axis([1, 576], ticks=range(1, 577))
    root = parsed(charts.chart(x, charts.share_axis([0, 1]), [], "says"))
    places = [float(t.get("x")) for t in root.iter("text") if t.get("text-anchor") == "middle" and not t.get("class")]
    assert len(places) > 4 and (np.diff(places) >= charts.APART).all()


def test_every_mark_and_the_legend_are_drawn_and_words_are_escaped():
    words = '<script>"&'
    marks = ("circle", "square", "diamond", "triangle", "star")
    series = [Series(words + mark, (Point(1, 0.5, says=words),), mark=mark) for mark in marks]
    axis = charts.share_axis([0, 1], words)
    svg = charts.chart(charts.token_axis([1], words), axis, series, words, diagonal=False)
    root = parsed(svg)
    assert len(list(root.iter("circle"))) + len(list(root.iter("polygon"))) == 5
    assert [title.text for title in root.iter("title")] == [words] * 5 and root.get("aria-label") == words
    assert [span.text or span[0].tail for span in parsed(charts.legend(series))] == [words + mark for mark in marks]
    assert "<script" not in svg + charts.legend(series)


def test_a_bar_of_shares_is_whole():
    bar = parsed(charts.share_bar([0.5, 0.2, 0.1], ["a", "b", "c", "rest"]))
    widths = [float(re.search(r"width:([\d.]+)%", part.get("style"))[1]) for part in bar]
    assert widths == [50, 20, 10, 20] and [part.get("title") for part in bar] == ["a", "b", "c", "rest"]
    assert bar[-1].get("class") == "share unsolved" and bar[0].text == charts.percent(0.5, 0)
    assert len(list(parsed(charts.share_bar([1.0], ["a", "rest"])))) == 1


def test_shades_go_from_light_to_dark():
    for count in (1, 2, 4, 6):
        shades = [charts.SHADES.index(charts.shade(n, count)) for n in range(count)]
        assert shades == sorted(set(shades))
