"""What happens to a run is a line each, also while its disk is full and after a process was killed."""

import json

from lmm_jax.training import events
from lmm_jax.training.events import Events, read_events, saved_step


def test_a_line_says_when_what_and_at_which_step(tmp_path):
    happened = Events(tmp_path)
    happened.add(events.STARTED, 0, steps=10)
    happened.add(events.SAVED, 5)
    Events(tmp_path, active=False).add(events.SAVED, 9)
    rows = read_events(tmp_path)
    assert [(row["event"], row["step"]) for row in rows] == [("started", 0), ("saved", 5)]
    assert rows[0]["steps"] == 10 and rows[0]["time"].startswith("20")
    assert saved_step(tmp_path) == 5


def test_there_may_be_none_and_what_is_no_event_is_passed_over(tmp_path):
    assert read_events(tmp_path) == [] and saved_step(tmp_path) == 0
    lines = [
        '{"event": "saved", "step": 3}',
        "[]",
        '{"event": 4}',
        '{"event": "saved", "step": "7"}',
        '{"event": "sav',
    ]
    (tmp_path / events.NAME).write_text("\n".join(lines))
    assert saved_step(tmp_path) == 3
    Events(tmp_path).add(events.SAVED, 4)  # behind half a line of a process that was killed
    assert (
        saved_step(tmp_path) == 4 and json.loads((tmp_path / events.NAME).read_text().splitlines()[-1])["step"] == 4
    )


def test_what_was_saved_beyond_a_step_that_a_run_went_on_from_does_not_count(tmp_path):
    happened = Events(tmp_path)
    for event, step in (("saved", 20), ("saved", 60), ("fell_back", 40), ("continued", 40)):
        happened.add(event, step)
    assert saved_step(tmp_path) == 40
    happened.add(events.SAVED, 50)
    assert saved_step(tmp_path) == 50
    happened.add(events.STARTED, 0)
    assert saved_step(tmp_path) == 0
