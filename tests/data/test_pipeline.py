"""The stream is a function of the position: on any number of hosts, from any step."""

import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest

from lmm_jax.config import ConfigError
from lmm_jax.data.pipeline import batches
from lmm_jax.data.prepared import Prepared
from tests.opened import open_packs

DEVICE = ("id", "position", "segment", "slot", "target_at", "target", "group", "pixels")


@pytest.fixture(scope="module")
def packs(tiny):
    return open_packs(tiny(), "train", packs_per_step=8, shuffle=True)


def stream(packs, hosts, start, stop, **kwargs):
    """Global batches put together from the parts of `hosts` hosts, each a contiguous block of packs."""
    parts = [np.arange(8).reshape(hosts, -1)[h] for h in range(hosts)]
    options = {"threads": 1, "workers": 0, **kwargs}
    hosts = [batches(packs, part, start, stop, **options) for part in parts]
    return [joined(step) for step in zip(*hosts, strict=True)]


def joined(parts):
    most = max(p["bad"].shape[1] for p in parts)
    fill = {"record_index": -1, "bad": False}
    batch = {name: np.concatenate([p[name] for p in parts]) for name in parts[0] if name in DEVICE}
    for name, value in fill.items():
        wide = [np.pad(p[name], ((0, 0), (0, most - p[name].shape[1])), constant_values=value) for p in parts]
        batch[name] = np.concatenate(wide)
    return batch | {"faults": [fault for p in parts for fault in p["faults"]]}


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name])


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(packs, hosts):
    assert_same(stream(packs, 1, 0, 4), stream(packs, hosts, 0, 4))


def test_a_stream_continues_from_any_step(packs):
    whole = stream(packs, 1, 0, 12)
    for start in (1, 7, 11):
        assert_same(whole[start:], stream(packs, 2, start, 12))


def test_reader_threads_change_nothing(packs):
    assert_same(stream(packs, 1, 3, 6), stream(packs, 1, 3, 6, threads=4))


def test_an_epoch_is_a_permutation_and_the_next_one_another(packs):
    records = [int(packs[p]["record_index"][0]) for p in range(128)]
    assert sorted(records[:64]) == sorted(records[64:]) == list(range(64))
    assert records[:64] != records[64:] and records[:64] != list(range(64))


def test_seeds_differ(tiny, packs):
    other = open_packs(tiny("seed=1"), "train", packs_per_step=8, shuffle=True)
    assert [other.members(p) for p in range(16)] != [packs.members(p) for p in range(16)]


def test_scales_rotate_by_step(packs):
    groups = [np.bitwise_or.reduce(packs[8 * step]["group"]) for step in range(4)]
    assert groups == [0b0101, 0b1010, 0b0101, 0b1010]


def test_records_that_do_not_fit_are_left_out_and_named(tiny):
    small = open_packs(tiny("data.length=90", "data.max_left_out=1"), "train", packs_per_step=8, shuffle=True)
    lengths = [small.data[0].index["turn_tokens"][end - 1] for end in small.data[0].index["turn_offsets"][1:]]
    too_long = [record for record, n in enumerate(lengths) if n + 36 > 90 or n + 36 + n + 4 > 90]
    assert 0 < len(too_long) < 64 and small.left_out == [(0, record) for record in too_long]
    used = {record for p in range(64) for _, record in small.members(p)}
    assert used == set(range(64)) - set(too_long)
    assert small.name(0, 3).endswith("data (train) record 3")
    reasons = {(dataset, record): reason for dataset, record, reason in small.why_left_out()}
    assert sorted(reasons) == small.left_out
    copies = "its copies do not fit data.rows=1 rows of 90 positions"
    for record in too_long:
        alone = lengths[record] + 36 > 90
        assert reasons[0, record] == ("longer than data.length=90 positions" if alone else copies)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("data.length=20", "data.targets=20"),
            ["64 of 64 records cannot be used: 64 longer than data.length=20", "would hold 99 %"],
        ),
        (
            ("data.length=90",),
            ["more than a share of data.max_left_out=0.05", "data.rows=2 has a row", "1 trains on the"],
        ),
        (("data.targets=9",), ["more supervised tokens than data.targets=9", "would hold all supervised tokens"]),
        (("data.views=0",), ["64 more pictures than data.views=0 views hold", "data.views=1 would hold"]),
    ],
)
def test_too_much_left_out_is_refused_with_what_binds_and_what_would_hold_it(tiny, overrides, words):
    with pytest.raises(ValueError, match=r"data \(train\): \d+ of 64 records cannot be used") as error:
        open_packs(tiny(*overrides), "train", packs_per_step=8, shuffle=True)
    for part in words:
        assert part in str(error.value)
    length = re.search(r"data\.length=(\d+) would hold", str(error.value))
    if length:  # it does
        some = open_packs(tiny(f"data.length={length[1]}", "data.rows=4", "data.targets=200"), "train", 8, True)
        assert len(some.left_out) <= 0.01 * 64


def failing(monkeypatch, records):
    """Makes some records of the data unreadable."""
    read = Prepared.__getitem__

    def broken(self, record):
        if record in records:
            raise RuntimeError("Corrupted records file")
        return read(self, record)

    monkeypatch.setattr(Prepared, "__getitem__", broken)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_bad_record_is_replaced_and_moves_no_other(packs, monkeypatch, hosts):
    good = stream(packs, 1, 0, 8)
    failing(monkeypatch, records={5, 17, 40})
    bad = stream(packs, hosts, 0, 8)
    faults = [fault for batch in bad for fault in batch["faults"]]
    assert {fault["record"] for fault in faults} == {5, 17, 40}
    assert all("Corrupted" in f["reason"] and f["file"].endswith("data") and f["position"] < 64 for f in faults)
    for a, b in zip(good, bad, strict=True):
        np.testing.assert_array_equal(a["record_index"], b["record_index"])
        for pack in range(8):
            if a["record_index"][pack, 0] in (5, 17, 40):
                assert b["bad"][pack].all() and not b["group"][pack].any() and not b["pixels"][pack].any()
                np.testing.assert_array_equal(a["segment"][pack], b["segment"][pack])
            else:
                assert not b["bad"][pack].any()
                for name in DEVICE:
                    np.testing.assert_array_equal(a[name][pack], b[name][pack])


def test_a_fault_in_a_pack_leaves_its_neighbours_as_they_are(tiny, monkeypatch):
    packs = open_packs(
        tiny("data.rows=2", "data.length=256", "data.views=8", "data.targets=400"), "train", 2, shuffle=True
    )
    members = packs.members(1)
    victim = members[1][1]
    good = packs[1]
    failing(monkeypatch, records={victim})
    bad = packs[1]
    np.testing.assert_array_equal(bad["bad"], [record == victim for _, record in members])
    np.testing.assert_array_equal(good["position"], bad["position"])
    same = (good["id"] == bad["id"]) & (good["slot"] == bad["slot"])
    assert (~same).sum() > 0 and len(set(good["segment"][~same])) == 2  # its two copies
    kept = np.setdiff1d(np.arange(len(members)), [1])
    np.testing.assert_array_equal(good["pixels"][kept], bad["pixels"][kept])
    assert not bad["pixels"][1].any()
    # Its targets are gone; those that are left are the same.
    left = set(zip(bad["target_at"], bad["target"], bad["group"], strict=True))
    assert left < set(zip(good["target_at"], good["target"], good["group"], strict=True)) | {(0, 0, 0)}


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(packs, workers):
    assert_same(stream(packs, 1, 0, 5), stream(packs, 1, 0, 5, workers=workers))


def test_a_killed_worker_is_an_error_at_once_and_nothing_is_lost_after_a_restart(packs):
    whole = stream(packs, 1, 0, 40)
    iterator = batches(packs, np.arange(8), 0, 10_000, threads=1, workers=1)
    read = [next(iterator) for _ in range(3)]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        for _ in range(10_000):
            read.append(next(iterator))
    assert time.monotonic() - begin < 5
    done = min(len(read), 30)
    assert_same(whole[:done], [joined([batch]) for batch in read[:done]])
    assert_same(whole[done:], stream(packs, 1, done, 40))


def test_the_state_tells_streams_apart(tiny, packs):
    same = open_packs(tiny(), "train", packs_per_step=8, shuffle=True).state()
    assert json.loads(json.dumps(same)) == packs.state()
    for override in ("seed=1", "data.length=128", "train.scales_per_step=1"):
        assert open_packs(tiny(override), "train", packs_per_step=8, shuffle=True).state() != same


def test_several_datasets_are_numbered_on_and_must_agree(tiny, digits_folder, tmp_path):
    mixture = f"data.mixture=(('{digits_folder}', 1.0), ('{digits_folder}', 3.0))"
    config = tiny()
    with config.unlocked():
        config.data.path = None
        config.data.mixture = ((str(digits_folder), 1.0), (str(digits_folder), 3.0))
    packs = open_packs(config, "train", packs_per_step=8, shuffle=True)
    drawn = [packs.members(p)[0] for p in range(128)]
    assert [dataset for dataset, _ in drawn].count(1) == 96
    dataset, record = drawn[5]
    assert packs[5]["record_index"][0] == 64 * dataset + record
    with pytest.raises(ConfigError, match="data.path and data.mixture are both set"):
        tiny(mixture)
    with config.unlocked():
        config.data.template = "vicuna_v1"
    with pytest.raises(ValueError, match="was prepared with template 'qa'"):
        open_packs(config, "train", packs_per_step=8, shuffle=True)
