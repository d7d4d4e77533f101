"""What pictures of a run show: the lines and points that are drawn, before they are a file."""

import json

import numpy as np
import pytest

from lmm_jax.tools import plots


@pytest.fixture
def figures(monkeypatch):
    """Figures that were saved, still open to be read."""
    found, save = [], plots._save

    def keep(figure, *args):
        found.append(figure)
        return save(figure, *args)

    monkeypatch.setattr(plots, "_save", keep)
    return found


def drawn(ax):
    """Points of each line by its label; lines of one colour that have no label of their own are '+' of its label."""
    out, colours = {}, {}
    for line in ax.get_lines():
        points = np.stack([line.get_xdata(), line.get_ydata()], 1).astype(float).tolist()
        label = line.get_label()
        if label.startswith("_"):
            label = colours[line.get_color()] + "+"
        colours.setdefault(line.get_color(), label)
        out[label] = points
    return out


def is_png(path):
    with open(path, "rb") as f:
        return f.read(8) == b"\x89PNG\r\n\x1a\n"


def test_losses_of_each_scale_with_validation_in_their_colour(tmp_path, figures):
    rows = [
        {"step": 1, "loss": 4.5, "loss/1": 5.0, "loss/36": 4.0},
        {"step": 2, "loss": 3.0, "loss/36": 3.0},
        {"step": 2, "validation_loss": 3.5, "validation_loss/1": 3.6, "validation_loss/36": 3.4},
        {"step": 3, "loss": 2.5, "loss/1": 2.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = plots.draw_loss(tmp_path)
    assert path == str(tmp_path / "loss.png") and is_png(path)
    assert drawn(figures[0].axes[0]) == {
        "1 tokens": [[1, 5.0], [3, 2.5]],
        "1 tokens+": [[2, 3.6]],
        "36 tokens": [[1, 4.0], [2, 3.0]],
        "36 tokens+": [[2, 3.4]],
    }


def test_accuracy_has_a_panel_a_task_and_a_line_a_kind_by_rising_budget(tmp_path, figures):
    results = {
        "digits": {"36": {"cell": 0.9, "read": 0.8, "n_cell": 4}, "9": {"cell": 0.5, "read": 0.4, "n_cell": 4}},
        "pages": {"4": {"line": 0.25}},
    }
    assert is_png(plots.draw_accuracy(results, tmp_path))
    digits, pages = figures[0].axes
    assert (digits.get_title(), pages.get_title()) == ("digits", "pages")
    assert drawn(digits) == {"cell": [[9, 0.5], [36, 0.9]], "read": [[9, 0.4], [36, 0.8]]}
    assert [tick.get_text() for tick in digits.get_xticklabels()] == ["9", "36"]
    assert drawn(pages) == {"line": [[4, 0.25]]}


def test_growth_has_its_points_and_the_line_through_them(tmp_path, figures):
    points = [("visual tokens", x, 2.0 + x) for x in (1, 2, 3)] + [("ViT, pixels", x, 3.0 * x) for x in (10, 20)]
    content = [{"series": series, "x": x, "seconds": y, "flops": 1} for series, x, y in points]
    (tmp_path / "growth.json").write_text(json.dumps(content))
    assert is_png(plots.draw_growth(tmp_path))
    tokens, pixels = figures[0].axes
    assert drawn(tokens)["measured"] == [[1, 3], [2, 4], [3, 5]]
    np.testing.assert_allclose(drawn(tokens)["measured+"], [[1, 3], [2, 4], [3, 5]])
    assert drawn(pixels)["ViT"] == [[10, 30], [20, 60]] and pixels.get_xlabel() == "pixels of a picture"
