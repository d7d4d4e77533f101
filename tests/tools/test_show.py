"""Tables and pages of what a config or a folder holds."""

import re

import pytest

import lmm_jax as lmm
from lmm_jax.config import ConfigError
from lmm_jax.tools import show
from tests.conftest import ROOT

DIGITS = f"{ROOT}/configs/digits.py"


def rows(text):
    """Cells of each line of a table, by the first one."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_a_table_of_parameters_adds_up(tiny):
    table = rows(show.param_table(tiny('optimizer.groups=(("vision", 0.0),)')))
    _, shape, axes, number, rate = table["decoder/layers/up/kernel"]
    assert (shape, axes, number) == ("3×32×64", "layers,embed,mlp", "6,144") and float(rate) > 0
    assert table["vision/patches/kernel"][-1] == "frozen"
    numbers = {name: int(cells[-2].replace(",", "")) for name, cells in table.items() if "/" in name}
    totals = {name: int(cells[-1].replace(",", "")) for name, cells in table.items() if len(cells) == 2}
    assert totals.pop("all") == sum(numbers.values()) == sum(totals.values())
    assert totals["vision"] == sum(n for name, n in numbers.items() if name.startswith("vision/"))


def test_a_table_of_shardings_says_what_a_device_holds(tiny):
    text = show.sharding_table(tiny("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"))
    assert text.startswith("mesh: ") and "fsdp 4" in text.splitlines()[0]
    (up,) = [line for line in text.splitlines() if line.startswith("decoder/layers/up/kernel")]
    assert "(None, 'fsdp', 'tensor')" in up and up.split()[-1] == str(3 * 32 * 64 / 8 * 4 / 1024)
    (norm,) = [line for line in text.splitlines() if line.startswith("decoder/norm/scale")]
    assert norm.endswith("replicated")


def page(config, path, count=1):
    assert show.batch_page(config, count, path) == str(path)
    return path.read_text()


def test_the_page_shows_what_is_supervised(tiny, tmp_path):
    text = page(tiny(), tmp_path / "batch.html", 2)
    assert text.count('class="pack"') == 2 and "data:image/png" in text
    assert "9 visual: 5…13" in text and "picture 1: 24 × 24 pixels, view 0, grid 0" in text
    rows = re.findall(r'<div class="row">.*?</div>', text)
    # Nine digits read and the end of the answer, with or without five turns of one piece and their ends.
    assert rows and all(row.count('class="t s"') in (10, 20) and "loss groups" in row for row in rows)


def test_the_page_shows_which_views_are_whose(digits_folder, tmp_path):
    zoomed = ("data.sequence=grid", "data.stacks=zoom", "data.zoom=2", "data.views=50", "data.length=190")
    overrides = (*zoomed, "model.newline=True", "data.targets=100")
    text = page(lmm.load_config(f"{DIGITS}:recipe=deepstack,data={digits_folder}", *overrides), tmp_path / "b.html")
    assert "picture 1: 24 × 24 pixels, 2 × 2 tiles, views 0…24, grids 0…4" in text
    assert "picture 2: 24 × 24 pixels, 2 × 2 tiles, views 25…49, grids 5…9" in text
    assert text.count("<img") == 50 and "45 visual: 0…44, 6 newlines" in text


def test_a_config_without_data_has_no_page(tmp_path):
    config = lmm.load_config(f"{ROOT}/configs/m3.py")
    with config.unlocked():
        config.data.path, config.data.mixture = None, ()
    with pytest.raises(ConfigError, match="'data.path' is not set"):
        show.batch_page(config, 1, tmp_path / "batch.html")
