"""The table of all fields: each states what it may be, takes that, and refuses the rest in a sentence."""

import pathlib

import pytest

import lmm_jax as lmm
from lmm_jax import config as c
from lmm_jax import fields
from lmm_jax.models.encoders import ENCODERS

DIGITS = str(pathlib.Path(__file__).parent.parent / "configs/digits.py")

# What strangers write into fields. Each is tried in every field, as an override and as a value of a config file.
NAN, INFINITY, BILLION = float("nan"), float("inf"), 10**9
TRIED = (0, -1, NAN, INFINITY, -INFINITY, BILLION, 10**30, "fulll", "", True, None, 0.5, (), (0,), ("a", 1.0), [], {})

# Extremes that a field takes, and has a meaning for; whatever else is tried is refused.
FREE = {"init.from", "init.vision", "init.language", "init.projector", "init.lora", "data.path"}
FREE |= {"data.train", "data.validation"}
DEADLINES = {f"train.deadline_{of}" for of in ("batch", "compile", "step", "save")}
SHARES = {
    "data.max_left_out",
    "data.max_bad_share",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "optimizer.final",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.weight_decay",
    "optimizer.clip",
    "model.density_router.threshold",
    "lora.dropout",
}
PROJECTORS, SWITCHES = ("projector", "level_projector"), ("bias", "positions", "mid_norm", "last_norm", "shared")
TAKEN = {
    0: {
        *SHARES,
        "seed",
        "model.decoder.head_dim",
        "model.finer",
        "model.router.width",
        "model.density_router.width",
        "data.workers",
        "data.shrink",
        "train.eval_every",
        "train.keep_every",
        "train.compare_every",
        *DEADLINES,
        "lora.rank",
    },
    -1: {"mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.context", "model.vision.level"},
    BILLION: {
        "seed",
        "model.decoder.rope_theta",
        "data.targets",
        "data.min_pixels",
        "data.max_pixels",
        "data.max_bad_run",
        "train.steps",
        "train.log_every",
        "train.eval_every",
        "train.eval_batches",
        "train.save_every",
        "train.keep",
        "train.keep_every",
        "train.max_failed_saves",
        "train.max_skipped",
        "train.compare_every",
        "optimizer.clip",
    },
    0.5: {*SHARES, "lora.alpha", *DEADLINES},
    "fulll": FREE,
    "": {
        "data.stacks",
        "data.marks",
        "model.families.vision",
        "model.families.projector",
        "model.projector.norm",
        "model.level_projector.norm",
    },
    (): {
        "model.decoder.rope_scaling",
        "model.decoder.rope_axes",
        "model.decoder.multipliers",
        "model.decoder.inject_layers",
        "model.vision.stack_levels",
        "model.vision.regroup",
        "init.new",
        "data.mixture",
        "data.canvas",
        "data.canvases",
        "data.tilings",
        "optimizer.groups",
    },
    (0,): {"model.decoder.inject_layers"},
    None: {*FREE, "data.views", "data.rows", "data.targets", "train.scales_per_step", "lora.alpha"}
    - {"data.train", "data.validation"},
    True: {
        "init.allow_pickle",
        "log.tensorboard",
        "log.wandb",
        "model.decoder.qk_norm",
        "model.decoder.qkv_bias",
        "model.decoder.tied",
        "model.newline",
        "model.newline_in_stacks",
        "train.skip_spikes",
        "data.tiled_alone",
        "model.vision.remat",
        *(f"model.vision.{name}" for name in ("cut_rest", "class_token", "patch_bias", "pre_norm", "post_norm")),
        *(f"model.{part}.{name}" for part in PROJECTORS for name in SWITCHES),
    },
}
TAKEN[None] |= {
    f"model.level_projector.{name}" for name in ("depth", "order", "norm", "hidden", "norm_eps", *SWITCHES)
}
TAKEN[0] |= {"data.views"}  # of packs of text alone
RULES = {
    f"rules.{axis}" for axis in ("batch", "views", "length", "embed", "vocab", "heads", "kv_heads", "mlp", "lora")
}
TAKEN[()] |= RULES  # what is replicated


def is_taken(name, value):
    return any(type(value) is type(x) and value == x and name in names for x, names in TAKEN.items())


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_field_states_what_it_may_be_and_its_default_is(encoder):
    table = fields.all_fields(encoder)
    config = c.base()
    c.use_encoder(config, encoder)
    assert table.keys() == c.flatten(config).keys()
    for name, field in table.items():
        assert field.valid.holds(field.default), name
        assert field.meaning and field.valid.words, name
        assert field.default is None or type(field.default) is field.valid.kind, name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_field_takes_what_has_a_meaning_and_refuses_the_rest_by_name(encoder):
    """All fields × all values: no value passes that the table above does not list, and none ends in a traceback."""
    tried, wrongly = 0, []
    for name, field in fields.all_fields(encoder).items():
        for value in TRIED:
            tried += 1
            vit = name == "model.vision.stack_levels" and encoder == "vit" and value == (0,)  # counts from 0
            if field.valid.holds(value) != (is_taken(name, value) or vit):
                wrongly.append((name, value, "taken" if field.valid.holds(value) else "refused"))
    assert not wrongly
    assert tried == len(TRIED) * len(fields.all_fields(encoder)) > 1_400


@pytest.mark.parametrize("value", TRIED, ids=repr)
def test_a_value_out_of_range_is_one_sentence_with_field_value_and_what_is_valid(value):
    """As a config file sets it, and as `--config.FIELD=VALUE` does."""
    for name, field in fields.all_fields("vit").items():
        if name in ("model.encoder", "schema"):
            continue
        config = c.base()
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        try:
            node[leaf] = value
        except (TypeError, KeyError):  # ml_collections knows the types; `load_config` names the line of the file
            pass
        else:
            assert_taken_or_named(lambda config=config: c.check(config), name, field, lambda _, x=node[leaf]: x)
        override = f"{name}={value}"
        assert_taken_or_named(
            lambda override=override: lmm.load_config(DIGITS, override),
            name,
            field,
            lambda config, name=name: c.flatten(config)[name],
        )


def assert_taken_or_named(check, name, field, taken):
    """`check()` passes a value that is in range, or says in a sentence which field it refuses, or contradicts."""
    try:
        passed = check()
    except c.ConfigError as error:
        told = str(error)
        assert len(told) < 700 and (name in told or name.rpartition(".")[0] in told or "vision" in told), told
        assert all(
            line.startswith(("config", "  config", "model", "data", "train", "init")) for line in told.split("\n")
        )
    else:
        assert field.valid.holds(taken(passed)), (name, taken(passed))
