"""configs/own.py: prepared data, and a model's folder, say what a run on them looks like."""

import json
import pathlib
import shutil

import pytest

import lmm_jax as lmm
from lmm_jax.config import ConfigError
from lmm_jax.data import digests
from lmm_jax.training import recipe
from lmm_jax.training.memory import of_training
from lmm_jax.training.plan import make_plan
from lmm_jax.training.state import make_program
from tests.runs import begin

OWN = pathlib.Path(__file__).parents[2] / "configs/own.py"


def load(data, *arguments, overrides=()):
    return lmm.load_config(f"{OWN}:" + ",".join([f"data={data}", *arguments]), *overrides)


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The workdir of a tiny model, and its export."""
    folder = tmp_path_factory.mktemp("model")
    begin(tiny("train.steps=1", recipe="full"), folder / "run")
    lmm.export(folder / "run", folder / "export")
    return folder


def test_a_prepared_folder_is_enough(digits_folder, tmp_path):
    config = load(digits_folder)
    assert config.data.template == "qa" and config.model.decoder.vocab_size == 128 and config.model.dtype == "float32"
    assert config.data.length % 64 == 0 and config.train.batch_size == 8
    plan = make_plan(config, tmp_path / "run")
    assert not plan.packs.left_out and plan.validation is not None and plan.memory.parameters < 5e6
    epochs = config.train.steps * config.train.batch_size * plan.packs.stream.records_per_pack() / 64
    assert 2 < epochs < 4  # three are asked for, of as many packs as are guessed from lengths
    assert config.train.eval_batches == 2 and config.train.save_every <= config.train.steps


def test_the_dial_goes_from_small_to_large(digits_folder, tmp_path):
    sizes = {}
    for size in ("tiny", "small", "1b"):
        config = load(digits_folder, f"size={size}", overrides=("mesh.data=1",))
        sizes[size] = of_training(make_program(config)).parameters
    assert sizes["tiny"] < 5e6 < sizes["small"] < 1e8 < 1e9 < sizes["1b"] < 2e9
    seven = load(digits_folder, "size=7b", "models=there")
    assert seven.init.vision == "there/clip-vit-large-patch14-336" and seven.model.decoder.width == 4096
    with pytest.raises(ConfigError, match="init.vision=there/clip.*there is no such folder"):
        make_plan(seven, tmp_path / "run")


@pytest.mark.parametrize("what", ["run", "export"])
def test_a_model_s_folder_gives_every_size_and_where_the_run_starts(model, digits_folder, tmp_path, what):
    config = load(digits_folder, f"model={model / what}")
    assert config.model.decoder.width == 32 and config.model.vision.image_size == 24 and config.model.scales == (36,)
    start = config.init["from"] if what == "run" else config.init.vision
    assert start == str(model / what) and config.optimizer.groups == (("vision", 0.0),)
    plan = make_plan(config, tmp_path / "run")
    assert plan.program.rates["decoder/norm/scale"] == 2e-5
    config = load(digits_folder, f"model={model / what}", "freeze=none", "rate=1e-3", "length=96", "epochs=1")
    assert config.optimizer.groups == () and config.optimizer.learning_rate == 1e-3 and config.data.length == 96
    assert load(digits_folder, "freeze=vision+decoder").optimizer.groups == (("vision", 0.0), ("decoder", 0.0))


@pytest.mark.long
def test_a_tuned_export_begins_with_its_parameters(model, digits_folder, tmp_path, capsys):
    config = load(digits_folder, f"model={model / 'export'}", overrides=("train.steps=1",))
    assert lmm.train(config, tmp_path / "run")["step"] == 1
    out = capsys.readouterr().out
    assert "init.vision=" in out and "learning rates: decoder 2e-05, projector 2e-05, vision frozen;" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["size=2b"], "size '2b' does not exist; choose from tiny, small, 1b"),
        (["model=nowhere"], "model=nowhere is neither a workdir"),
        (["freeze=visoin"], "freeze 'visoin' does not exist; choose from vision, projector, decoder"),
        (["rate=fast"], "config argument rate is float"),
        (["rate=-1"], "optimizer.learning_rate=-1.0"),
        (["length=-5"], "data.length=-5"),
        (["epochs=-1"], "epochs"),
        (["sise=tiny"], "expected one of data="),
    ],
)
def test_arguments_of_no_use_are_refused_with_what_is_valid(digits_folder, arguments, words):
    with pytest.raises(ConfigError) as error:
        load(digits_folder, *arguments)
    assert words in str(error.value)


def test_data_of_another_template_say_how_to_prepare_them_again(model, digits_folder, tmp_path):
    with pytest.raises(ConfigError, match="data=nowhere: nowhere holds no prepared data"):
        load("nowhere")
    shutil.copytree(digits_folder, tmp_path / "data")
    about = json.loads((tmp_path / "data/prepared.json").read_text())
    (tmp_path / "data/prepared.json").write_text(json.dumps(digests.sealed(about | {"template": "plain"})))
    with pytest.raises(
        ConfigError, match=r"template 'plain', model=.* 'qa': lmm prepare … --template qa --tokenizer"
    ):
        load(tmp_path / "data", f"model={model / 'run'}")


def test_a_pack_has_room_for_the_copies_of_a_conversation_at_every_budget(model, digits_folder, tmp_path):
    """Of several budgets the copies of the longest need more than the one row that holds each."""
    arguments = f"model={model / 'export'}", "length=64"
    assert load(digits_folder, *arguments).data.rows == 1
    several = load(digits_folder, *arguments, overrides=("model.scales=(1,4,9,36)",))
    with pytest.raises(ConfigError, match="no pack of 1 rows of 64 positions holds the longest"):
        make_plan(several, tmp_path / "run")
    with several.unlocked():
        several.data.rows = recipe.rows_of(several.model)
    assert not make_plan(several, tmp_path / "run").packs.left_out
