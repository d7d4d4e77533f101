"""Skipped steps are named one by one, exactly, though they are looked at later."""

import contextlib

import jax.numpy as jnp
import numpy as np

from lmm_jax.training.events import Events, read_events
from lmm_jax.training.outcomes import LAG, Outcomes


def feed(outcomes, flags, first=1):
    """Takes in steps that are skipped where a flag is set; returns the step at which it was known that all stops."""
    in_row = 0
    for step, bad in enumerate(flags, first):
        in_row = in_row + 1 if bad else 0
        metrics = {"finite": bad != "nan", "spike": bad == "spike", "skipped_in_row": in_row, "loss": 3.5}
        records = np.array([[10 * step, 10 * step + 1], [10 * step + 2, -1]])
        outcomes.add(step, records, {name: jnp.asarray(x) for name, x in metrics.items()})
        if outcomes.take():
            return step
    return 0


def test_every_skipped_step_is_named_with_its_records(tmp_path):
    lines = []
    outcomes = Outcomes(5, Events(tmp_path), lines.append)
    feed(outcomes, ["", "nan", "", "", "spike", "", ""])
    outcomes.take(all=True)
    assert [line.split(",")[0] for line in lines] == [
        "step 2: loss or gradient is not finite",
        "step 5: the loss",
    ]
    assert "records [20, 21, 22]" in lines[0] and "3.5, is a spike" in lines[1]
    assert [(row["event"], row["step"], row["records"]) for row in read_events(tmp_path)] == [
        ("not_finite", 2, [20, 21, 22]),
        ("spike", 5, [50, 51, 52]),
    ]


def test_each_step_that_is_waited_for_has_its_own_time(tmp_path):
    begun = []

    @contextlib.contextmanager
    def within(step):
        begun.append(step)
        yield

    outcomes = Outcomes(5, Events(tmp_path), lambda _: None, within)
    feed(outcomes, ["", "", "", ""])
    assert begun == [1, 2]
    outcomes.take(all=True)
    assert begun == [1, 2, 3, 4]


def test_it_stops_at_exactly_so_many_in_a_row(tmp_path):
    outcomes = Outcomes(3, Events(tmp_path), lambda _: None)
    known = feed(outcomes, ["nan", "nan", "", "nan", "nan", "nan", "nan", "nan", "nan"])
    assert outcomes.stopped == 6 and known == 6 + LAG and outcomes.in_row == 3
    assert "in the last 3 steps, up to step 6" in outcomes.words() and "records [60, 61, 62]" in outcomes.words()
    outcomes = Outcomes(3, Events(tmp_path), lambda _: None)
    assert not feed(outcomes, ["nan", "nan", "", "nan", "nan", ""]) and not outcomes.take(all=True)
