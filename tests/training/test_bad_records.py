"""Faults are written down, and too many stop the run, exactly at the limit."""

import json

import numpy as np
import pytest

from lmm_jax.training import bad_records as bad_records_lib
from lmm_jax.training.bad_records import BadData, BadRecords


def faults(n):
    return [{"position": i, "file": "data", "record": i, "id": f"r{i}", "reason": "broken"} for i in range(n)]


def add(bad_records, flags):
    flags = np.array(flags, bool)
    bad_records.add(flags, faults(int(flags.sum())))


def test_every_fault_is_a_line(tmp_path):
    bad_records = BadRecords(tmp_path, max_share=0.5, max_run=3)
    add(bad_records, [0, 1, 0, 1])
    add(bad_records, [0, 0])
    add(bad_records, [1])
    lines = [json.loads(line) for line in (tmp_path / "bad_records.jsonl").read_text().splitlines()]
    assert len(lines) == 3 == bad_records.bad and bad_records.seen == 7
    assert lines[0] == faults(1)[0]


def test_the_run_stops_at_so_many_in_a_row_over_batches(tmp_path):
    bad_records = BadRecords(tmp_path, max_share=1.0, max_run=3)
    add(bad_records, [0, 1, 1])
    add(bad_records, [0, 1])
    add(bad_records, [1, 0])
    add(bad_records, [1, 1])
    message = r"3 records one after another .* data record 0: broken; all are in .*bad_records"
    with pytest.raises(BadData, match=message):
        add(bad_records, [1])


def test_the_share_counts_from_a_least_number_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_records_lib, "LEAST", 100)
    bad_records = BadRecords(tmp_path, max_share=0.02, max_run=10)
    add(bad_records, [1, 0, 1, 0])
    with pytest.raises(BadData, match="3 of 8 records"):
        add(bad_records, [1, 0, 0, 0])
    late = BadRecords(tmp_path / "..", max_share=0.02, max_run=10)
    add(late, [0] * 400)
    add(late, [1, 0] * 8)
    with pytest.raises(BadData, match="9 of 418 records"):
        add(late, [1, 0])


def test_a_run_that_goes_on_under_a_lower_limit_ends_with_its_next_bad_record(tmp_path):
    """Or on fewer hosts, each of which had some bad ones of its own: there must be one to name."""
    before = {"seen": 8000, "bad": 40, "run": 4}
    for limits in ({"max_share": 0.001, "max_run": 50}, {"max_share": 1.0, "max_run": 3}):
        bad_records = BadRecords(tmp_path, before=before, **limits)
        bad_records.add(np.zeros(0, bool), [])
        add(bad_records, [])
        with pytest.raises(BadData, match="data record 0: broken"):
            add(bad_records, [1, 0])
