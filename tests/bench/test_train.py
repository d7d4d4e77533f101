"""The training step: counted operations, ratios, what does not fit. No test looks at a clock."""

import jax
import pytest

from lmm_jax.bench import measure as bench
from lmm_jax.bench import shape as bench_shapes
from lmm_jax.bench import train as bench_train
from lmm_jax.training.state import init_state
from lmm_jax.training.step import jit_eval_step
from tests.bench.tiny import SCALES, TINY, VISION, decoder_flops, encoder_flops, params


def test_counts_of_m3_are_those_made_by_hand():
    seen, block = encoder_flops(VISION["layers"] - 1)
    theirs = sum(seen + block + decoder_flops(12 + scale, 12 + scale) for scale in SCALES)
    ours = seen + sum(decoder_flops(12 + scale, 6) for scale in SCALES)
    assert bench_train.m3_flops(TINY, tuple(SCALES)) == (2 * theirs, 2 * ours)


@pytest.mark.parametrize(("name", "ceiling"), [("base", 1.75), ("llava15_7b", 1.051)])
def test_arithmetic_ceilings_of_the_shapes(name, ceiling):
    shape = bench_shapes.load_shape(name)
    theirs, ours = bench_train.m3_flops(shape, tuple(shape["scales"]))
    assert theirs / ours == pytest.approx(ceiling, abs=0.005)


def test_each_copy_in_a_pack_has_the_loss_it_has_alone():
    program = bench_train.program_of(TINY, "float32", SCALES)
    params, evaluate = init_state(program).params, jit_eval_step(program)
    sums, counts = evaluate(params, bench_shapes.synthetic_batch(TINY, SCALES, rows=2))
    assert counts.tolist() == [12, 12, 12] and len(set(sums.tolist())) == 3
    for i, scale in enumerate(SCALES):
        alone, counts = evaluate(params, bench_shapes.synthetic_batch(TINY, SCALES, copies=(scale,)))
        assert counts[i] == counts.sum() == 12
        assert float(alone[i]) == pytest.approx(float(sums[i]), rel=1e-5)


def test_the_states_dtype_is_that_of_parameters_and_moments():
    state = init_state(bench_train.program_of(TINY, "bfloat16", (16,)), "bfloat16")
    large = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    assert {str(x.dtype) for x in large} == {"bfloat16"}
    assert len(large) == 3 * len(jax.tree.leaves(state.params))


def few_counts(monkeypatch):
    monkeypatch.setattr(bench_train, "m3_flops", lambda *_: (3, 2))
    monkeypatch.setattr(bench_train, "best_rows", lambda *_: 1)


def test_ratios_of_the_training_step(monkeypatch, shape_file):
    timed = {"train": bench_train.Timed(2.0, 2**30, (2, 1, 25)), "m3": bench_train.Timed(4.0, 2**31, (2, 2, 30))}
    peer = {"train": {"ms": 3000.0, "peak_bytes": 2**31}, "train_m3": {"ms": 9000.0, "peak_bytes": 2**32}}
    asked = []

    def run_peer(shape, mode, *options):
        asked.append(options)
        return peer[mode]

    monkeypatch.setattr(bench_train, "run_peer", run_peer)
    few_counts(monkeypatch)
    monkeypatch.setattr(bench_train, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(bench_train, "time_train", lambda *args: timed[args[-1].split(",")[0]])
    rows = {r.name: r for r in bench_train.bench_train(shape_file, "float32", ["float32"], 3, True, "cpu")}
    assert asked[0] == ("--device", "cpu", "--dtype", "float32", "--steps", 3, "--checkpoint")
    seen, _ = encoder_flops(VISION["layers"] - 1)
    rate = rows["train, float32 state, rate"]
    assert rate.ratio == pytest.approx(2 * (seen + decoder_flops(28, 6)) / 2.0 / 1e9)
    assert rate.value == pytest.approx(rate.ratio * 1e9 / 1e12)
    assert rows["train, float32 state"].ratio == 1.5 and rows["m3, float32 state"].ratio == 2.25
    assert rows["train, float32 state, positions"].value == 25 and rows["m3, float32 state, memory"].ratio == 0.5
    assert rows["m3, arithmetic ceiling"].value == 1.5
    assert rows["m3, float32 state, over the peer"].ratio == pytest.approx(2.25 / (1.5 * 1.5))


def test_what_does_not_fit_is_a_row(monkeypatch, shape_file):
    def out_of_memory(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")

    monkeypatch.setattr(bench_train, "time_train", out_of_memory)
    few_counts(monkeypatch)
    rows = bench_train.bench_train(shape_file, "float32", ["float32"], 1)
    assert [(r.name, r.value, r.against) for r in rows[1:3]] == [
        ("train, float32 state", None, "does not fit into memory"),
        ("m3, float32 state", None, "does not fit into memory"),
    ]
    assert "does not fit" in bench.table(rows)


def test_the_real_step_is_timed_and_weighed():
    program, batch = bench_train.program_of(TINY, "float32", (16,)), bench_shapes.synthetic_batch(TINY, (16,))
    timed = bench_train.time_train(program, batch, "float32", 1, "train")
    assert timed.layout == (2, 1, 28) and timed.seconds > 0
    state = 3 * 4 * sum(x.size for x in jax.tree.leaves(params()))  # parameters and two moments
    assert state < timed.bytes < 100 * state
