"""What the benchmark measures: its batches, counts and ratios, and the peer's process. No test looks at a clock."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmm_jax import cli
from lmm_jax.bench import decode as bench_decode
from lmm_jax.bench import growth as bench_growth
from lmm_jax.bench import measure as bench
from lmm_jax.bench import shape as bench_shapes
from lmm_jax.bench import train as bench_train
from lmm_jax.training.state import init_state
from lmm_jax.training.step import jit_eval_step

SCALES = [1, 4, 16]
VISION = {"image": 16, "patch": 4, "width": 16, "mlp": 40, "layers": 3, "heads": 2}
TEXT = {"width": 24, "mlp": 56, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 128}
TINY = {"name": "tiny", "batch": 2, "text_len": 12, "scales": SCALES, "vision": VISION, "text": TEXT}


@pytest.fixture(scope="module")
def shape_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "MATMUL_SIDE", {"cpu": 32})
    monkeypatch.setattr(bench, "COPIED_BYTES", {"cpu": 4096})


def run(capsys, *args):
    code = cli.main(["bench", *map(str, args), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert all(row.keys() == {"name", "value", "unit", "ratio", "against"} for row in rows)
    return {row["name"]: row for row in rows}


def encoder_flops(blocks):
    """Of a picture: forward, and backward to pixels that have no gradient."""
    n, c = 16, VISION["width"]
    block = 2 * (n + 1) * (4 * c * c + 2 * c * VISION["mlp"]) + 4 * (n + 1) ** 2 * c
    projector = 2 * n * (c * TEXT["width"] + TEXT["width"] ** 2)
    return 2 * 2 * n * 48 * c + 3 * (blocks * block + projector), block


def decoder_flops(length, logits):
    d = TEXT["width"]
    layer = 2 * length * (2 * d * d + 2 * d * d // 2 + 3 * d * TEXT["mlp"]) + 4 * length**2 * d
    return 3 * (TEXT["layers"] * layer + 2 * logits * d * TEXT["vocab_size"])


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


@pytest.mark.long
def test_each_copy_in_a_pack_has_the_loss_it_has_alone():
    program = bench_train.program_of(TINY, "float32", SCALES)
    params, evaluate = init_state(program).params, jit_eval_step(program)
    sums, counts = evaluate(params, bench_shapes.synthetic_batch(TINY, SCALES, rows=2))
    assert counts.tolist() == [12, 12, 12] and len(set(sums.tolist())) == 3
    for i, scale in enumerate(SCALES):
        alone, counts = evaluate(params, bench_shapes.synthetic_batch(TINY, SCALES, copies=(scale,)))
        assert counts[i] == counts.sum() == 12
        assert float(alone[i]) == pytest.approx(float(sums[i]), rel=1e-5)


def test_rows_of_a_pack():
    assert bench_shapes.fewest_positions([3, 9, 4, 5], 2) == ([0, 0, 1, 1], 12)
    batch = bench_shapes.synthetic_batch(TINY, SCALES, rows=2)
    assert batch["id"].shape == (1, 2, 2, 29) and batch["target"].shape == (1, 2, 18)  # 28 | 16 + 13
    assert (np.sort(batch["slot"][0, 0][batch["slot"][0, 0] >= 0]) == np.arange(21)).all()
    assert (batch["group"] == batch["group"][:1]).all() and set(batch["group"].flat) == {1, 2, 4}


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


@pytest.mark.long
def test_the_real_step_is_timed_and_weighed():
    program, batch = bench_train.program_of(TINY, "float32", (16,)), bench_shapes.synthetic_batch(TINY, (16,))
    timed = bench_train.time_train(program, batch, "float32", 1, "train")
    assert timed.layout == (2, 1, 28) and timed.seconds > 0
    state = 3 * 4 * sum(x.size for x in jax.tree.leaves(_params()))  # parameters and two moments
    assert state < timed.bytes < 100 * state


def _params():
    return jax.eval_shape(lambda: init_state(bench_train.program_of(TINY, "float32", (16,)))).params


@pytest.mark.long
def test_decoding(capsys, tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(TINY | {"scales": [4]}))
    rows = run(capsys, "decode", "--shape", tmp_path / "one.json", "--steps", 1)
    step, rate = (rows[f"4 visual tokens, {what}"]["value"] for what in ("a decoding step", "decoding"))
    assert rate * step == pytest.approx(1e3 * TINY["batch"])
    d, (kv, layers) = TEXT["width"], (TEXT["width"] // 2, TEXT["layers"])
    weights = layers * (2 * d * d + 2 * d * kv + 3 * d * TEXT["mlp"] + 2 * d) + d + d * TEXT["vocab_size"]
    assert bench_decode.step_bytes(_params()) == 4 * weights


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


def test_data_on_photographs(capsys):
    rows = run(capsys, "data", "--config", "configs/llava.py", "--photographs", 6, "--records", 4)
    four, eight = (rows[f"cores for {n} v5e"]["value"] for n in (4, 8))
    assert eight == pytest.approx(2 * four)
    assert rows["cores for 4 v5p"]["value"] == pytest.approx(four * 459 / 197)
    seconds = float(rows["cores for 4 v5e"]["against"].split(" s,")[0])  # of a pack of 2,048 positions, on a chip
    assert seconds == pytest.approx(6 * 6.6e9 * 2048 / 197e12, rel=0.15)  # the decoder's, but for attention
    assert four == pytest.approx(4 * rows["a pack"]["value"] / 1e3 / seconds, rel=0.01)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train"], "lmm bench train needs --shape"),
        (["data"], "lmm bench data needs --config"),
        (["train", "--shape", "small", "--growth", "folder", "--peer"], "--growth goes with lmm bench train alone"),
        (["decode", "--shape", "small", "--growth", "folder"], "--growth goes with lmm bench train alone"),
        (["decode", "--shape", "nowhere"], "neither a file nor one of base, llava15_7b, llava_1b, small"),
    ],
)
def test_refusals(capsys, args, message):
    assert cli.main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_a_shape_that_lacks_a_field(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(TINY | {"text": {"width": 1, "mlp": 1, "layers": 1, "heads": 1}}))
    with pytest.raises(ValueError, match=r"bad.json: text lacks vocab_size"):
        bench_shapes.load_shape(tmp_path / "bad.json")


def test_without_torch_the_extra_is_named(capsys, monkeypatch, shape_file):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["bench", "attention", "--shape", str(shape_file), "--peer"]) == 2
    assert "--peer needs torch: pip install 'lmm_jax[hf]'" in capsys.readouterr().err


def test_a_peer_that_fails_is_told(capfd, monkeypatch, tmp_path, shape_file):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no card')")
    (tmp_path / "transformers.py").write_text("")
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert cli.main(["bench", "attention", "--shape", str(shape_file), "--peer"]) == 2
    err = capfd.readouterr().err
    assert "no card" in err and "the peer ended with exit code 1" in err


def test_the_model_is_measured_without_packages_of_the_data_path(shape_file):
    code = (
        "import sys\n"
        "for name in ('grain', 'tensorflow_datasets', 'ml_collections', 'orbax', 'sentencepiece', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from lmm_jax import cli\n"
        "from lmm_jax.bench import decode, measure as bench, train\n"
        "bench.MATMUL_SIDE = {'cpu': 32}\n"
        f"sys.exit(cli.main(['bench', 'attention', '--steps', '1', '--shape', {str(shape_file)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peer needs the extra hf")
@pytest.mark.parametrize("what", ["train", "decode", "attention"])
def test_beside_the_peer(capsys, shape_file, what):
    rows = run(capsys, what, "--shape", shape_file, "--steps", 1, "--peer")
    compared = [name for name, row in rows.items() if row["against"].startswith("peer")]
    assert len(compared) == {"train": 4, "decode": 2, "attention": 6}[what]
    assert all(rows[name]["ratio"] > 0 for name in compared)
