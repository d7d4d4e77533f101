"""A run is continued with its own config and data alone: every other is refused by the names of what differs."""

import json
import shutil

import pytest

from lmm_jax.config import ConfigError
from lmm_jax.data.digests import sealed
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.tokenizer import TRAINED
from lmm_jax.training import plan
from tests.faults.rows import row

OTHER = "another folder"
# Overrides, and words that the refusal has to have: the fields that differ, with their values.
REFUSED = (
    (["model.decoder.width=64"], ["model.decoder.width: was 32, now 64"]),
    (["model.decoder.depth=2"], ["model.decoder.depth: was 3, now 2"]),
    (["model.decoder.heads=8"], ["model.decoder.heads: was 4, now 8"]),
    (["model.decoder.kv_heads=4"], ["model.decoder.kv_heads: was 2, now 4"]),
    (["model.decoder.mlp_dim=96"], ["model.decoder.mlp_dim: was 64, now 96"]),
    (["model.decoder.vocab_size=256"], ["model.decoder.vocab_size: was 128, now 256"]),
    (["model.decoder.rope_theta=5000"], ["model.decoder.rope_theta: was 10000.0, now 5000.0"]),
    (["model.decoder.tied=True"], ["model.decoder.tied: was False, now True"]),
    (["model.decoder.qk_norm=True"], ["model.decoder.qk_norm: was False, now True"]),
    (["model.decoder.norm_eps=1e-6"], ["model.decoder.norm_eps: was 1e-05, now 1e-06"]),
    (["model.vision.width=32"], ["model.vision.width: was 16, now 32"]),
    (["model.vision.depth=2"], ["model.vision.depth: was 1, now 2"]),
    (["model.vision.mean=(.5,.5,.5)"], ["model.vision.mean: was"]),
    (["model.projector.depth=1"], ["model.projector.depth: was 2, now 1"]),
    (["model.projector.bias=False"], ["model.projector.bias: was True, now False"]),
    (["model.scales=(1,4,9)"], ["model.scales: was (1, 4, 9, 36), now (1, 4, 9)"]),
    (["model.dtype=bfloat16"], ["model.dtype: was 'float32', now 'bfloat16'"]),
    (["optimizer.moments=bfloat16"], ["optimizer.moments: was 'float32', now 'bfloat16'"]),
    (["optimizer.learning_rate=1e-3"], ["optimizer.learning_rate: was 0.003, now 0.001"]),
    (["optimizer.warmup=.1"], ["optimizer.warmup: was 0.2, now 0.1"]),
    (["optimizer.clip=2"], ["optimizer.clip: was 1.0, now 2.0"]),
    (["optimizer.weight_decay=.1"], ["optimizer.weight_decay: was 0.01, now 0.1"]),
    (["optimizer.b2=.95"], ["optimizer.b2: was 0.98, now 0.95"]),
    (["seed=1"], ["seed: was 0, now 1"]),
    (["train.batch_size=16"], ["train.batch_size: was 8, now 16"]),
    (["train.scales_per_step=1"], ["train.scales_per_step: was 2, now 1"]),
    (["data.length=128"], ["data.length: was 120, now 128"]),
    (["data.targets=48"], ["data.targets: was 40, now 48"]),
    (["data.train=test"], ["data.train: was 'train', now 'test'"]),
    (["data.too_long=cut"], ["data.too_long: was 'refuse', now 'cut'"]),
    (["lora.rank=4"], ["lora.rank: was 0, now 4"]),
    (["seed=1", "train.batch_size=16", "model.dtype=bfloat16"], ["seed", "train.batch_size", "model.dtype"]),
    (["data: other fingerprint"], ["another stream of data", "data: was"]),
    (["data: other tokenizer"], ["another stream of data", "tokenizer: was"]),
    (["data: one row less"], ["another stream of data", "data: was"]),
)
BENIGN = (
    ["train.steps=200"],
    ["train.log_every=7"],
    ["train.save_every=5"],
    ["train.keep=4"],
    ["train.eval_every=5", "train.eval_batches=1"],
    ["train.max_skipped=3"],
    ["train.micro_batches=2", "mesh.data=4", "mesh.tensor=2"],
    ["data.threads=3", "data.workers=2"],
    ["data.max_bad_share=.01", "data.max_bad_run=5", "data.max_left_out=.1"],
    ["mesh.data=4", "mesh.fsdp=2"],
    ["data: the same elsewhere"],
)


@pytest.fixture
def change(digits_folder, tiny, small_run, tmp_path):
    """`change(overrides)`: what a command with another config, or other data, is planned or refused with."""

    def other_data(how, folder):
        if how in ("other tokenizer", "one row less"):
            rows = [{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]}] * 64
            (tmp_path / "rows.json").write_text(json.dumps(rows[: 63 if how == "one row less" else 64]))
            given = digits_folder / "tokenizer.model"
            if how == "other tokenizer":
                TRAINED.train(["a b c d e f", "what is it", "c d"], 100).save(tmp_path)
                given = tmp_path / "tokenizer.model"
            prepare_rows(tmp_path / "rows.json", None, folder, given, template="qa", workers=0)
            return
        shutil.copytree(digits_folder, folder)
        if how == "other fingerprint":
            about = json.loads((folder / "prepared.json").read_text())
            (folder / "prepared.json").write_text(json.dumps(sealed(about | {"fingerprint": "0" * 16})))

    def plan_with(overrides, number):
        own = ("train.save_every=2", "train.keep=3", "train.log_every=1", "mesh.data=-1", "train.steps=100")
        if overrides[0].startswith("data: "):
            folder = tmp_path / f"data_{number}"
            other_data(overrides[0].removeprefix("data: "), folder)
            overrides = [f"data.path={folder}"]
        with small_run.copy(tmp_path / f"run_{number}") as workdir:
            before = contents(workdir)
            try:
                return plan.make_plan(tiny(*own, *overrides), workdir)
            finally:
                assert contents(workdir) == before, "a plan changed the workdir"

    return plan_with


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


@row(15, few=5, full=len(REFUSED))
def test_another_config_or_other_data_are_refused_by_what_differs(trials, change):
    def check(number):
        number = number if trials.full else len(REFUSED) - 1 - number  # data first
        overrides, words = REFUSED[number]
        with pytest.raises(ConfigError) as raised:
            change(overrides, number)
        for word in words:
            assert word in str(raised.value), raised.value

    trials.each(check)


@row(15, few=2, full=len(BENIGN))
def test_what_may_change_is_not_refused(trials, change):
    def check(number):
        number = number if trials.full else len(BENIGN) - 1 - number
        assert change(BENIGN[number], number).step == 6

    trials.each(check)
