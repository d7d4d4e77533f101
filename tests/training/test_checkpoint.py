"""Checkpoints: restored on any mesh, damaged ones noticed."""

import errno
import json
import os
import shutil
import types

import jax
import numpy as np
import pytest

from lmm_jax import errors, lock, sharding, storage
from lmm_jax.training import checkpoint
from lmm_jax.training.checkpoint import DAMAGED, Checkpoints
from lmm_jax.training.digest import digest
from lmm_jax.training.saved import (
    MANIFEST,
    check_holds_step,
    newest_sound,
    read_manifest,
    saved_about,
    write_manifest,
)
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
    checkpoints.wait()
    return s, workdir, states


@pytest.fixture
def saved(original, tmp_path):
    """The same in a copy of a test's own, which it may damage."""
    s, workdir, states = original
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    return s, tmp_path, states


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, jax.device_get(b))


def at_step(state, step):
    """A state as if all steps since its own had been skipped."""
    return state.replace(step=state.step * 0 + step, skipped=state.skipped + (step - state.step))


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
    later = at_step(states[1], 5)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(jax.device_put(later, s.program.shardings), DATA)
    flip_a_byte_of_the_largest_file(workdir / "checkpoints" / "5")
    with Checkpoints(workdir, keep=1) as checkpoints:
        state, _ = checkpoints.restore(abstract_state(s.program), lambda _: None)
        assert int(state.step) == 2
        for step in (3, 4):
            checkpoints.save(at_step(state, step), DATA)
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
        state = at_step(state, state.step + 1)
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


def test_an_error_of_the_disk_names_the_folder(saved):
    """Behind Orbax's threads it comes without a name: "a file" was full."""
    _, workdir, _ = saved
    checkpoints = Checkpoints(workdir)

    def fails():
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("save failed") from error

    checkpoints._saving = types.SimpleNamespace(wait=fails)
    with pytest.raises(OSError, match="No space left") as raised:
        checkpoints.wait()
    sentence, code = errors.explain(raised.value)
    assert f"the disk is full, at {workdir}/checkpoints; make room" in sentence and code == 1


def test_a_step_whose_description_is_torn_is_named_when_it_is_streamed(saved):
    s, workdir, _ = saved
    for file in (workdir / "checkpoints/2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.raises(ValueError, match="checkpoints/2 is damaged: what it holds cannot be read"):
        next(Checkpoints(workdir).stream_params(2, abstract_state(s.program).params))


def test_steps_that_a_number_divides_are_kept_beside_the_newest(setup, tmp_path):
    s = setup(8, *MESH)
    checkpoints, state = Checkpoints(tmp_path, keep=1, keep_every=3), s.state
    for step in range(1, 8):
        checkpoints.save(at_step(state, step), DATA)
    checkpoints.wait()
    assert checkpoints.steps() == [7, 6, 3]


def empty(file):
    file.write_bytes(b"")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_a_digit(file):
    """A number of the manifest, as a flipped bit would."""
    text = file.read_text()
    place = text.index('"params": {') + 40
    place = next(i for i in range(place, len(text)) if text[i].isdigit())
    file.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])


def of_another_version(file):
    content = json.loads(file.read_text())
    content["content"]["format"] = 99
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [empty, halve, change_a_digit, of_another_version, lambda file: file.unlink()])
def test_a_manifest_is_part_of_what_is_proven(saved, damage):
    s, workdir, _ = saved
    damage(workdir / "checkpoints/2" / MANIFEST)
    lines = []
    state, _ = Checkpoints(workdir).restore(abstract_state(s.program), lines.append)
    assert int(state.step) == 1 and newest_sound(workdir) == 1
    assert saved_about(workdir, 2) is None
    assert not lines or "checkpoints/2/manifest.json is damaged" in lines[0]  # one that is not there is no step's


@pytest.mark.parametrize("how", ["renamed", "copied", "linked"])
def test_a_step_is_the_one_that_its_name_says(saved, how):
    s, workdir, _ = saved
    folder = workdir / "checkpoints"
    if how == "renamed":
        (folder / "2").rename(folder / "7")
    elif how == "copied":
        shutil.copytree(folder / "2", folder / "7")
    else:
        (folder / "7").symlink_to(folder / "2")
    lines = []
    state, _ = Checkpoints(workdir).restore(abstract_state(s.program), lines.append)
    assert int(state.step) == (1 if how == "renamed" else 2)
    assert "checkpoints/7 holds step 2: it was renamed, copied or linked" in lines[0]


def test_what_cannot_be_used_is_moved_away_and_what_was_unfinished_removed(saved):
    s, workdir, _ = saved
    folder = workdir / "checkpoints"
    flip_a_byte_of_the_largest_file(folder / "2")
    (folder / "5").mkdir()
    shutil.copytree(folder / "1", folder / "8.orbax-checkpoint-tmp")
    shutil.copytree(folder / "1", folder / "0.deleted")
    (folder / "notes.txt").write_text("mine")
    lines, checkpoints = [], Checkpoints(workdir)
    state, _ = checkpoints.restore(abstract_state(s.program), lambda _: None)
    checkpoints.clear_away(int(state.step), lines.append)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "notes.txt"]
    assert sorted(path.name for path in (workdir / DAMAGED).iterdir()) == ["2", "5"]
    assert "step 2 cannot be used" in " ".join(lines) and "step 5 was never finished" in " ".join(lines)


def test_an_optimizer_that_counted_other_updates_is_noticed(setup, tmp_path):
    """As of parts that were put together from two steps, by whoever makes the digests fit."""
    s = setup(8, *MESH)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(s.state.replace(step=s.state.step + 3), DATA)
    lines = []
    with pytest.raises(ValueError, match="no sound checkpoint"):
        Checkpoints(tmp_path).restore(abstract_state(s.program), lines.append)
    assert "count differ from what was saved" in lines[0]


def test_a_disk_without_room_is_known_before_anything_is_written(setup, tmp_path, monkeypatch):
    s, checkpoints = setup(8, *MESH), Checkpoints(tmp_path)
    needed = sum(x.nbytes for x in jax.tree.leaves((s.state.params, s.state.opt_state)))
    monkeypatch.setattr(storage, "free_bytes", lambda *_: needed - 1)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.check_room(s.state)
    monkeypatch.setattr(storage, "free_bytes", lambda *_: needed + 4096)
    checkpoints.check_room(s.state)


def test_steps_of_a_version_of_before_are_told_from_what_was_never_finished(saved):
    _, workdir, _ = saved
    folder = workdir / "checkpoints"
    for step in "12":
        (folder / step / MANIFEST).unlink()
        description = folder / step / "_CHECKPOINT_METADATA"
        content = json.loads(description.read_text())
        content["custom_metadata"] = {"digests": {"params": {}}, "data": {}}
        description.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"steps \[2, 1\] in .* from before checkpoints had a manifest"):
        check_holds_step(workdir)
    Checkpoints(workdir).clear_away()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]  # they are somebody's


def test_a_place_that_cannot_be_reached_for_a_moment_is_no_damage(saved, monkeypatch):
    """An older step must not take the newest's place, which would be lost: it is read again, or the run ends."""
    s, workdir, _ = saved
    monkeypatch.setattr(checkpoint, "PAUSE", 0)
    real, fails, notes = checkpoint.ocp.load_checkpointables, [], []

    def load(*args, **kwargs):
        if fails:
            raise OSError("orbax could not") from fails.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), OSError(errno.ESTALE, "stale")):
        fails += [error] * 2
        state, _ = Checkpoints(workdir).restore(abstract_state(s.program), notes.append)
        assert int(state.step) == 2 and not notes and not fails
        fails += [error] * 3
        with pytest.raises(OSError, match="orbax could not") as raised:
            Checkpoints(workdir).restore(abstract_state(s.program), notes.append)
        assert errors.may_pass(raised.value) and not notes and not fails
    # Of memory, the step itself may be the reason: another is tried, and if none can be read that is what is told.
    fails.append(MemoryError())
    state, _ = Checkpoints(workdir).restore(abstract_state(s.program), notes.append)
    assert int(state.step) == 1 and "MemoryError" in notes[0]
    fails += [MemoryError(), MemoryError()]
    with pytest.raises(OSError, match="orbax could not") as raised:
        Checkpoints(workdir).restore(abstract_state(s.program), notes.append)
    assert errors.may_pass(raised.value)


@pytest.mark.parametrize("key", ["format", "step", "about", "base", "digests", "files"])
def test_a_manifest_that_lacks_something_is_damaged(saved, key):
    _, workdir, _ = saved
    folder = workdir / "checkpoints/2"
    content = {name: value for name, value in read_manifest(folder).items() if name != key}
    write_manifest(folder, content)
    assert saved_about(workdir, 2) is None and newest_sound(workdir) == 1


def test_a_manifest_that_never_ends_is_damaged(saved):
    _, workdir, _ = saved
    (workdir / "checkpoints/2" / MANIFEST).unlink()
    (workdir / "checkpoints/2" / MANIFEST).symlink_to("/dev/zero")
    assert saved_about(workdir, 2) is None and newest_sound(workdir) == 1


def test_a_step_of_a_workdir_that_was_taken_over_meanwhile_does_not_count_and_deletes_nothing(setup, saved):
    s, workdir, _ = saved
    before = sorted(path for path in (workdir / "checkpoints").rglob("*"))

    def taken_over():
        raise lock.Held("taken over by another")

    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(at_step(s.state, 3), DATA, check_held=taken_over)
    with pytest.raises(lock.Held):
        checkpoints.wait()
    assert set(before) <= set((workdir / "checkpoints").rglob("*")) and newest_sound(workdir) == 2


def test_a_step_that_cannot_be_deleted_for_now_does_not_undo_the_save(saved, monkeypatch):
    s, workdir, _ = saved

    def busy(folder):
        raise OSError(errno.ESTALE, "stale", str(folder))

    monkeypatch.setattr(checkpoint, "_delete", busy)
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(at_step(s.state, 3), DATA)
    checkpoints.wait()
    assert newest_sound(workdir) == 3 and checkpoints.steps() == [3, 2, 1]
