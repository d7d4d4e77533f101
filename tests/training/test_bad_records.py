"""Faults are written down, and too many stop the run, exactly at the limit."""

import json

import numpy as np
import pytest

from lmm_jax.training import bad_records as ledger_lib
from lmm_jax.training.bad_records import BadData, Ledger


def faults(n):
    return [{"position": i, "file": "data", "row": i, "id": f"r{i}", "reason": "broken"} for i in range(n)]


def add(ledger, flags):
    flags = np.array(flags, bool)
    ledger.add(flags, faults(int(flags.sum())))


def test_every_fault_is_a_line(tmp_path):
    ledger = Ledger(tmp_path, max_share=0.5, max_run=3)
    add(ledger, [0, 1, 0, 1])
    add(ledger, [0, 0])
    add(ledger, [1])
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert len(lines) == 3 == ledger.bad and ledger.seen == 7
    assert lines[0] == faults(1)[0]


def test_the_run_stops_at_so_many_in_a_row_over_batches(tmp_path):
    ledger = Ledger(tmp_path, max_share=1.0, max_run=3)
    add(ledger, [0, 1, 1])
    add(ledger, [0, 1])
    add(ledger, [1, 0])
    add(ledger, [1, 1])
    with pytest.raises(BadData, match=r"3 records one after another .* data row 0: broken; all are in .*ledger"):
        add(ledger, [1])


def test_the_share_counts_from_a_least_number_of_records(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_lib, "LEAST", 100)
    ledger = Ledger(tmp_path, max_share=0.02, max_run=10)
    add(ledger, [1, 0, 1, 0])
    with pytest.raises(BadData, match="3 of 8 records"):
        add(ledger, [1, 0, 0, 0])
    late = Ledger(tmp_path / "..", max_share=0.02, max_run=10)
    add(late, [0] * 400)
    add(late, [1, 0] * 8)
    with pytest.raises(BadData, match="9 of 418 records"):
        add(late, [1, 0])
