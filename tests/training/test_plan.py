"""What can be known before a run begins is known before anything is written: a refusal leaves every byte alone."""

import functools
import json
import os
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

import lmm_jax as lmm
from lmm_jax import errors, families, free_memory, lock
from lmm_jax.config import ConfigError, flatten, read_config, save_config
from lmm_jax.data import digests
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.views import ASPECTS
from lmm_jax.data.visual_layout import SAMPLINGS, SEQUENCES, STACKS
from lmm_jax.fields import all_fields
from lmm_jax.sharding import MESH_AXES
from lmm_jax.training import loop, memory, plan
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.metrics import read_metrics
from tests.test_fields import TRIED


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
    shutil.copytree(run, tmp_path / "torn")
    for file in (tmp_path / "torn/checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    Checkpoints(tmp_path / "saved").save_params({"weight": jnp.zeros(2)})
    shutil.copy(run / "config.json", tmp_path / "saved" / "config.json")
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
    (("init.from=torn",), "new", "init.from=torn holds no sound checkpoint: steps [2] cannot be read"),
    (("init.from=run", "model.decoder.width=64"), "new", "does not give"),
    (("init.from=run", "model.decoder.vocab_size=200"), "new", "model.decoder.vocab_size is 128 there, 200 here"),
    (("init.from=run", "init.new=('nope',)"), "new", "no parameter lies under 'nope'"),
    (("init.vision=nope",), "new", "init.vision=nope: there is no such folder"),
    (("init.vision=model", "init.new=('nope',)"), "new", "no parameter lies under 'nope'"),
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
    ((), "saved", "holds a model, not a run: choose another workdir, and start from the model by"),
]


def test_where_the_base_of_adapters_lies_may_change_and_nothing_else(tiny):
    was, stream = tiny("init.from=there", recipe="full"), {"visual_layout": {}}
    about = plan.about_run(was, stream)
    now, base = tiny("init.from=elsewhere", recipe="full"), {"init": {"from": "there"}}
    plan.check_saved("w", about, now, stream, base)
    with pytest.raises(ConfigError, match="init.from: was 'there', now 'elsewhere'"):
        plan.check_saved("w", about, now, stream)
    other = tiny("init.from=elsewhere", "seed=5", recipe="full")
    with pytest.raises(ConfigError, match="\n  seed: was 0, now 5$"):
        plan.check_saved("w", about, other, stream, base)


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
    monkeypatch.setattr(free_memory, "of_host", lambda: 4 * 2**30)  # on any machine
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


def test_data_whose_tokenizer_lacks_the_template_s_pieces_are_refused(tiny, world):
    """A folder that an earlier version prepared, whose answers would end at the first `>`."""
    about = json.loads((world / "data/prepared.json").read_text())
    (world / "data/prepared.json").write_text(json.dumps(digests.sealed(about | {"template": "chatml_direct"})))
    told = refused(tiny, ("data.template=chatml_direct",), "new", world)
    assert "template 'chatml_direct' does not fit this tokenizer" in told and "<|im_end|>" in told


def test_another_stream_is_refused_before_the_config_is_written(tiny, world):
    about = json.loads((world / "data/prepared.json").read_text())
    (world / "data/prepared.json").write_text(json.dumps(digests.sealed(about | {"fingerprint": "another"})))
    assert "another stream of data" in refused(tiny, ("train.steps=4",), "run", world)


def test_a_workdir_that_cannot_be_written_to_is_named(tiny, world, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)  # whoever runs the tests may write all
    assert "empty cannot be written to" in refused(tiny, (), "empty", world)


def test_a_second_writer_is_refused_and_changes_nothing(tiny, world):
    with lock.hold(world / "run", "lmm train"):
        (world / "run" / lock.NAME).write_text((world / "run" / lock.NAME).read_text())
        told = refused(tiny, ("train.steps=4",), "run", world)
    assert "is being written to by `lmm train`, process" in told and "since" in told


def test_a_full_disk_is_known_beforehand(tiny, world, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "checkpoints of" in (told := refused(tiny, (), "new", world)) and "train.keep" in told


def test_a_workdir_without_a_saved_step_is_no_run(tiny, tmp_path, monkeypatch):
    """A command that failed after it had begun leaves no claim: the corrected one goes on there."""
    workdir = tmp_path / "run"

    def fail(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            lmm.train(tiny("train.steps=2", "train.log_every=1", recipe="full"), workdir)
    assert (workdir / "config.json").exists() and read_metrics(workdir)
    result = lmm.train(tiny("train.steps=2", "seed=3", "train.log_every=1", recipe="full"), workdir)
    assert result["step"] == 2 and [row["step"] for row in read_metrics(workdir)] == [1, 2]
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


def planned(config, workdir="new"):
    """What a plan of a config says, "" if it can begin; whatever else happens is a fault of ours, and is raised."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"not decided in {LIMIT} s"))
    signal.alarm(LIMIT)
    try:
        plan.make_plan(config, workdir)
    except (ValueError, OSError, ImportError) as error:
        if not errors.is_ours(error):
            raise
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ""


LARGE = ("model.decoder.width=512", "model.decoder.mlp_dim=1024")  # parameters that must be shared out
LIMIT = 20  # seconds until a config is accepted or refused
# Values that are in range, alone or together, and what is told of them; "" is what may begin.
IN_RANGE = [
    (("data.validation=validtion",), "data.validation=validtion: "),
    (("data.validation=train",), "data.validation=train is data.train"),
    (("data.validation=train", "train.eval_every=0"), ""),
    (("data.validation=test",), ""),
    (("data.train=tset",), "data.train=tset: "),
    (
        ("train.eval_batches=100000000",),
        "train.eval_batches=100000000: a validation would read each of the 32 records",
    ),
    (("data.workers=1024",), "data.workers=1024: as many reader processes need"),
    (
        ("train.batch_size=12",),
        "train.batch_size / train.micro_batches: 12 packs a micro-batch do not divide over the 8",
    ),
    (("train.micro_batches=2",), "4 packs a micro-batch do not divide over the 8 devices of mesh.data·fsdp; set a"),
    (("mesh.data=2",), "needs 2 devices, there are 8; an axis of -1"),
    (("mesh.data=1", "mesh.fsdp=8", "rules.heads=fsdp"), ""),  # small, so that it is replicated
    (("mesh.data=1", "mesh.fsdp=8", "rules.mlp=fsdp", *LARGE), "'mlp' and 'embed' all go to mesh axes ('fsdp',)"),
    (("mesh.data=1", "mesh.tensor=8", "rules.embed=('tensor',)", *LARGE), "which can share out one of them"),
    (("mesh.data=1", "mesh.context=8", "data.length=81"), "data.length=81 does not divide"),
    (("mesh.data=1", "mesh.context=8", "data.length=96", "rules.batch=('data','context')"), "also share out packs"),
    (("rules.batch=()",), ""),
    (("train.scales_per_step=2",), "train.scales_per_step=2: model.scales has (36,)"),
    (("data.rows=65536", "data.length=1000000"), "train.batch_size=8 packs of"),
    (("data.views=1000000",), "train.batch_size=8 packs of"),
    (("data.length=16777216", "train.batch_size=1024"), "train.batch_size=1024 packs of"),
    (("data.threads=1024", "train.batch_size=1024"), ""),
    (("train.steps=1",), ""),
    (("train.steps=2147483647", "train.save_every=2147483647"), ""),
    (("train.steps=2147483647", "train.keep=2147483647"), "checkpoints of"),
    (("model.decoder.vocab_size=16000000",), "this run cannot fit"),
    (("model.projector.depth=64",), ""),
    (("model.decoder.depth=1",), ""),
    (("model.decoder.qk_norm=True", "model.decoder.qkv_bias=True", "model.decoder.tied=True"), ""),
    (("model.vision.std=(58.4, 57.1, 57.4)",), "model.vision.std"),  # of pictures from 0 to 255
    (
        ("optimizer.groups=(('decoder/layers',0.0),('decoder',0.0),('vision',0.0),('projector',0.0))",),
        "nothing would",
    ),
    (("optimizer.groups=(('decoder/layers',1e-4),('decoder',0.0))",), ""),
]


def test_values_in_range_are_planned_or_told_with_the_field_that_is_wrong(tiny, world, monkeypatch):
    monkeypatch.setattr(free_memory, "of_host", lambda: 16 * 2**30)  # on any machine
    before, found = tree(world), []
    for overrides, words in IN_RANGE:
        try:
            told = planned(tiny("data.path=data", "train.eval_every=500", *overrides, recipe="full"))
        except lmm.config.ConfigError as error:  # of the config alone
            told = str(error)
        found.append((overrides, told, words))
    assert not [case for case in found if case[2] not in case[1] or bool(case[1]) != bool(case[2])]
    assert tree(world) == before


@pytest.mark.parametrize("name", plan.FILES)
def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_written(tiny, world, name):
    (world / "run" / name).unlink(missing_ok=True)
    (world / "run" / name).mkdir()
    told = refused(tiny, ("train.steps=4",), "run", world)
    assert name in told and ("no file that can be written to" in told)


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "model": {"encoder": 3}}']
)
def test_a_run_whose_config_is_lost_or_damaged_is_left_alone(tiny, world, content):
    file = world / "run/config.json"
    file.unlink() if content is None else file.write_text(content)
    told = refused(tiny, ("train.steps=4",), "run", world)
    assert "holds checkpoints" in told and "restore it from a copy, or choose another workdir" in told


def test_a_run_without_a_sound_step_is_left_alone(tiny, world, capsys):
    for file in (world / "run/checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    assert "no sound checkpoint among steps [2]" in refused(tiny, ("train.steps=4",), "run", world)


@pytest.mark.parametrize("content", [None, "", "nonsense\n", '[1]\n{}\n3\n{"step": "x"}\n\xff\n'])
def test_a_finished_run_is_finished_whatever_became_of_its_metrics(tiny, world, content):
    file = world / "run/metrics.jsonl"
    file.unlink() if content is None else file.write_text(content, encoding="latin-1")
    before = tree(world)
    assert lmm.train(tiny("data.path=data", "train.steps=2", "train.log_every=1", recipe="full"), "run")["step"] == 2
    assert tree(world) == before


VALUES = (*TRIED, 1, 3, 8, 1024, 10**6, 2**31 - 1, 1e-30, 0.9999999, 1e12, -3)
VALUES += (
    ((2, 2),),
    ((64, 64),),
    ((8, 8), (1, 64)),
    ((1, 2), (2, 1)),
    (1,),
    (1, 2),
    (12, 2),
    (64, 64),
    (65536, 65536),
)
VALUES += ((1, 1, 1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1, 2, 1, 1), (0, 1, 2, 3), ("linear", 2.0))
VALUES += ((("vision", 0.0),), (("decoder", 0.0),), (("/", 0.1),), ("vision",), ("decoder/",), ((".", 1.0),))
VALUES += (("data",), ("fsdp",), ("tensor",), ("context",), MESH_AXES, ("fsdp", "tensor"), *MESH_AXES)
VALUES += (
    "/",
    ".",
    "~",
    "a b",
    "train",
    "test",
    "validation",
    "x" * 300,
    "bfloat16",
    "float32",
    "cut",
    "offload",
    "none",
)
VALUES += (*families.DECODERS, *families.ENCODERS, *families.prompts(), *SEQUENCES, *STACKS, *SAMPLINGS, *ASPECTS)


LARGE_FILES = ("llava.py", "llava.py:view=next", "m3.py", "m3.py:view=next", "deepstack.py", "deepstack.py:recipe=hd")
LARGE_FILES += ("deepstack.py:recipe=v", "convllava.py:stage=1", "convllava.py", "convllava.py:pixels=768")
RECIPES = ("m3", "full", "low", "deepstack", "deepstack_v", "high")
# Config files of `configs/` with their arguments, and the data that each is tried on.
FILES = {f"digits.py:recipe={recipe}": "digits" for recipe in RECIPES}
FILES |= {"hybrid.py": "digits", "qwen3vl_style.py": "digits", "pages.py": "pages", "pages.py:stages=4": "pages"}
FILES |= {"pages.py:encoder=vit": "pages"}
FILES |= dict.fromkeys(LARGE_FILES, "vicuna_v1") | {"llava.py:stage=align": "plain", "own.py": "vicuna_v1"}
FILES |= {"granite_docling.py": "granite", "deepstack_e.py": "chatml", "qwen3vl.py": "qwen3_vl"}
FILES |= {"smolvlm.py": "smolvlm", "llava_onevision.py": "chatml"}
# Fields of names that any text may be: they are tried with one file alone.
NAMES = ("init.", "data.path", "data.train", "data.validation")


@pytest.fixture(scope="module")
def load_file(digits_folder, pages_folder, tmp_path_factory):
    """`load_file(name)`: a config of FILES, with data that is there, and nothing to start from."""
    folder = tmp_path_factory.mktemp("rows")
    turns = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "A picture of it."},
    ]
    for n in range(24):
        Image.new("RGB", ((640, 480), (480, 640), (300, 300))[n % 3], (n, 0, 0)).save(folder / f"{n}.png")
    rows = [{"id": str(n), "image": f"{n}.png", "messages": turns} for n in range(24)]
    (folder / "rows.json").write_text(json.dumps(rows))
    for template in ("vicuna_v1", "plain", "granite", "chatml", "qwen3_vl"):
        prepare_rows(folder / "rows.json", folder, folder / template, template=template, workers=0)
    data = {"digits": digits_folder, "pages": pages_folder}
    fresh = ("init.from=None", "init.vision=None", "init.language=None", "init.projector=None", "init.new=()")
    fresh += ("data.mixture=()", "data.max_left_out=1", "optimizer.groups=()", "train.batch_size=8")

    def load(name):
        path = data.get(FILES[name], folder / FILES[name])
        file = f"{name}:data={path}" if name == "own.py" else name
        return lmm.load_config(pathlib.Path(__file__).parents[2] / "configs" / file, f"data.path={path}", *fresh)

    return load


def test_every_config_file_is_tried():
    names = {file.name for file in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py")}
    assert names == {name.partition(":")[0] for name in FILES}


@pytest.mark.long
@pytest.mark.parametrize("part", ["model.decoder", "model.vision", "data", ""])
@pytest.mark.parametrize("name", FILES)
def test_any_value_that_a_field_takes_is_planned_or_refused_in_a_sentence(load_file, world, monkeypatch, name, part):
    """All config files × all fields × all values; what does not fit this machine is planned all the same."""
    monkeypatch.setattr(free_memory, "of_host", lambda: None)
    monkeypatch.setattr(memory, "check_disk", lambda *_: None)
    config, before, wrong, tried, begun = load_file(name), tree(world), [], 0, 0
    assert planned(config) == ""
    parts = ("model.decoder", "model.vision", "data")
    for field in all_fields(config.model.encoder).values():
        if next((p for p in parts if field.name.startswith(p)), "") != part:
            continue
        if field.name.startswith(NAMES) and name != "digits.py:recipe=full":
            continue
        for value in VALUES:
            tried += 1
            if not field.valid.holds(value) or flatten(config).get(field.name) == value:
                continue  # which test_fields.py tries
            changed = config.copy_and_resolve_references().unlock()
            *parents, leaf = field.name.split(".")
            try:
                functools.reduce(getattr, parents, changed)[leaf] = value
            except TypeError:
                continue  # ml_collections knows the types, and `load_config` names the line of the file
            try:
                told = planned(changed)
            except Exception as error:
                wrong.append((field.name, value, repr(error)))
                continue
            begun += not told
            if len(told) > 8_000:
                wrong.append((field.name, value, told))
    print(f"{name} {part}: {tried:,} values tried, {begun:,} may begin")
    assert not wrong and begun
    assert tree(world) == before
