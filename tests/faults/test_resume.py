"""Runs that go on, that are repeated, and that lie otherwise on devices and hosts."""

import dataclasses
import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.training import loop
from lmm_jax.training.state import init_state, make_program
from tests.faults.rows import row
from tests.faults.runs import of_recipe, words
from tests.faults.sessions import Session, difference, losses
from tests.faults.states import state_of
from tests.training.test_hosts import Pod, records

RECIPES = ("m3", "full", "deepstack", "hybrid")  # M3, LLaVA's one budget, DeepStack, ConvLLaVA's encoder with stacks
STEPS = 60
ONLY_AT_THE_END = (f"train.steps={STEPS}", f"train.save_every={STEPS}", "train.log_every=1", "mesh.data=-1")


def assert_same_state(folder, other):
    one, two = state_of(folder), state_of(other)
    assert one.keys() == two.keys() and len(one) > 50
    for name, x in one.items():
        np.testing.assert_array_equal(x, two[name], name)


@pytest.fixture(scope="module")
def session(tiny):
    """`session(recipe, devices, *overrides)`: a `Session` of 60 steps."""

    @functools.cache
    def make(recipe, devices, *overrides):
        return Session(tiny(*ONLY_AT_THE_END, *overrides, recipe=recipe), devices)

    return make


@pytest.fixture(scope="module")
def whole(session, tmp_path_factory):
    """`whole(recipe)`: the workdir of a run on one device that was never stopped."""

    @functools.cache
    def make(recipe):
        workdir = tmp_path_factory.mktemp(recipe) / "run"
        assert session(recipe, 1).train(workdir) == STEPS
        return workdir

    return make


@row(11, few=0, full=80)
def test_a_stopped_run_ends_to_the_bit_as_one_that_was_not(trials, session, whole, tmp_path):
    """Each of four models is stopped at 20 random steps; losses, parameters, optimizer and counters are compared."""

    def check(number):
        recipe, workdir = RECIPES[number % len(RECIPES)], tmp_path / str(number)
        run, at = session(recipe, 1), int(trials.random(number).integers(2, STEPS - 3))
        stopped = run.train(workdir, stop_at=at)
        assert at <= stopped < STEPS, (at, stopped)
        assert run.train(workdir) == STEPS
        assert losses(workdir) == losses(whole(recipe))
        assert_same_state(workdir / f"checkpoints/{STEPS}", whole(recipe) / f"checkpoints/{STEPS}")
        return recipe

    trials.each(check)


@row(12, few=0, full=8)
def test_three_runs_are_equal_to_the_bit(trials, server, digits_folder, tmp_path):
    """Each of four models, computed in float32 and in bfloat16, by processes of their own."""

    def check(number):
        recipe, dtype = RECIPES[number % 4], ("float32", "bfloat16")[number // 4]
        few = ("train.steps=20", "train.save_every=20", "train.log_every=1", f"model.dtype={dtype}")
        for run in range(3):
            command = (*of_recipe(recipe, digits_folder, *few), "--workdir", tmp_path / f"{number}_{run}")
            with server.start(*command, plain=number == run == 0) as process:
                assert process.wait(240) == 0, process.said()[-2000:]
        first, *others = (tmp_path / f"{number}_{run}" for run in range(3))
        for other in others:
            assert losses(first) == losses(other)
            assert_same_state(first / "checkpoints/20", other / "checkpoints/20")
        return f"{recipe} {dtype}"

    trials.each(check)


CHAINS = ((8, 4, 1, 8), (1, 8, 4), (4, 1), (2, 8, 1), (8, 2), (1, 4, 8, 2))  # devices of the parts of a run
THIRTY = ("train.steps=30", "train.save_every=30", "optimizer.learning_rate=1e-3")


@dataclasses.dataclass(frozen=True)
class Alone:
    """A run on one device that was not stopped, and what it read: `{step: numbers of records}`."""

    workdir: pathlib.Path
    records: dict


@pytest.fixture(scope="module")
def alone(session, tmp_path_factory):
    """`alone(recipe)`: the `Alone` of 30 steps."""

    @functools.cache
    def make(recipe):
        workdir, run = tmp_path_factory.mktemp(recipe) / "run", session(recipe, 1, *THIRTY)
        run.records.clear()
        run.train(workdir)
        return Alone(workdir, dict(run.records))

    return make


@row(13, few=0, full=24)
def test_a_run_goes_on_on_any_number_of_devices(trials, session, alone, tmp_path):
    """Six chains of four models: the same records, and losses within 1e-5 of one device over 30 steps."""

    def check(number):
        chain, recipe = CHAINS[number % 6], RECIPES[number // 6]
        expected, run, seen = alone(recipe), tmp_path / str(number), {}
        for i, devices in enumerate(chain):
            part, last = session(recipe, devices, *THIRTY), i == len(chain) - 1
            part.records.clear()
            done = part.train(run, stop_at=None if last else 30 * (i + 1) // len(chain))
            seen |= {step: found for step, found in part.records.items() if step <= done}
        assert seen == expected.records
        assert difference(run, expected.workdir) <= 1e-5
        return recipe

    trials.each(check)


@row(13, few=0, full=2)
def test_a_run_goes_on_on_any_number_of_hosts(trials, tiny_args, tmp_path):
    """From one process to two, and from two to one."""

    def check(number):
        more = ("train.save_every=30", "mesh.data=2")
        runs = {}
        for name, chain in {"alone": (1,), "both": ((1, 2), (2, 1))[number]}.items():
            seen = {}
            for i, hosts in enumerate(chain):
                folder, last = tmp_path / f"{number}_{name}_{i}", i == len(chain) - 1
                command = words(tiny_args, tmp_path / f"{number}_{name}", *more, "train.steps=30")
                pod = Pod(folder, hosts, *command, devices=2 // hosts)
                if not last:
                    pod.wait_until_said(0, r"step 1[0-9]/30", 240)
                    for process in pod.processes.values():
                        process.terminate()
                codes = pod.codes(300)
                assert set(codes.values()) == ({0} if last else {75}), pod.said(0)
                seen |= records(folder)
            runs[name] = seen
        assert runs["alone"] == runs["both"]
        assert difference(tmp_path / f"{number}_alone", tmp_path / f"{number}_both") <= 1e-5

    trials.each(check)


MESHES = (
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 1, "fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "tensor": 2},
    {"data": 2, "fsdp": 4},
)


@row(14, few=0, full=24)
def test_any_mesh_gives_the_losses_of_one_device(trials, session, alone, tmp_path):
    """Six meshes of four models, over 30 steps."""

    def check(number):
        mesh, recipe = MESHES[number % 6], RECIPES[number // 6]
        expected, run = alone(recipe), tmp_path / str(number)
        other = session(recipe, 8, *THIRTY, *(f"mesh.{axis}={size}" for axis, size in mesh.items()))
        other.train(run)
        assert other.records == expected.records
        assert difference(run, expected.workdir) <= 1e-5
        return recipe

    trials.each(check)


@row(28, few=2, full=24)
def test_a_leaf_that_does_not_lie_where_it_was_planned_is_named(trials, tiny):
    """Of each of four models on six meshes, a random leaf is put on one device, as `jit(tx.init)` alone would do."""
    states = {}

    def check(number):
        random, recipe, mesh = trials.random(number), RECIPES[number % 4], MESHES[number // 4]
        program = make_program(tiny(recipe=recipe), sharding.make_mesh(mesh, jax.devices()[:8]))
        if recipe not in states:
            states[recipe] = jax.device_get(init_state(program))
        placed = jax.device_put(states[recipe], program.shardings)
        sharding.assert_sharded(placed, program.shardings, "train state")
        leaves, tree = jax.tree.flatten(placed)
        paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(placed)]
        wrong = int(random.integers(len(leaves)))
        leaves[wrong] = jax.device_put(jax.device_get(leaves[wrong]), jax.devices()[0])
        with pytest.raises(AssertionError, match=rf"train state: {re.escape(paths[wrong])} "):
            sharding.assert_sharded(jax.tree.unflatten(tree, leaves), program.shardings, "train state")

    trials.each(check)


@row(28, few=1, full=1)
def test_the_state_is_where_it_was_planned_when_a_run_begins_and_goes_on(trials, session, tmp_path, monkeypatch):
    """`loop.train` itself looks, before the first step: it refuses a state that lies on one device."""

    def check(number):
        run = session("m3", 8, *THIRTY)

        def on_one_device(program):
            return jax.device_put(init_state(program), jax.devices()[0])

        with monkeypatch.context() as patch:
            patch.setattr(loop, "init_state", on_one_device)
            with pytest.raises(AssertionError, match="train state: "):
                run.train(tmp_path / "run")
        assert not list((tmp_path / "run").glob("checkpoints/*"))

    trials.each(check)
