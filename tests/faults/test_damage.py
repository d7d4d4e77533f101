"""Steps that were damaged on disk: never used silently, and the newest sound one goes on."""

import shutil

import pytest

from tests.faults import damages
from tests.faults.damages import OF_FILES, OF_LEAVES, damage_file, damage_leaf, files_of, find_leaves
from tests.faults.rows import row


@pytest.fixture(scope="module")
def leaves(small_run):
    """Where the arrays of the newest step lie."""
    return find_leaves(step_of(small_run.workdir, small_run.newest))


def step_of(workdir, step):
    return workdir / "checkpoints" / str(step)


@row(3, few=6, full=1000)
def test_damage_anywhere_in_a_step_is_never_used_silently(trials, small_run, leaves, tmp_path):
    """Every second trial damages any byte of any file, the others whole patterns within an array."""

    def check(number):
        random = trials.random(number)
        with small_run.copy(tmp_path / str(number)) as workdir:
            step = step_of(workdir, small_run.newest)
            if number % 2:
                kind = list(OF_FILES)[number // 2 % len(OF_FILES)]
                damage_file(step, name := random.choice(files_of(step)), kind, random)
            else:
                kind = list(OF_LEAVES)[number // 2 % len(OF_LEAVES)]
                leaf = leaves[random.integers(len(leaves))]
                damage_leaf(step, leaf, kind, random)
                name = leaf.file
            found = small_run.restart(workdir)
        try:
            small_run.check_never_wrong(found)
        except AssertionError as error:
            raise AssertionError(f"{kind} in {name}: {error}") from None
        outcome = "refused" if found.step is None else "as saved" if found.step == small_run.newest else "older step"
        return f"{kind}: {outcome}"

    trials.each(check)


CERTAIN = ("two sign bits", "a negated array", "one high bit of evenly many", "swapped blocks")


@row(4, few=2, full=100)
def test_if_the_newest_steps_are_damaged_an_older_one_goes_on_and_it_is_said(trials, small_run, leaves, tmp_path):
    """One or two of three steps; in every tenth trial all, which refuses the run."""

    def check(number):
        random = trials.random(number)
        steps = sorted(small_run.states, reverse=True)
        bad = steps if number % 10 == 3 else steps[: 1 + number % 2]
        with small_run.copy(tmp_path / str(number)) as workdir:
            for step in bad:
                folder = step_of(workdir, step)
                if step == small_run.newest and number % 3:
                    damage_leaf(folder, leaves[random.integers(len(leaves))], CERTAIN[number % 4], random)
                else:
                    take_away(folder, random)
            found = small_run.restart(workdir)
        small_run.check_never_wrong(found)
        sound = [step for step in steps if step not in bad]
        assert found.step == (sound[0] if sound else None), found
        for step in bad:
            assert str(step) in found.said, found.said

    trials.each(check)


def take_away(folder, random):
    """Takes the arrays of one part of a step, or the description of the step, away."""
    which = random.choice(["params", "train", "_CHECKPOINT_METADATA"])
    if which.startswith("_"):
        (folder / which).write_bytes(b"")
        return
    for path in (folder / which).rglob("*"):
        if path.is_file() and "ocdbt" in str(path) and path.parent.name == "d":
            path.unlink()


@row(5, few=3, full=300)
def test_a_truncated_empty_or_missing_file_is_noticed(trials, small_run, tmp_path):
    """Every file of a step in turn. What a restart does not need may be gone; the run goes on in any case."""
    names = files_of(step_of(small_run.workdir, small_run.newest))

    def check(number):
        random = trials.random(number)
        name, how = names[number // 3 % len(names)], ("truncated", "empty", "missing")[number % 3]
        with small_run.copy(tmp_path / str(number)) as workdir:
            file = step_of(workdir, small_run.newest) / name
            data = file.read_bytes()
            if how == "missing":
                file.unlink()
            else:
                file.write_bytes(data[: random.integers(1, len(data)) if how == "truncated" else 0])
            found = small_run.restart(workdir)
        small_run.check_never_wrong(found)
        assert found.step is not None, f"{name} {how}: {found.said}"
        if found.step != small_run.newest:
            assert str(small_run.newest) in found.said, f"{name} {how} is not said: {found.said}"
        return f"{how}: {'as saved' if found.step == small_run.newest else 'older step'}"

    trials.each(check)


def without_arrays(part):
    def damage(checkpoints):
        for path in (checkpoints / "6" / part).rglob("*"):
            if path.is_file() and path.parent.name == "d":
                path.unlink()

    return damage


def only(*kept):
    """The newest step with these of its entries alone, as when it was deleted half."""

    def damage(checkpoints):
        for path in (checkpoints / "6").iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def half_written(checkpoints):
    temporary = checkpoints / "8.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints / "6", temporary)
    (temporary / "_CHECKPOINT_METADATA").unlink()


def stray(checkpoints):
    (checkpoints / "notes.txt").write_text("mine")
    (checkpoints / "lost+found").mkdir()
    (checkpoints / "6.bak").mkdir()


def copied_over(checkpoints):
    shutil.rmtree(checkpoints / "6")
    shutil.copytree(checkpoints / "4", checkpoints / "6")


# What lies in checkpoints/ of a run of steps 2, 4 and 6; where it must go on: at a step, or not at all (None). The
# first of them are tried by default.
LAYOUTS = {
    "the newest renamed": (lambda c: (c / "6").rename(c / "8"), {4, 6, None}),
    "no step at all, though metrics tell of some": (shutil.rmtree, {None}),
    "the newest with its description alone": (only("_CHECKPOINT_METADATA", "commit_success.txt"), {4}),
    "a temporary folder": (half_written, {6}),
    "an empty folder": (lambda c: (c / "8").mkdir(), {6}),
    "a folder with a marker alone": (
        lambda c: ((c / "8").mkdir(), (c / "8/commit_success.txt").write_text("")),
        {6},
    ),
    "a file instead of a step": (lambda c: (c / "8").write_text(""), {6, None}),
    "what others put there": (stray, {6}),
    "the newest without the arrays of params": (without_arrays("params"), {4}),
    "the newest without the arrays of train": (without_arrays("train"), {4}),
    "the newest with its arrays alone": (only("params", "train"), {4}),
    "the oldest half deleted": (lambda c: shutil.rmtree(c / "2" / "params"), {6}),
    "the newest linked as a later one": (lambda c: (c / "8").symlink_to(c / "6"), {6, None}),
    "an older one copied over the newest": (copied_over, {4, None}),
}


@row(2, few=5, full=len(LAYOUTS))
def test_half_deleted_empty_and_stray_folders_are_passed_over(trials, small_run, tmp_path):
    """Where the newest step is not what its name says, the run is refused or goes on from one that is."""

    def check(number):
        name, (damage, may_begin) = list(LAYOUTS.items())[number]
        with small_run.copy(tmp_path / str(number)) as workdir:
            damage(workdir / "checkpoints")
            found = small_run.restart(workdir)
            left = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
        small_run.check_never_wrong(found)
        assert found.step in may_begin, f"{name}: goes on from step {found.step}\n{found.said}"
        assert not left, f"{name}: {left} stays"
        return name

    trials.each(check)


def test_damages_are_what_they_say():
    """One byte, a page, an array: no more than that."""
    import numpy as np

    random, data = np.random.default_rng(0), np.arange(3 * damages.PAGE, dtype=np.uint32).view(np.uint8)
    for kind, most in {"one bit": 1, "one byte": 1, "two bits": 2, "a burst": damages.LINE}.items():
        for _ in range(20):
            after = data.copy()
            OF_FILES[kind](after, random)
            assert (after != data).sum() <= most, kind
    for kind in ("a zeroed page", "a page of noise"):
        after = data.copy()
        OF_FILES[kind](after, random)
        (changed,) = np.nonzero(after != data)
        assert 0 < changed.max() - changed.min() < damages.PAGE, kind
    floats = np.linspace(1, 2, 64, dtype=np.float32)
    damages.negate(floats.view(np.uint8), 4, random)
    np.testing.assert_array_equal(floats, -np.linspace(1, 2, 64, dtype=np.float32))
