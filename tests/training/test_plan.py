"""What can be known before a run begins is known before anything is written: a refusal leaves every byte alone."""

import json
import os
import pathlib
import shutil

import jax
import pytest

import lmm_jax as lmm
from lmm_jax import lock
from lmm_jax.config import read_config, save_config
from lmm_jax.training import loop, memory, plan
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.metrics import read_metrics


def tree(folder):
    """Every file below a folder with its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(pathlib.Path(folder).rglob("*"))
    }


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The workdir of a run of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    lmm.train(tiny("train.steps=2", "train.log_every=1", recipe="full"), workdir)
    return workdir


@pytest.fixture
def world(run, digits_folder, tmp_path, monkeypatch):
    """A folder with data, a run, folders of no use, and files: what a stranger's command may name."""
    shutil.copytree(digits_folder, tmp_path / "data")
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Overrides, workdir, and words of the refusal. "data" is the folder's name, so that it can be damaged.
REFUSED = [
    (("data.path=None",), "new", "data.path' is not set"),
    (("data.path=nope",), "new", "data.path: nope holds no prepared data"),
    (("data.path=file",), "new", "data.path: file holds no prepared data"),
    (("data.path=None", "data.mixture=(('data',1.0),('nope',1.0))"), "new", "data.mixture: nope holds no prepared"),
    (("data.train=dev",), "new", "has no split 'dev'; it has"),
    (("data.template=plain",), "new", "was prepared with template 'qa', data.template is 'plain'"),
    (("data.length=20", "data.targets=20"), "new", "would hold 99 %"),
    (("model.decoder.vocab_size=64",), "new", "model.decoder.vocab_size is 64"),
    (("init.from=nope",), "new", "init.from=nope is no workdir"),
    (("init.from=empty",), "new", "init.from=empty is no workdir"),
    (("init.from=model",), "new", "init.from=model is the folder of a model"),
    (("init.from=broken",), "new", "broken/config.json is no JSON"),
    (("init.from=run", "model.decoder.width=64"), "new", "does not give"),
    (("init.from=run", "model.decoder.vocab_size=200"), "new", "model.decoder.vocab_size is 128 there, 200 here"),
    (("init.from=run", "init.new=('nope',)"), "new", "no parameter lies under 'nope'"),
    (("init.vision=nope",), "new", "init.vision=nope: there is no such folder"),
    (("init.vision=empty",), "new", "init.vision=empty: "),
    (("init.language=file",), "new", "init.language=file: there is no such folder"),
    (("init.language=model",), "new", "init.language=model: "),
    (("optimizer.groups=(('visoin',0.0),)",), "new", "no parameter lies under 'visoin'"),
    (("optimizer.learning_rate=0",), "new", "nothing would train"),
    (("optimizer.groups=(('vision',0.0),('projector',0.0),('decoder',0.0))",), "new", "nothing would train"),
    (("mesh.data=3",), "new", "needs 3 devices, there are 8"),
    (("train.batch_size=4",), "new", "do not divide over"),
    (("mesh.context=8", "mesh.data=1", "data.length=81"), "new", "data.length=81 does not divide into 16 chunks"),
    (("train.batch_size=1000000",), "new", "train.batch_size=1000000: a step would read each of the 64 records"),
    (("train.batch_size=4096", "data.threads=1024"), "new", "train.batch_size=4096 packs of"),
    (("model.decoder.inject_layers=(3,)", "data.stacks=whole"), "new", "inject_layers=(3,): [3] are none of the"),
    (("model.decoder.width=100000",), "new", "this run cannot fit"),
    (("model.decoder.depth=1000", "model.decoder.width=8000"), "new", "this run cannot fit"),
    ((), "file", "is a file, not a folder"),
    ((), "file/below", "is a file, not a folder"),
    ((), "model", "is the folder of a model"),
    (("model.decoder.depth=2",), "run", "model.decoder.depth: was 3, now 2"),
    (("seed=1", "train.steps=4"), "run", "holds a run with another config"),
]


def refused(tiny, overrides, workdir, world):
    """The words of a refusal, after which the world is as it was."""
    before = tree(world)
    try:
        lmm.train(tiny("data.path=data", "train.steps=2", "train.log_every=1", *overrides, recipe="full"), workdir)
    except (ValueError, OSError) as error:
        assert tree(world) == before
        return str(error)
    raise AssertionError(f"{overrides} was not refused in {workdir}")


def test_a_refused_run_leaves_every_byte_as_it_was(tiny, world, monkeypatch):
    monkeypatch.setattr(memory, "_free_of_host", lambda: 4 * 2**30)  # on any machine
    told = {(overrides, workdir): refused(tiny, overrides, workdir, world) for overrides, workdir, _ in REFUSED}
    wrong = [(case, told[case[:2]]) for case in REFUSED if case[2] not in told[case[:2]]]
    assert not wrong


def damage(name, change):
    def apply(world):
        path = world / name
        path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))

    return apply


DAMAGED = {
    "prepared.json cut": (damage("data/prepared.json", lambda b: b[:40]), "prepared.json is damaged"),
    "prepared.json empty": (damage("data/prepared.json", lambda b: b"{}"), "is damaged: it lacks builder"),
    "index gone": (damage("data/index_train.npz", None), "index_train.npz is missing or damaged"),
    "index cut": (damage("data/index_train.npz", lambda b: b[:100]), "index_train.npz is missing or damaged"),
    "tokenizer gone": (damage("data/tokenizer.model", None), "holds no tokenizer"),
    "tokenizer cut": (damage("data/tokenizer.model", lambda b: b[:50]), "tokenizer.model"),
    "records gone": (lambda world: shutil.rmtree(world / "data/records"), "records is missing or damaged"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_data_is_named_and_left_alone(tiny, world, what):
    change, words = DAMAGED[what]
    change(world)
    assert words in refused(tiny, (), "new", world)


def test_another_stream_is_refused_before_the_config_is_written(tiny, world):
    about = json.loads((world / "data/prepared.json").read_text())
    (world / "data/prepared.json").write_text(json.dumps(about | {"fingerprint": "another"}))
    assert "another stream of data" in refused(tiny, ("train.steps=4",), "run", world)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_workdir_that_cannot_be_written_to_is_named(tiny, world):
    (world / "empty").chmod(0o500)
    assert "empty cannot be written to" in refused(tiny, (), "empty", world)


def test_a_second_writer_is_refused_and_changes_nothing(tiny, world):
    with lock.hold(world / "run", "lmm train"):
        (world / "run" / lock.NAME).write_text((world / "run" / lock.NAME).read_text())
        told = refused(tiny, ("train.steps=4",), "run", world)
    assert "is being written to by `lmm train`, process" in told and "since" in told


def test_a_full_disk_is_known_beforehand(tiny, world, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "checkpoints of" in (told := refused(tiny, (), "new", world)) and "train.keep" in told


def test_a_workdir_without_a_saved_step_is_no_run(tiny, tmp_path, monkeypatch):
    """A command that failed after it had begun leaves no claim: the corrected one goes on there."""
    workdir = tmp_path / "run"

    def fail(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            lmm.train(tiny("train.steps=2", "train.log_every=1", recipe="full"), workdir)
    assert (workdir / "config.json").exists() and read_metrics(workdir)
    result = lmm.train(tiny("train.steps=1", "seed=3", "train.log_every=1", recipe="full"), workdir)
    assert result["step"] == 1 and [row["step"] for row in read_metrics(workdir)] == [1]
    assert (workdir / "unsaved_metrics.jsonl").read_text().count("\n") == 2
    assert read_config(workdir / "config.json").seed == 3
    assert not (workdir / lock.NAME).exists()


def test_what_is_about_to_be_allocated_is_said(tiny, world, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(loop, "init_state", lambda program: said.append(capsys.readouterr().out) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lmm.train(tiny("data.path=data", recipe="full"), "new")
    assert "parameters, " in said[0] and "GiB of state; this host (cpu) needs at least" in said[0]


def test_a_plan_holds_what_the_run_needs(tiny, world):
    found = plan.make_plan(tiny("data.path=data", "train.eval_every=2", recipe="full"), "new")
    assert found.step == 0 and found.validation.per_step == 8 and len(found.packs.left_out) == 0
    assert found.memory.needed == memory.of_training(found.program).needed
    assert (
        plan.make_plan(tiny("data.path=data", "train.steps=2", "train.log_every=1", recipe="full"), "run").step == 2
    )
    assert jax.process_count() == 1 and not (world / "new").exists()
    config = read_config(world / "run/config.json")
    save_config(config, world / "file")  # a stored config is a plan's too
    assert read_config(world / "file") == config
