"""A shape that is measured in no time, and the operations of its parts counted by hand."""

import json

import jax

from lmm_jax import cli
from lmm_jax.bench import train as bench_train
from lmm_jax.training.state import init_state

SCALES = [1, 4, 16]
VISION = {"image": 16, "patch": 4, "width": 16, "mlp": 40, "layers": 3, "heads": 2}
TEXT = {"width": 24, "mlp": 56, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 128}
TINY = {"name": "tiny", "batch": 2, "text_len": 12, "scales": SCALES, "vision": VISION, "text": TEXT}


def run(capsys, *args):
    """Rows of `lmm bench` by their names."""
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


def params(scales=(16,)):
    """Abstract parameters of the model."""
    program = bench_train.program_of(TINY, "float32", scales)
    return jax.eval_shape(lambda: init_state(program)).params
