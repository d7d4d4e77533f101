"""Checkpoints: restored on any mesh, damaged ones noticed."""

import errno
import os
import shutil

import jax
import numpy as np
import pytest

from lmm_jax import errors, sharding
from lmm_jax.training.checkpoint import Checkpoints, digest
from lmm_jax.training.state import abstract_state, make_program

MESH = ("mesh.fsdp=4", "mesh.tensor=2", "mesh.data=1")
DATA = {"fingerprint": "abc", "seed": 0, "batch_size": 8}


@pytest.fixture(scope="module")
def original(setup, tmp_path_factory):
    """A workdir with steps 1 and 2, and their states."""
    s, workdir = setup(8, *MESH), tmp_path_factory.mktemp("original")
    checkpoints, states = Checkpoints(workdir), []
    state = s.state
    for i in range(2):
        state, _ = s.run(state, s.host_batch(i))
        checkpoints.save(state, DATA)
        states.append(jax.device_get(state))
    checkpoints.close()
    return s, workdir, states


@pytest.fixture
def saved(original, tmp_path):
    """The same in a copy of a test's own, which it may damage."""
    s, workdir, states = original
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    return s, tmp_path, states


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, jax.device_get(b))


def flip_a_byte_of_the_largest_file(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 4, "tensor": 2}, pytest.param({"data": 8}, marks=pytest.mark.long), {"fsdp": 2, "data": 4}]
)
def test_restores_bit_equal_on_any_mesh(saved, mesh):
    s, workdir, states = saved
    program = make_program(s.program.config, sharding.make_mesh(mesh))
    state, data = Checkpoints(workdir).restore(abstract_state(program))
    assert data == DATA and int(state.step) == 2
    assert_equal(states[1], state)
    sharding.assert_sharded(state, program.shardings, "restored state")


def test_damage_is_noticed_and_the_step_before_is_used(saved):
    s, workdir, states = saved
    flip_a_byte_of_the_largest_file(workdir / "checkpoints" / "2")
    lines = []
    state, _ = Checkpoints(workdir).restore(abstract_state(s.program), lines.append)
    assert int(state.step) == 1 and len(lines) == 1 and "checkpoint 2" in lines[0]
    assert_equal(states[0], state)


def test_after_falling_back_an_earlier_step_than_the_damaged_one_is_saved(saved):
    """As when a run is stopped again before it reaches the step that was damaged."""
    s, workdir, states = saved
    later = states[1].replace(step=states[1].step + 3)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(jax.device_put(later, s.program.shardings), DATA)
    flip_a_byte_of_the_largest_file(workdir / "checkpoints" / "5")
    with Checkpoints(workdir, keep=1) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(s.program), lambda _: None)
        assert int(state.step) == 2
        for step in (3, 4):
            checkpoints.save(state.replace(step=state.step * 0 + step), DATA)
        checkpoints.wait()
        assert checkpoints.steps() == [4]  # not the damaged one in its stead
    found, _ = Checkpoints(workdir).restore(abstract_state(s.program), lambda _: None)
    assert int(found.step) == 4
    assert_equal(states[1].params, found.params)


def test_if_all_are_damaged_nothing_is_loaded(saved):
    s, workdir, _ = saved
    for step in "12":
        flip_a_byte_of_the_largest_file(workdir / "checkpoints" / step)
    with pytest.raises(ValueError, match="no sound checkpoint among steps"):
        Checkpoints(workdir).restore(abstract_state(s.program), lambda _: None)


def test_an_empty_folder_restores_nothing(setup, tmp_path):
    program = setup(8, *MESH).program
    assert Checkpoints(tmp_path).restore(abstract_state(program)) is None


def test_parameters_can_be_restored_alone(saved):
    s, workdir, states = saved
    abstract = abstract_state(s.program).params
    params, step = Checkpoints(workdir).restore_params(abstract)
    assert step == 2
    assert_equal(states[1].params, params)


def test_only_the_newest_are_kept(setup, tmp_path):
    s = setup(8, *MESH)
    checkpoints, state = Checkpoints(tmp_path, keep=2), s.state
    for _ in range(4):
        state = state.replace(step=state.step + 1)
        checkpoints.save(state, DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [4, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_bit_and_every_swap_changes_the_digest(dtype):
    x = (np.random.default_rng(0).normal(size=(3, 5)) * 100).astype(jax.numpy.dtype(dtype))
    original = digest({"x": jax.numpy.asarray(x)})["x"]
    for byte in range(x.nbytes):
        for bit in range(8):
            y = x.copy()
            y.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            assert digest({"x": jax.numpy.asarray(y)})["x"] != original, (byte, bit)
    swapped = x.copy()
    swapped[0, 0], swapped[2, 4] = x[2, 4], x[0, 0]
    assert digest({"x": jax.numpy.asarray(swapped)})["x"] != original


def test_a_digest_is_the_same_without_jit():
    tree = {"x": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "y": np.arange(5, dtype=np.float32)}
    compiled = digest(tree)
    with jax.disable_jit():
        assert digest(tree) == compiled


def test_an_error_of_the_disk_names_the_folder(saved, monkeypatch):
    """Behind Orbax's threads it comes without a name: "a file" was full."""
    _, workdir, _ = saved
    checkpoints = Checkpoints(workdir)

    def fails():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("save failed") from error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._orbax, "wait", fails)
        with pytest.raises(OSError, match="No space left") as raised:
            checkpoints.wait()
    checkpoints.close()
    sentence, code = errors.explain(raised.value)
    assert f"the disk is full, at {workdir}/checkpoints; make room" in sentence and code == 1


def test_a_step_whose_description_is_torn_is_named_when_it_is_streamed(saved):
    s, workdir, _ = saved
    for file in (workdir / "checkpoints/2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.raises(ValueError, match="checkpoints/2 is damaged: what it holds cannot be read"):
        next(Checkpoints(workdir).stream_params(2, abstract_state(s.program).params))
