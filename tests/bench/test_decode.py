"""Decoding: rate and time of a step, bytes of the weights."""

import json

import pytest

from lmm_jax.bench import decode as bench_decode
from tests.bench.tiny import TEXT, TINY, params, run

QUEUE = ("_queue", "_again", "_seen")  # what makes the rows of a queue and of later questions


@pytest.mark.parametrize("left_out", [QUEUE, pytest.param((), marks=pytest.mark.long)])
def test_decoding(capsys, tmp_path, monkeypatch, left_out):
    (tmp_path / "one.json").write_text(json.dumps(TINY | {"scales": [4]}))
    for name in left_out:
        monkeypatch.setattr(bench_decode, name, lambda *_: [])
    rows = run(capsys, "decode", "--shape", tmp_path / "one.json", "--steps", 1)
    step, rate = (rows[f"4 visual tokens, {what}"]["value"] for what in ("a decoding step", "decoding"))
    assert rate * step == pytest.approx(1e3 * TINY["batch"])
    d, (kv, layers) = TEXT["width"], (TEXT["width"] // 2, TEXT["layers"])
    weights = layers * (2 * d * d + 2 * d * kv + 3 * d * TEXT["mlp"] + 2 * d) + d + d * TEXT["vocab_size"]
    assert bench_decode.step_bytes(params()) == 4 * weights
