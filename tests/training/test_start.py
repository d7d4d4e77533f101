"""A run starts with what another one learned: its parameters, and nothing else."""

import functools
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, read_config, save_config
from lmm_jax.training import start as start_module
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.metrics import read_metrics
from lmm_jax.training.start import recut, start_from
from lmm_jax.training.state import abstract_params, abstract_state, init_state, make_program

MESH = ("mesh.fsdp=4", "mesh.tensor=2", "mesh.data=1")
NEXT = ("seed=1", "model.scales=(4, 9)", "train.scales_per_step=1", 'optimizer.groups=(("vision", 0.0),)')
NEWLINE = ("model.newline=True", 'init.new=("projector/", "image_newline")')


@pytest.fixture(scope="module")
def before(setup, tmp_path_factory):
    """A workdir with steps 1 and 2 of a run, and the parameters of both."""
    s, workdir = setup(8, *MESH), tmp_path_factory.mktemp("before")
    save_config(s.program.config, workdir / "config.json")
    checkpoints, state, params = Checkpoints(workdir), s.state, []
    for i in range(2):
        state, _ = s.run(state, s.host_batch(i))
        checkpoints.save(state, {})
        params.append(flat(state.params))
    checkpoints.wait()
    return workdir, params


@pytest.fixture(scope="module")
def start(tiny, before):
    """`start(*overrides, workdir)`: program of a new run, its parameters before, its state after, what was noted."""

    @functools.cache
    def fresh(*overrides):
        program = plan(tiny, *overrides)
        return program, init_state(program)

    def make(*overrides, workdir=before[0]):
        (program, state), lines = fresh(*overrides), []
        return program, flat(state.params), start_from(workdir, program, state, lines.append), lines

    return make


def plan(tiny, *overrides):
    return make_program(
        tiny(*NEXT, "init.from=named below", *overrides), sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    )


def write(state, workdir):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, {})
    checkpoints.wait()


def damage(step):
    """Flips a bit of the parameters."""
    path = max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def saved(workdir):
    """The newest parameters of a run on any mesh."""
    abstract = abstract_params(make_program(read_config(workdir / "config.json")))
    return flat(Checkpoints(workdir).restore_params(abstract)[0])


def flat(params):
    return flatten_dict(jax.device_get(params), sep="/")


def same(a, b):
    return {path for path in a.keys() & b.keys() if np.array_equal(a[path], b[path])}


def test_parameters_are_taken_and_all_else_is_new(start, before):
    """On another mesh, with other scales and frozen parts."""
    program, fresh, state, lines = start()
    taken = flat(state.params)
    assert same(taken, before[1][1]) == taken.keys() and not {p for p in same(taken, fresh) if "kernel" in p}
    sharding.assert_sharded(state, program.shardings, "started state")
    assert int(state.step) == int(state.skipped) == 0
    moments = state.opt_state[1]
    assert int(moments.count) == 0 and not any(np.any(x) for x in jax.tree.leaves((moments.mu, moments.nu)))
    assert moments.mu.keys() == {path for path in taken if not path.startswith("vision/")}
    assert lines == [f"starting from step 2 of {before[0]}: {len(taken)} parameters taken, 0 fresh"]


def test_what_is_named_new_starts_fresh(start, before):
    _, fresh, state, lines = start(*NEWLINE)
    taken, old = flat(state.params), before[1][1]
    new = {path for path in taken if path.startswith("projector/")} | {"image_newline"}
    assert new <= same(taken, fresh) and not new & {p for p in same(taken, old) if "kernel" in p}
    assert taken.keys() - new <= same(taken, old)
    assert f"{len(taken) - len(new)} parameters taken, {len(new)} fresh" in lines[0]


def test_what_does_not_fit_is_listed(tiny, before):
    program = plan(tiny, "model.decoder.mlp_dim=128", "model.newline=True")
    with pytest.raises(ConfigError) as error:
        start_from(before[0], program, abstract_state(program))
    head, *faults = str(error.value).split("\n  ")
    assert head.startswith(f"init.from={before[0]} does not give 4 parameters") and "init.new" in head
    assert set(faults) == {
        "image_newline (32,): is not there",
        "decoder/layers/down/kernel (3, 128, 32): has shape (3, 64, 32) there",
        "decoder/layers/gate/kernel (3, 32, 128): has shape (3, 32, 64) there",
        "decoder/layers/up/kernel (3, 32, 128): has shape (3, 32, 64) there",
    }
    program = plan(tiny, 'init.new=("projectr", "dec")')
    with pytest.raises(ConfigError, match="init.new: no parameter lies under 'projectr', 'dec'"):
        start_from(before[0], program, abstract_state(program))


def test_what_is_not_needed_is_left_and_said(start, before, tmp_path):
    """The workdir of a model with a newline, for one without."""
    state = start(*NEWLINE)[2]
    config = read_config(before[0] / "config.json")
    with config.unlocked():
        config.model.newline = True
    save_config(config, tmp_path / "config.json")
    write(state.replace(step=state.step + 1), tmp_path)
    _, _, state, lines = start(workdir=tmp_path)
    assert "image_newline" not in state.params and "not needed: ['image_newline']" in lines[-1]


def test_damage_is_noticed_and_the_step_before_is_used(start, before, tmp_path):
    copy = shutil.copytree(before[0], tmp_path / "run")
    damage(copy / "checkpoints" / "2")
    _, _, state, lines = start(workdir=copy)
    assert len(same(flat(state.params), before[1][0])) == len(before[1][0])
    assert "checkpoint 2" in lines[0] and "starting from step 1" in lines[1]
    damage(copy / "checkpoints" / "1")
    with pytest.raises(ValueError, match=r"no sound checkpoint among steps \[2, 1\]"):
        start(workdir=copy)


def test_folders_that_hold_no_run_are_named(start, before, tmp_path):
    with pytest.raises(ConfigError, match=f"init.from={tmp_path} is no workdir"):
        start(workdir=tmp_path)
    shutil.copy(before[0] / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        start(workdir=tmp_path)


def test_a_run_starts_from_another_once(tiny, before, tmp_path, capsys):
    """Its first step has rate 0, so that what it saves is what it took; when it continues, it takes nothing more."""
    source = shutil.copytree(before[0], tmp_path / "before")
    config = tiny(*NEXT, f"init.from={source}", "train.steps=1", recipe="full")
    lmm.train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert f"starting from step 2 of {source}" in out
    said = r"(\d+) records, .*the 8 packs of a step hold about (\d+) records: an epoch is about ([\d.]+) steps"
    records, held, epoch = map(float, re.search(said, out, re.DOTALL).groups())
    assert held >= 8 and abs(records - held * epoch) <= held
    program = make_program(config)
    state, _ = Checkpoints(tmp_path / "run").restore(abstract_state(program))
    assert same(flat(state.params), before[1][1]) == before[1][1].keys() and int(state.step) == 1
    shutil.rmtree(source)
    assert lmm.train(config, tmp_path / "run")["step"] == 1
    assert "all 1 steps are done" in capsys.readouterr().out


def test_blocks_cut_into_other_runs_are_the_same_blocks():
    """A DeepStack-V, whose tiles enter at block 2, starts from a plain encoder; and back."""
    x = np.arange(10).reshape(5, 2)
    plain = {"vision/blocks_0/q/kernel": x, "vision/cls": x[0]}
    cut = {"vision/blocks_0/q/kernel": x[:2], "vision/blocks_2/q/kernel": x[2:], "vision/cls": x[0]}
    for old, new in ((plain, cut), (cut, plain)):
        found = recut(old, new)
        assert found.keys() == new.keys()
        jax.tree.map(np.testing.assert_array_equal, found, new)


ROUTER = ("model.router.width=8", "model.router.heads=2", "train.log_every=1")


@pytest.mark.long
def test_a_router_is_learned_from_a_run_and_goes_on_after_a_stop(tiny, setup, tmp_path):
    """The recipe itself: all but the router is as it was, and a run that lost its last steps gives the same again."""
    s, before = setup(1), tmp_path / "before"
    before.mkdir()
    save_config(s.program.config, before / "config.json")
    write(s.state, before)
    every = ("train.steps=4", "train.save_every=2", "train.eval_every=4", "train.eval_batches=1")
    config = tiny(*ROUTER, *every, f"init.from={before}", recipe="router")
    workdir = tmp_path / "router"
    result = lmm.train(config, workdir)
    assert {"router_loss", "router_loss/36", "validation_router_loss", "validation_router_loss/1"} <= result.keys()
    assert abs(result["router_loss"] - np.log(2)) < 0.3 and result["skipped"] == 0
    first, rows = saved(workdir), read_metrics(workdir)
    old = flat(s.state.params)
    assert {path.split("/")[0] for path in first.keys() - old.keys()} == {"router"}
    assert same(first, old) == old.keys()
    shutil.rmtree(workdir / "checkpoints/4")
    lmm.train(config, workdir)
    assert same(saved(workdir), first) == first.keys()
    losses = [[row[name] for name in row if "loss" in name] for row in read_metrics(workdir)]
    assert losses == [[row[name] for name in row if "loss" in name] for row in rows]


def test_a_router_has_to_start_fresh(tiny, before):
    program = plan(tiny, "model.router.width=8", "model.router.heads=2", f"init.from={before[0]}")
    with pytest.raises(ConfigError, match=r"name those that shall start fresh in init\.new\n  router/"):
        start_module.check(program)
    more = ("model.router.width=8", "model.router.heads=2", f"init.from={before[0]}", 'init.new=("router",)')
    start_module.check(plan(tiny, *more))
