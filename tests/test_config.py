"""Config files, overrides and their errors."""

import dataclasses
import json
import pathlib

import pytest

import lmm_jax as lmm
from lmm_jax import config as c
from lmm_jax.models.decoder import Decoder
from lmm_jax.models.encoders import ENCODERS, encoder_ranges
from lmm_jax.models.lmm import LMM
from lmm_jax.models.projector import Projector
from lmm_jax.models.router import Router

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = str(ROOT / "configs/digits.py")


def test_overrides_take_the_type_of_the_field():
    config = lmm.load_config(
        DIGITS,
        "train.steps=7",
        "optimizer.learning_rate=1",
        "model.scales=(1,9)",
        "train.scales_per_step=1",
        "data.path=/some/where",
        "log.wandb=True",
        'optimizer.groups=(("vision", 0.0),)',
    )
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.model.scales == (1, 9)
    assert config.data.path == "/some/where" and config.log.wandb is True
    assert config.optimizer.groups == (("vision", 0.0),)


def test_file_arguments_come_after_a_colon_or_as_plain_pairs():
    assert lmm.load_config(f"{DIGITS}:recipe=full").model.scales == (36,)
    assert lmm.load_config(DIGITS, "recipe=full").model.scales == (36,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=7", "unknown config field 'train.step'; did you mean 'train.steps'"),
        ("trian.steps=7", "did you mean 'train.steps'"),
        ("train=7", "unknown config field 'train'"),
        ("train.steps", "config field train.steps is given no value"),
        ("train.steps=2.5", "config field train.steps is int, got '2.5'"),
        ("train.steps=many", "config field train.steps is int, got 'many'"),
        ("train.steps=__import__('os')", "config field train.steps is int"),
        ("log.wandb=1", "config field log.wandb is bool"),
        ("train.scales_per_step=9", "train.scales_per_step=9"),
        ("train.micro_batches=5", "does not divide"),
        ("model.decoder.inject_layers=(1,)", "gives 0 stacks, the levels of the encoder (model.vision) 0"),
        ("model.vision.stack_levels=(1,)", "gives 0 stacks, the levels of the encoder (model.vision) 1"),
        ("data.stacks=samples", "data.stacks='samples': data.tilings is empty"),
        ("data.aspect=own", "data.aspect='own' needs an encoder of any shape"),
        ("model.vision.regroup=(1,2)", "set model.vision.regroup=(layer, n)"),
        ("model.scales=(1,5)", "5 tokens do not tile a 6×6 grid"),
        ("data.rows=0", "expected a whole number from 1"),
        ("data.too_long=drop", "expected one of cut or refuse"),
    ],
)
def test_bad_overrides_name_the_field(override, message):
    with pytest.raises(c.ConfigError) as error:
        lmm.load_config(DIGITS, override)
    assert message in str(error.value)


def test_stacks_of_data_and_encoder_each_have_a_layer():
    deepstack = f"{DIGITS}:recipe=deepstack"
    for bad in ("data.stacks=encoder", "data.views=7", "model.decoder.inject_layers=(0,1,2)"):
        with pytest.raises(
            c.ConfigError, match=r"regroup|data.views=7: .* multiple of 5|gives 4 stacks.* names 3 layers"
        ):
            lmm.load_config(deepstack, bad)
    inside = ("data.stacks=encoder", "model.vision.regroup=(1,2)", "model.decoder.inject_layers=()")
    assert lmm.load_config(deepstack, *inside).data.stacks == "encoder"
    config = lmm.load_config(DIGITS, "model.scales=(1,)", "train.scales_per_step=1")
    with config.unlocked():
        c.use_encoder(config, "convnext")
        config.model.vision.update(image_size=64, stack_levels=(4,))
        config.model.decoder.update(depth=4, inject_layers=(0, 1, 2, 3))
        config.data.update(aspect="own", canvas=(64, 128))
    c.check(config)  # stage 4 lies over stage 5 four times
    config.model.decoder.inject_layers = (0, 1)
    with pytest.raises(c.ConfigError, match=r"inject_layers=\(0, 1\) names 2 layers"):
        c.check(config)


def test_bad_file_arguments_list_the_valid_ones():
    with pytest.raises(c.ConfigError, match="recipe=…"):
        lmm.load_config(f"{DIGITS}:recepi=full")
    with pytest.raises(c.ConfigError, match="choose from m3, full, low, deepstack, deepstack_v, high"):
        lmm.load_config(f"{DIGITS}:recipe=m4")
    with pytest.raises(c.ConfigError, match="no config file"):
        lmm.load_config("configs/nowhere.py")


def test_configs_are_locked_and_survive_storing(tmp_path):
    config = lmm.load_config(DIGITS)
    with pytest.raises((KeyError, AttributeError)):
        config.train.stepz = 1
    c.save_config(config, tmp_path / "config.json")
    assert c.flatten(c.read_config(tmp_path / "config.json")) == c.flatten(config)


def test_another_schema_is_refused(tmp_path):
    config = lmm.load_config(DIGITS)
    with config.unlocked():
        config.schema = 0
    c.save_config(config, tmp_path / "config.json")
    with pytest.raises(c.ConfigError, match="schema 0"):
        c.read_config(tmp_path / "config.json")


def test_a_stored_config_gets_the_defaults_of_newer_fields_and_no_foreign_ones(tmp_path):
    path = tmp_path / "config.json"
    config = lmm.load_config(DIGITS, "train.steps=7")
    with config.unlocked():
        del config.data.too_long
    c.save_config(config, path)
    read = c.read_config(path)
    assert read.data.too_long == "refuse" and read.train.steps == 7
    with config.unlocked():
        config.data.colour = "blue"
    c.save_config(config, path)
    with pytest.raises(c.ConfigError, match="does not know: data.colour"):
        c.read_config(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_config_files_load(path, digits_folder):
    lmm.load_config(f"{path}:data={digits_folder}" if path.name == "own.py" else path)


def own_fields(module, *left_out):
    """Fields of a module with their defaults, without Flax's and those that `config.model` holds for all parts."""
    fields = {f.name: f.default for f in dataclasses.fields(module)}
    return {name: x for name, x in fields.items() if name not in ("dtype", "parent", "name", *left_out)}


def test_every_field_of_a_module_is_a_field_of_the_config():
    model = c.base().model
    for name, encoder in ENCODERS.items():
        config = c.base()
        c.use_encoder(config, name)
        assert dict(config.model.vision) == own_fields(encoder)
    assert dict(model.decoder) == own_fields(Decoder)
    assert dict(model.projector) == own_fields(Projector, "width")  # the decoder's
    assert dict(model.router) == own_fields(Router, "scales")  # the model's
    parts = ("vision", "projector", "level_projectors", "decoder", "router", "density_router", "finer_projector")
    assert own_fields(LMM, *parts, "scales").items() <= dict(model).items()


@pytest.mark.parametrize("name", ENCODERS)
def test_whatever_a_run_sets_of_its_encoder_is_read_back(name, tmp_path):
    """A mean that was set could not be read back: it was a field of the module, and none of the config."""
    config = c.base()
    c.use_encoder(config, name)
    ranges = encoder_ranges(name)
    for field, value in own_fields(ENCODERS[name]).items():
        others = (7, -3, 0.25, 0.001, "gelu", not value, (0.25, 0.5, 0.75), (1, 2), (1, 2, 3, 4))
        config.model.vision[field] = next(x for x in others if ranges[field].holds(x) and x != value)
    c.save_config(config, tmp_path / "config.json")
    assert c.flatten(c.read_config(tmp_path / "config.json")) == c.flatten(config)


def test_a_family_gives_a_part_its_sizes_and_its_name():
    config = c.base()
    c.use_family(config, "llama", "13b")
    assert (config.model.decoder.width, config.model.families.decoder) == (5120, "llama")
    c.use_family(config, "convnext")
    assert (config.model.encoder, config.model.families.vision) == ("convnext", "convnext")
    for wrong, message in ((("gpt",), "family 'gpt' does not exist"), (("llama", "3b"), "choose from 7b, 13b")):
        with pytest.raises(c.ConfigError, match=message):
            c.use_family(config, *wrong)


def test_a_config_file_that_fails_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.py"
    head = "from lmm_jax import config as c\n\ndef get_config(arg=''):\n    cfg = c.base()\n"
    for line, words in (
        ("    cfg.train.steps = 'many'", "line 5: TypeError"),
        ("    cfg.trian.steps = 3", "line 5: AttributeError"),
        ("    return 3", "get_config returned int"),
        ("    nothing()", "line 5: NameError"),
        ("  x", "line 5: IndentationError"),
        ("    cfg.train.stepz = 3", "unknown config field 'train.stepz'; did you mean 'train.steps'"),
        ("    cfg.optimizer.clip = float('nan')", "config field optimizer.clip=nan"),
    ):
        file.write_text(f"{head}{line}\n    return cfg\n")
        with pytest.raises(c.ConfigError) as error:
            lmm.load_config(file)
        assert words in str(error.value)
    file.write_text("x = 1\n")
    with pytest.raises(c.ConfigError, match="has no attribute 'get_config'"):
        lmm.load_config(file)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(c.ConfigError, match="expected a Python file"):
        lmm.load_config(tmp_path / "mine.json")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("init.from=a", "init.vision=b"), "init.from and init.vision are both set"),
        (("init.new=('vision',)",), "init names no folder"),
        (("mesh.fsdp=-1", "mesh.data=-1"), "only one axis may be -1"),
        (("data.rows=1", "data.views=1", "data.targets=121"), "more than a pack has positions"),
        (("data.mixture=(('a',1.0),)",), "data.path and data.mixture are both set"),
        (("data.rows=None",), "data.views and data.targets are of a pack whose data.rows is set"),
        (("data.views=None",), "data.targets is of a pack whose data.views is set"),
        (("model.decoder.kv_heads=3",), "4 heads do not divide into groups for 3 kv_heads"),
        (("model.decoder.heads=3", "model.decoder.kv_heads=3"), "width 64 does not divide into 3 heads"),
        (("model.vision.patch_size=5",), "24 pixels (image_size) do not divide into patches of 5"),
        (("model.vision.level=-9",), "model.vision.level=-9 is none of"),
        (("model.families.vision=convnext",), "is a convnext, model.encoder='vit'"),
        (("model.encoder=convnext",), "config.use_encoder"),
        (("train.micro_batches=64",), "does not divide into train.micro_batches=64"),
    ],
)
def test_fields_that_contradict_each_other_are_named(overrides, words):
    with pytest.raises(c.ConfigError) as error:
        lmm.load_config(DIGITS, *overrides)
    assert words in str(error.value)


def test_a_stored_chatml_of_before_is_that_of_yi(tmp_path):
    config = c.base()
    config.data.template = "chatml"
    c.save_config(config, tmp_path / "config.json")
    assert c.read_config(tmp_path / "config.json").data.template == "chatml"
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["template_names"]  # as it was written before Qwen's layout had the name
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert c.read_config(tmp_path / "config.json").data.template == "chatml_direct"
