"""The stream is a function of the position: on any number of hosts, from any step."""

import dataclasses

import numpy as np
import pytest

from lmm_jax.data.pipeline import Packs, batches


@pytest.fixture(scope="module")
def packs(tiny):
    return Packs(tiny(), "train", packs_per_step=8, shuffle=True)


def stream(packs, hosts, start, stop, **kwargs):
    """Global batches put together from the parts of `hosts` hosts, each a contiguous block of packs."""
    parts = [np.arange(8).reshape(hosts, -1)[h] for h in range(hosts)]
    options = {"threads": 1, "workers": 0, **kwargs}
    hosts = [batches(packs, part, start, stop, **options) for part in parts]
    return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in zip(*hosts, strict=True)]


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
    records = [packs[p]["record_index"] for p in range(128)]
    assert sorted(records[:64]) == sorted(records[64:]) == list(range(64))
    assert records[:64] != records[64:] and records[:64] != list(range(64))


def test_seeds_differ(tiny, packs):
    other = Packs(tiny("seed=1"), "train", packs_per_step=8, shuffle=True)
    assert [other[p]["record_index"] for p in range(16)] != [packs[p]["record_index"] for p in range(16)]


def test_scales_rotate_by_step(packs):
    groups = [np.bitwise_or.reduce(packs[8 * step]["group"]) for step in range(4)]
    assert groups == [0b0101, 0b1010, 0b0101, 0b1010]


def test_a_pack_that_does_not_fit_names_its_record(tiny):
    small = Packs(tiny("data.length=64"), "train", packs_per_step=8, shuffle=False)
    with pytest.raises(ValueError, match=r"data \(train\), row \d+, id train-\d+: .*raise data\.length"):
        for p in range(8, 16):
            small[p]


def test_a_conversation_is_cut_at_the_same_turn_at_every_scale(tiny):
    packs = Packs(tiny("data.too_long=cut"), "train", packs_per_step=8, shuffle=False)
    layout, tokenizer = packs.layout, packs.data.tokenizer
    turns = [("user", "<image>\ndigit at b2?"), ("assistant", "7"), *[("user", "and?"), ("assistant", "no")] * 40]
    fitting = layout.training_segments(turns[:4], 1, tokenizer, layout.scales)
    room = max(len(segment) for segment in fitting)
    cut = dataclasses.replace(layout, length=room).training_segments(turns, 1, tokenizer, layout.scales)
    for a, b in zip(cut, fitting, strict=True):
        np.testing.assert_array_equal(a.id, b.id)
        np.testing.assert_array_equal(a.target, b.target)
    with pytest.raises(ValueError, match="raise data.length or set data.too_long=cut"):
        dataclasses.replace(layout, length=room, too_long="refuse").training_segments(turns, 1, tokenizer, (1,))
    with pytest.raises(ValueError, match="no supervised token"):
        layout.training_segments(turns[:1], 1, tokenizer, layout.scales)
