"""Adapters: what trains, how they begin, merge, are saved without their base, and go on after a stop."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, read_config, save_config
from lmm_jax.models.layers import Dense, dropout
from lmm_jax.training import adapters, base, optimizer
from lmm_jax.training.checkpoint import Checkpoints, leave_out
from lmm_jax.training.saved import saved_base, saved_steps
from lmm_jax.training.state import abstract_params, abstract_state, init_state, make_program
from lmm_jax.training.step import loss_and_grads, token_losses

LORA = ("lora.rank=4", "lora.alpha=8")
MESH = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
ALL = 'lora.paths=("decoder/layers", "projector", "vision/blocks_*")'


def flat(params):
    return {path: np.asarray(x) for path, x in flatten_dict(jax.device_get(params), sep="/").items()}


def one_device(config):
    return make_program(config, sharding.make_mesh({}, jax.devices()[:1]))


def drawn(program, seed=0):
    """Parameters whose adapters do something: B is drawn, not zeros."""
    params, rng = flatten_dict(init_state(program).params, sep="/"), np.random.default_rng(seed)
    for path, x in params.items():
        if path.endswith(adapters.B):
            params[path] = jax.device_put(rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding)
    return unflatten_dict(params, sep="/")


def test_only_adapters_train_and_lie_beside_their_kernels(tiny):
    program = make_program(tiny(*LORA, ALL, *MESH))
    trained = {path for path, rate in program.rates.items() if rate}
    assert {path.rpartition("/")[2] for path in trained} == {"lora_a", "lora_b"}
    layers = {path.rpartition("/")[0] for path in trained}
    assert layers == {
        *(f"decoder/layers/{name}" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *(f"vision/blocks_0/{name}" for name in ("q", "k", "v", "o", "up", "down")),
        *("projector/linear_0", "projector/linear_1"),
    }
    moments = [x for x in jax.tree.leaves(abstract_state(program).opt_state) if x.ndim]
    assert len(moments) == 2 * len(trained)
    placed = flatten_dict(program.shardings.params, sep="/")
    assert placed["decoder/layers/q/lora_a"].spec == jax.P(None, "fsdp", None)
    assert placed["decoder/layers/q/lora_b"].spec == jax.P(None, "fsdp", "tensor", None)
    assert placed["decoder/layers/down/lora_a"].spec == jax.P(None, "tensor", "fsdp")
    assert placed["decoder/layers/down/lora_b"].spec == jax.P(None, "fsdp", None)


@pytest.mark.long
def test_adapters_begin_as_peft_has_them_and_all_else_as_without_them(tiny):
    program = make_program(tiny(*LORA, ALL, *MESH))
    state = init_state(program)
    sharding.assert_sharded(state, program.shardings, "state with adapters")
    params = flat(state.params)
    plain = flat(init_state(make_program(tiny(*MESH))).params)
    assert all(np.array_equal(params[path], x) for path, x in plain.items())  # the rest begins as without adapters
    for layer in adapters.layers(params):
        a, kernel = params[f"{layer}/lora_a"], params[f"{layer}/kernel"]
        assert not params[f"{layer}/lora_b"].any() and (params[f"{layer}/lora_scale"] == 2).all()
        bound = (a[0].size if a.ndim > 2 or kernel.ndim > 2 else a.size) // 4
        assert 0.8 * bound**-0.5 < np.abs(a).max() <= bound**-0.5


def test_groups_set_the_rates_of_adapters_and_name_what_trains_beside_them(tiny):
    groups = 'optimizer.groups=(("decoder/layers/q", 1e-5), ("projector", 1e-4))'
    rates = one_device(tiny(*LORA, groups)).rates
    assert rates["decoder/layers/q/lora_a"] == 1e-5 and rates["decoder/layers/q/kernel"] == 0
    assert rates["projector/linear_0/kernel"] == 1e-4 and rates["decoder/table"] == rates["decoder/norm/scale"] == 0
    with pytest.raises(ValueError, match=r"'decoder/layers' has rate 0 and lora.paths gives decoder/layers/"):
        one_device(tiny(*LORA, 'optimizer.groups=(("decoder/layers", 0.0),)'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('lora.paths=("decoder/layer",)', r"lora.paths: no parameter lies under 'decoder/layer'; there are linear"),
        ('lora.paths=("decoder/table",)', r"'decoder/table' is no linear layer and holds none"),
        ('lora.paths=("decoder/layers/mlp_norm",)', r"is no linear layer"),
        ('lora.paths=("decoder/head",)', r"'decoder/head' cannot have an adapter, as the head is read as a matrix"),
        ("lora.rank=33", r"lora.rank=33: decoder/layers/\w+ is a map from \d+ to \d+ numbers, so that a rank above"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused_in_a_sentence(tiny, override, message):
    with pytest.raises(ValueError, match=message):
        one_device(tiny("lora.rank=4", override))


def test_frozen_kernels_in_bfloat16_are_refused_where_they_would_lose(tiny):
    with pytest.raises(ConfigError, match="optimizer.frozen_dtype=bfloat16 with model.dtype=float32"):
        tiny("optimizer.frozen_dtype=bfloat16", "model.dtype=float32")
    planned = abstract_params(one_device(tiny(*LORA, "optimizer.frozen_dtype=bfloat16", "model.dtype=bfloat16")))
    for path, x in flatten_dict(planned, sep="/").items():
        half = path.endswith("/kernel") or path == "decoder/table"
        assert x.dtype == ("bfloat16" if half else "float32"), path


@pytest.mark.long
@pytest.mark.parametrize("scanned", ["hybrid", "m3"])
def test_merged_kernels_compute_what_adapters_do(tiny, setup, scanned):
    """On packed rows, through scans; on the host as on devices."""
    config = tiny(
        *LORA, 'lora.paths=("decoder/layers", "projector", "vision")', "model.dtype=float32", recipe=scanned
    )
    program, plain = one_device(config), one_device(adapters.plain_config(config))
    params, s = drawn(program), setup(1, recipe=scanned)
    batch = {name: x[:2] for name, x in s.host_batch(0).items()}
    merged = adapters.merge(params, plain.shardings.params)
    losses = [
        jax.jit(functools.partial(token_losses, model))(p, batch)[0]
        for model, p in (
            (program.model, params),
            (plain.model, merged),
            (program.model, adapters.without(params)),
        )
    ]
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-5)
    assert np.abs(losses[0] - losses[2]).max() > 1e-2
    there, found = flat(params), flat(merged)
    for layer in adapters.layers(there):
        parts = [there[f"{layer}/{leaf}"] for leaf in ("kernel", *adapters.LEAVES)]
        np.testing.assert_allclose(adapters.merge_on_host(*parts), found[f"{layer}/kernel"], atol=1e-6)


@pytest.mark.parametrize("layers", [(), (3,)])
def test_an_adapter_adds_what_its_merged_kernel_has_more(layers):
    """Of a layer of its own, and of layers of a scan; with several axes on either side."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 6, 5, 2), "lora_a": (4, 6, 3), "lora_b": (3, 5, 2), "lora_scale": ()}
    params = {name: rng.normal(size=(*layers, *shape)).astype(np.float32) for name, shape in shapes.items()}
    params["lora_scale"] = np.full(layers, 1.5, np.float32)
    dense, x = Dense((5, 2), ("heads", "head_dim"), ("embed", "norm")), rng.normal(size=(2, 7, 4, 6))
    run = lambda p: dense.apply({"params": p}, jnp.asarray(x, jnp.float32))  # noqa: E731
    run = jax.vmap(run) if layers else run
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    merged = adapters.merge({"q": params}, {"q": {"kernel": place}})["q"]
    assert merged.keys() == {"kernel"}
    np.testing.assert_allclose(run(params), run(merged), atol=1e-4)
    parts = [params[name] for name in ("kernel", *adapters.LEAVES)]
    np.testing.assert_allclose(adapters.merge_on_host(*parts), merged["kernel"], atol=1e-5)
    assert np.abs(run(params) - run({"kernel": params["kernel"]})).max() > 1


def test_dropout_is_drawn_anew_by_each_layer_and_only_from_its_key():
    layer = {name: jnp.zeros((3, 2, 2)) for name in ("lora_a", "lora_b")} | {"lora_scale": jnp.ones(3)}
    params = {"q": layer, "k": layer}
    first, again, other = (adapters.with_dropout(params, 0.5, jax.random.key(n)) for n in (1, 1, 2))
    keys = [p["q"]["lora_key"] for p in (first, again, other)]
    assert np.array_equal(keys[0], keys[1]) and not np.array_equal(keys[0], keys[2])
    assert len(np.unique(keys[0], axis=0)) == 3
    assert not np.array_equal(keys[0], first["k"]["lora_key"])


@pytest.mark.long
def test_the_loss_with_dropout_depends_on_step_and_micro_batch(tiny, setup):
    s, program = setup(1), one_device(tiny(*LORA, "model.dtype=float32"))
    params = drawn(program)
    parts = optimizer.split(params, program.rates)
    batch = {name: np.stack([x[:2]] * 2) for name, x in s.host_batch(0).items()}
    run = jax.jit(loss_and_grads, static_argnums=(0, 4))
    losses = [
        float(run(program.model, *parts, batch, share, jax.random.key(n))[0]) for share, n in ((0, 0), (0.5, 0))
    ]
    again, other = (float(run(program.model, *parts, batch, 0.5, jax.random.key(n))[0]) for n in (0, 1))
    one = {name: x[:1] for name, x in batch.items()}
    alone = float(run(program.model, *parts, one, 0.5, jax.random.key(0))[0])
    assert losses[1] == again and len({*losses, other, alone}) == 4


def test_dropout_leaves_out_a_share_and_keeps_the_mean():
    x = dropout(jnp.ones((1000, 100)), jnp.float32(0.25), jax.random.key_data(jax.random.key(0)))
    assert set(np.unique(x).round(5)) == {0, np.float32(4 / 3).round(5)}
    np.testing.assert_allclose((x == 0).mean(), 0.25, atol=0.01)
    np.testing.assert_allclose(x.mean(), 1, atol=0.01)


STEPS = ("train.steps=5", "train.save_every=2", "data.rows=1", "train.batch_size=8", "train.micro_batches=2")


@pytest.fixture(scope="module")
def runs(tiny, setup, tmp_path_factory):
    """Workdir of a base, the overrides of a run with adapters that begins with it, and that run's workdir."""
    root, s = tmp_path_factory.mktemp("runs"), setup(8, *MESH)
    (root / "base").mkdir()
    save_config(s.program.config, root / "base" / "config.json")
    s.packs.tokenizer.save(root / "base")
    with Checkpoints(root / "base") as checkpoints:
        checkpoints.save(s.state, {})
    overrides = (*LORA, ALL, *MESH, *STEPS, f"init.from={root / 'base'}", "lora.dropout=0.1")
    lmm.train(tiny(*overrides), root / "run")
    return root / "base", overrides, root / "run"


def saved(workdir, step, program):
    left = saved_base(workdir)
    abstract = abstract_params(program)
    if left:
        abstract = leave_out(abstract, left["digests"])
    return flat(Checkpoints(workdir).restore_params(abstract, print, step)[0])


@pytest.mark.long
def test_five_steps_train_adapters_alone_and_save_them_alone(runs, tiny):
    folder, overrides, workdir = runs
    program = make_program(tiny(*overrides))
    assert saved_steps(workdir) == [5, 4]
    last = saved(workdir, 5, program)
    assert last.keys() == {
        path for path in flatten_dict(program.shardings.params, sep="/") if adapters.is_adapter(path)
    }
    start = flat(init_state(program).params)
    for path, x in last.items():
        assert np.array_equal(x, start[path]) == path.endswith("lora_scale"), path
    state, _, left = base.restore(Checkpoints(workdir), program, workdir)
    sharding.assert_sharded(state, program.shardings, "restored state")
    before = flat(Checkpoints(folder).restore_params(abstract_params(make_program(tiny(*MESH))))[0])
    after = flat(state.params)
    assert left["step"] == 0 and left["digests"].keys() == before.keys()
    assert all(np.array_equal(after[path], x) for path, x in before.items())
    size = {
        name: sum(f.stat().st_size for f in (name / "checkpoints").rglob("*") if f.is_file())
        for name in (folder, workdir)
    }
    assert size[workdir] / 2 < size[folder]


@pytest.mark.long
def test_a_stopped_run_goes_on_to_the_bit(runs, tiny, tmp_path):
    _, overrides, workdir = runs
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    program = make_program(tiny(*overrides))
    lmm.train(tiny(*overrides), tmp_path / "run")
    want, found = (saved(folder, 5, program) for folder in (workdir, tmp_path / "run"))
    assert all(np.array_equal(found[path], x) for path, x in want.items())


@pytest.mark.long
def test_a_base_that_is_gone_or_another_is_refused_in_a_sentence(runs, tmp_path):
    folder, _, workdir = runs
    shutil.copytree(workdir, tmp_path / "run")
    keys = json.loads((workdir / "config.json").read_text())

    def named(path):
        keys["init"]["from"] = str(path)
        (tmp_path / "run/config.json").write_text(json.dumps(keys))

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    named(moved)
    want, found = flat(lmm.load(workdir).params), flat(lmm.load(tmp_path / "run").params)
    assert all(np.array_equal(found[path], x) for path, x in want.items())
    with Checkpoints(moved) as checkpoints:  # the same step, other numbers
        program = make_program(read_config(moved / "config.json"))
        state = init_state(program)
        checkpoints.save(state.replace(params=jax.tree.map(lambda x: x + 1, state.params)), {})
    with pytest.raises(ConfigError, match="moved is not what .*run was trained on: .* parameters there are others"):
        lmm.load(tmp_path / "run")
    shutil.rmtree(moved / "checkpoints")
    (moved / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="of which step 0 is needed, and cannot be read"):
        lmm.load(tmp_path / "run")
    left = saved_base(workdir)
    named(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere, which is not there .*: put it back, or write into"):
        base.find(read_config(tmp_path / "run/config.json"), left | {"init": {"from": str(moved / "gone")}}, tmp_path)


@pytest.mark.long
def test_a_run_begins_with_the_merged_adapters_of_another(runs, tiny, tmp_path):
    _, _, workdir = runs
    again = (*LORA, *MESH, *STEPS, "train.steps=1", f"init.from={workdir}")
    lmm.train(tiny(*again), tmp_path / "run")
    assert saved_base(tmp_path / "run") is None  # a merged base could not be told to be the same on another machine
    program = make_program(tiny(*again))
    found, want = saved(tmp_path / "run", 1, program), flat(lmm.load(workdir).params)
    assert all(np.array_equal(found[path], x) for path, x in want.items())


@pytest.mark.long
def test_micro_batches_change_nothing_but_rounding(tiny, setup):
    s = setup(8, *MESH)
    program = make_program(tiny(*LORA, *MESH, "model.dtype=float32"))
    params, batch = drawn(program), s.host_batch(0)
    parts = optimizer.split(params, program.rates)
    run = jax.jit(loss_and_grads, static_argnums=0)
    with program.use():
        one = run(program.model, *parts, {name: x[None] for name, x in batch.items()})
        many = run(program.model, *parts, {name: x.reshape(2, -1, *x.shape[1:]) for name, x in batch.items()})
    np.testing.assert_allclose(one[0], many[0], rtol=1e-5)
    for path, x in one[1].items():
        np.testing.assert_allclose(x, many[1][path], atol=1e-5, err_msg=path)


@pytest.mark.long
@pytest.mark.parametrize("options", ["optimizer.moments=bfloat16", "optimizer.second_moment=factored"])
def test_a_run_with_smaller_moments_learns_and_goes_on_to_the_bit(tiny, tmp_path, options):
    overrides = (*MESH, *STEPS, "train.save_every=3", options)
    first = lmm.train(tiny(*overrides), tmp_path / "run")
    assert np.isfinite(first["loss"])
    program = make_program(tiny(*overrides))
    want = saved(tmp_path / "run", 5, program)
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    lmm.train(tiny(*overrides), tmp_path / "run")
    found = saved(tmp_path / "run", 5, program)
    assert all(np.array_equal(found[path], x) for path, x in want.items())
