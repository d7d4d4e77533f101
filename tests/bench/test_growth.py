"""Step time against visual tokens and pixels."""

import dataclasses
import json

import pytest

from lmm_jax.bench import growth as bench_growth
from lmm_jax.bench import train as bench_train
from tests.bench.tiny import TINY, VISION, run


@pytest.mark.long
def test_growth_is_measured_and_drawn(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        bench_growth, "time_train", lambda program, batch, *_: bench_train.Timed(batch["id"].size, 0, ())
    )
    monkeypatch.setattr(bench_growth, "step_flops", lambda program, batch: batch["pixels"].size)
    monkeypatch.setattr(bench_growth, "RESOLUTIONS", (0.5, 1.5))
    shape = TINY | {"scales": [4, 16], "vision": VISION | {"image": 64, "patch": 16}}
    (tmp_path / "shape.json").write_text(json.dumps(shape))
    rows = run(capsys, "train", "--shape", tmp_path / "shape.json", "--growth", tmp_path / "growth")
    assert rows["visual tokens 16"]["value"] == 2 * 28
    assert (tmp_path / "growth/growth.png").read_bytes()[1:4] == b"PNG"
    points = [bench_growth.Point(**p) for p in json.loads((tmp_path / "growth/growth.json").read_text())]
    assert [p.x for p in points if p.series == "ViT, pixels"] == [32**2, 96**2]
    assert [p.x for p in points if p.series == "ConvNeXt, pixels"] == [64**2, 128**2]
    assert dataclasses.asdict(points[0]) == {
        "series": "visual tokens",
        "x": 4,
        "seconds": 32,
        "flops": 2 * 64 * 64 * 3,
    }


def test_distance_from_a_line():
    assert bench_growth.off_line([1, 2, 3], [5, 7, 9]) == pytest.approx(0, abs=1e-9)
    assert bench_growth.off_line([0, 1, 2], [0, 1, 4]) == pytest.approx(1 / 3 / 4 * 2, rel=1e-6)
