"""Losses that are no numbers, and spikes: skipped, counted and named exactly, never applied."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.events import read_events
from lmm_jax.training.metrics import read_metrics
from lmm_jax.training.state import abstract_state, make_program
from lmm_jax.training.step import is_spike, jit_train_step
from tests.faults.poison import changed_after, poisoned
from tests.faults.rows import row

LENGTH = 60


def last_state(config, workdir):
    """The train state of the newest step of a workdir, on the host."""
    state, _ = Checkpoints(workdir).restore(abstract_state(make_program(config)))
    return jax.device_get(state)


@pytest.fixture(scope="module")
def by_hand(setup):
    """`by_hand(bad)`: the state after `LENGTH` steps of which those in `bad` were left out, without our skipping."""
    s = setup(8, f"train.steps={LENGTH}")
    batches = [s.host_batch(i) for i in range(LENGTH)]
    nothing, first = {"poison": np.zeros(len(batches[0]["segment"]), np.float32)}, s.state

    def run(bad):
        with poisoned({}), s.program.use():  # the same program, to the bit
            take_step = jit_train_step(s.program)
            state, in_row = jax.tree.map(jnp.copy, first), 0
            for step, batch in enumerate(batches, start=1):
                if step in bad:
                    in_row += 1
                    state = state.replace(step=state.step + 1, skipped=state.skipped + 1)
                else:
                    in_row = 0
                    state, _ = take_step(state, s.place(batch | nothing))
        return jax.device_get(state.replace(skipped_in_row=jnp.asarray(in_row, jnp.int32)))

    return run


@row(22, few=0, full=8)
def test_updates_that_are_no_numbers_are_never_applied(trials, tiny, by_hand, tmp_path):
    """Fifty or so such steps over the trials, in any pattern: the state is that of a run that left them out."""

    def check(number):
        random = trials.random(number)
        bad = set(map(int, random.choice(np.arange(1, LENGTH + 1), size=6 + number % 3, replace=False)))
        values = {step: random.choice([np.nan, np.inf, -np.inf]) for step in bad}
        config = tiny(f"train.steps={LENGTH}", "train.log_every=7", "train.save_every=25")
        workdir = tmp_path / str(number)
        with poisoned(values):
            lmm.train(config, workdir)
        jax.tree.map(np.testing.assert_array_equal, last_state(config, workdir), by_hand(bad))
        rows = [row for row in read_events(workdir) if row["event"] == "not_finite"]
        assert {row["step"] for row in rows} == bad
        assert all(len(row["records"]) == 8 for row in rows)  # 8 packs of a record each
        assert read_metrics(workdir)[-1]["skipped"] == len(bad)
        shutil.rmtree(workdir)
        return f"{len(bad)} steps"

    trials.each(check)


@row(22, few=0, full=12)
def test_a_run_stops_at_exactly_so_many_skipped_updates_in_a_row(trials, tiny, tmp_path):
    """Whatever `log_every` is; the updates before are saved, and the same command goes on behind."""

    def check(number):
        random = trials.random(number)
        limit, log_every = int(random.integers(2, 6)), int(random.choice([1, 3, 5, 50]))
        before, start = int(random.integers(0, 4)), int(random.integers(5, 12))
        values = {step: np.nan for step in (*range(2, 2 + limit - 1), *range(start + limit, start + 3 * limit))}
        config = tiny(
            "train.steps=40",
            f"train.log_every={log_every}",
            f"train.save_every={100 if before else 3}",
            f"train.max_skipped={limit}",
        )
        workdir, stop = tmp_path / str(number), start + 2 * limit - 1
        with poisoned(values), pytest.raises(FloatingPointError) as raised:
            lmm.train(config, workdir)
        words = f"in the last {limit} steps, up to step {stop}; "
        assert words in str(raised.value), raised.value
        assert "which is sound, is saved" in str(raised.value)
        state = last_state(config, workdir)
        made = start + limit - 1  # the step of the last update
        assert made <= int(state.step) <= stop
        assert int(state.step) - int(state.skipped) == made - (limit - 1)
        # Again, with the fault still there: no new checkpoint, which would look like progress.
        first = int(state.step) + 1
        if int(state.step) == stop:
            again = {step: np.nan for step in range(first, first + limit)}
            with poisoned(again, first), pytest.raises(FloatingPointError, match=f"up to step {stop + limit}; "):
                lmm.train(config, workdir)
            assert int(last_state(config, workdir).step) == stop
        assert lmm.train(config, workdir)["step"] == 40
        shutil.rmtree(workdir)

    trials.each(check)


@row(22, few=0, full=3)
def test_parameters_that_are_no_numbers_are_never_saved(trials, tiny, tmp_path):
    """As when an update that is finite overflows: the run ends before the save, and its newest step is sound."""

    def check(number):
        config = tiny("train.steps=12", "train.save_every=4")
        workdir, when = tmp_path / str(number), 5 + number

        def overflow(leaves):
            leaves[number] = leaves[number] * np.inf

        wrong = pytest.raises(FloatingPointError, match="are not finite after step 8, such as|up to step")
        with changed_after(when, overflow), wrong:
            lmm.train(config, workdir)
        state = last_state(config, workdir)
        assert int(state.step) == 4
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
        shutil.rmtree(workdir)

    trials.each(check)


@row(23, few=1, full=5)
def test_spikes_are_skipped_and_named_and_nothing_else_is(trials, tiny, tmp_path):
    """Twenty spikes a trial, after the window is full; but for the first trial over a restart, as it is saved too."""

    def check(number):
        random = trials.random(number)
        steps, least = (240 if number else 170), 131
        spikes = set(map(int, random.choice(np.arange(least, steps), size=20, replace=False)))
        values = {step: float(random.uniform(20, 60)) for step in spikes}
        config = tiny("train.skip_spikes=True", "train.save_every=1000", "train.max_skipped=20", "train.steps=150")
        workdir = tmp_path / str(number)
        with poisoned(values):
            lmm.train(config, workdir)
        with poisoned(values, 151):
            lmm.train(tiny("train.skip_spikes=True", f"train.steps={steps}", "train.max_skipped=20"), workdir)
        found = {row["step"] for row in read_events(workdir) if row["event"] == "spike"}
        assert found == spikes, f"{sorted(spikes - found)} not skipped, {sorted(found - spikes)} without need"
        shutil.rmtree(workdir)

    trials.each(check)


@row(23, few=0, full=5)
def test_a_clean_run_has_no_false_alarm(trials, tiny, tmp_path):
    """A thousand steps in all by `--faults`."""

    def check(number):
        config = tiny("train.skip_spikes=True", "train.steps=200", "train.save_every=1000", f"seed={number}")
        workdir = tmp_path / str(number)
        lmm.train(config, workdir)
        assert not [row for row in read_events(workdir) if row["event"] == "spike"]
        shutil.rmtree(workdir)

    trials.each(check)


def test_what_counts_as_a_spike():
    recent = jnp.asarray(np.random.default_rng(0).normal(2.0, 0.1, 128), jnp.float32)
    mean, sigma = float(recent.mean()), float(recent.std())
    assert not is_spike(mean + 5.9 * sigma, recent, 128) and is_spike(mean + 6.1 * sigma, recent, 128)
    assert not is_spike(1e9, recent, 127)  # the window is not full
    assert not is_spike(mean - 100 * sigma, recent, 1000)
    even = jnp.full(128, 2.0)
    assert not is_spike(2.1, even, 128) and is_spike(2.13, even, 128)  # 6 times a hundredth of the mean
