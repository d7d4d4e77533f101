"""The data path: a row a stage, and cores for chips."""

import pytest

from tests.bench.tiny import run


def test_data_on_photographs(capsys):
    rows = run(capsys, "data", "--config", "configs/llava.py", "--photographs", 6, "--records", 4)
    four, eight = (rows[f"cores for {n} v5e"]["value"] for n in (4, 8))
    assert eight == pytest.approx(2 * four)
    assert rows["cores for 4 v5p"]["value"] == pytest.approx(four * 459 / 197)
    seconds = float(rows["cores for 4 v5e"]["against"].split(" s,")[0])  # of a pack of 2,048 positions, on a chip
    assert seconds == pytest.approx(6 * 6.6e9 * 2048 / 197e12, rel=0.15)  # the decoder's, but for attention
    assert four == pytest.approx(4 * rows["a pack"]["value"] / 1e3 / seconds, rel=0.01)


def test_each_stage_has_a_row(capsys, tiny_args):
    rows = run(capsys, "data", *tiny_args, "--records", 20, "--packs", 64, "--step-seconds", 2)
    assert all(row["value"] > 0 for row in rows.values())
    assert rows["decode and resize"]["ratio"] > 0 and rows["decode and resize"]["unit"] == "images/s/core"
    per_pack = 1 / rows["whole records, packed"]["value"]  # one record a pack
    assert rows["cores for 64 packs in 2 s"]["value"] == pytest.approx(per_pack * 64 / 2)
