"""Records that cannot be read: the run stops exactly at its limits, however often it was started again."""

import numpy as np
import pytest

from lmm_jax.training import bad_records as bad_records_lib
from lmm_jax.training.bad_records import BadData, BadRecords
from tests.faults.rows import row

LEAST = 50


def first_over(flags, share, run):
    """The number of the record at which a limit is passed, told record by record; None if none is."""
    bad = in_row = 0
    for number, flag in enumerate(flags, start=1):
        bad, in_row = bad + flag, in_row + 1 if flag else 0
        if in_row >= run:
            return number
        if bad > share * max(number, LEAST):
            return number
    return None


@row(20, few=50, full=1000)
def test_the_limits_are_exact_over_restarts(trials, tmp_path, monkeypatch):
    """A run that is started again after each few batches stops at the batch that one without a restart stops at."""
    monkeypatch.setattr(bad_records_lib, "LEAST", LEAST)

    def check(number):
        random = trials.random(number)
        share, run = float(random.choice([0.02, 0.1, 0.3])), int(random.integers(2, 9))
        flags = random.random(400) < random.choice([0.0, 0.01, 0.08, 0.3])
        ends = np.unique(random.integers(1, len(flags), size=40))
        over, before = first_over(flags, share, run), None
        counted = BadRecords(tmp_path / f"{number}", share, run)
        (tmp_path / f"{number}").mkdir()
        stopped = None
        for begin, end in zip([0, *ends], [*ends, len(flags)], strict=True):
            if random.random() < 0.3:
                before = counted.total()
                counted = BadRecords(tmp_path / f"{number}", share, run, before)
            batch = flags[begin:end]
            faults = [{"file": "data", "record": int(i), "reason": "broken"} for i in np.flatnonzero(batch)]
            try:
                counted.add(batch, faults)
            except BadData:
                stopped = (begin, end)
                break
        # The share is looked at behind each batch, a run of bad records wherever it ends.
        assert over is None or stopped is not None or not _share_at_ends(flags, share, run, ends)
        if stopped:
            assert over is not None and over <= stopped[1]
        assert bool(stopped) == _share_at_ends(flags, share, run, ends)
        return "stopped" if stopped else "went on"

    trials.each(check)


def _share_at_ends(flags, share, run, ends):
    """Whether a limit is passed where it is looked at."""
    in_row = 0
    for flag in flags:
        in_row = in_row + 1 if flag else 0
        if in_row >= run:
            return True
    totals = np.cumsum(flags)
    return any(totals[end - 1] > share * max(end, LEAST) for end in [*ends, len(flags)])


def test_the_counters_of_several_hosts_are_shared_out_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_records_lib.jax, "process_count", lambda: 3)
    parts = []
    for host in range(3):
        monkeypatch.setattr(bad_records_lib.jax, "process_index", lambda host=host: host)
        parts.append(BadRecords(tmp_path, 0.1, 5, {"seen": 1001, "bad": 7, "run": 2}))
    assert [part.seen for part in parts] == [334, 334, 333] and sum(part.bad for part in parts) == 7


@pytest.mark.parametrize("over", [0, 1])
def test_a_run_that_was_started_again_remembers(tmp_path, monkeypatch, over):
    """Seven and seven bad records against a limit of fourteen and thirteen."""
    monkeypatch.setattr(bad_records_lib, "LEAST", 1000)
    limit = (14 - over) / 1000
    faults = [{"file": "data", "record": i, "reason": "broken"} for i in range(7)]
    flags = np.array([True, False] * 7)
    first = BadRecords(tmp_path, limit, 32)
    first.add(flags, faults)
    second = BadRecords(tmp_path, limit, 32, first.total())
    if over:
        with pytest.raises(BadData, match="14 of 28 records"):
            second.add(flags, faults)
    else:
        second.add(flags, faults)
