"""Attention: a row for each case, of the operations counted by hand."""

import pytest

from lmm_jax.bench import shape as bench_shapes
from tests.bench.tiny import TINY, run


def test_attention_has_rows_for_each_case(capsys, shape_file):
    rows = run(capsys, "attention", "--shape", shape_file, "--steps", 1)
    cases = bench_shapes.attention_cases(TINY)
    assert [case.flops for case in cases] == [
        4 * 2 * 2 * 8 * 17**2,
        4 * 2 * 4 * 6 * 28 * 29 // 2,
        4 * 2 * 4 * 6 * sum(n * (n + 1) // 2 for n in (13, 16, 28)),
    ]
    for case in cases:
        for which, products in (("forward", 1), ("with backward", 3)):
            what = f"{case.name}, {which}"
            rate = products * case.flops / rows[what]["value"] / 1e9
            assert rows[f"{what}, rate"]["value"] == pytest.approx(rate)
