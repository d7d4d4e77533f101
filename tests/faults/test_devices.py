"""A device that holds something else than the others, and a host that is slow: both are found and named."""

import re
import shutil

import jax
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.events import read_events
from lmm_jax.training.soundness import Corrupted
from lmm_jax.training.state import abstract_state, make_program
from tests.faults.poison import changed_after
from tests.faults.rows import row
from tests.training.test_hosts import Pod


def with_a_flipped_bit(x, random):
    """An array of which one device holds another bit than the others."""
    pieces = [np.array(shard.data) for shard in x.addressable_shards]
    device = random.integers(len(pieces))
    bits = pieces[device].reshape(-1).view(np.uint32)
    bits[random.integers(bits.size)] ^= np.uint32(1) << np.uint32(
        random.integers(23)
    )  # of the mantissa: it stays finite
    placed = [jax.device_put(p, s.device) for p, s in zip(pieces, x.addressable_shards, strict=True)]
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed), device


@row(29, few=1, full=20)
def test_one_flipped_bit_of_one_device_is_found_before_it_is_saved(trials, tiny, tmp_path):
    """Of eight with a copy each; within `train.compare_every` steps, or before the next save.

    The run goes on from the step before.
    """

    def check(number):
        random = trials.random(number)
        when, every = int(random.integers(5, 9)), int(random.choice([0, 2, 3]))
        config = tiny("train.steps=12", "train.save_every=4", f"train.compare_every={every}")
        workdir, where = tmp_path / str(number), []

        def corrupt(leaves):
            leaf = random.integers(len(leaves))
            leaves[leaf], device = with_a_flipped_bit(leaves[leaf], random)
            where.append(device)

        wrong = pytest.raises(Corrupted, match=r"devices hold .* in different versions")
        with changed_after(when, corrupt), wrong as raised:
            lmm.train(config, workdir)
        found = int(re.search(r"after step (\d+):", str(raised.value))[1])
        looks = {8, 12, *(range(every, 13, every) if every else ())}
        assert found == min(look for look in looks if look >= when)
        assert str(where[0]) in str(raised.value)
        state, _ = Checkpoints(workdir).restore(abstract_state(make_program(config)))
        assert int(state.step) == max(step for step in (4, 8) if step < when or step == 4)
        assert "failed" in {row["event"] for row in read_events(workdir)}
        shutil.rmtree(workdir)

    trials.each(check)


@row(30, few=0, full=10)
def test_a_host_that_is_slow_is_named_within_twenty_steps(trials, tiny_args, tmp_path):
    """One of two waits for its data: an hour of a pod is what the slowest makes of it."""

    def check(number):
        slow, workdir = number % 2, tmp_path / str(number)
        more = ("--config.train.steps=10", "--config.train.log_every=5", "--config.train.save_every=100")
        pod = Pod(
            tmp_path / f"pod_{number}", 2, "train", *tiny_args, *more, "--workdir", workdir, SLOW_HOST=str(slow)
        )
        assert set(pod.codes(240).values()) == {0}, pod.said(0)
        words = [row["words"] for row in read_events(workdir) if row["event"] == "slow_host"]
        assert words and all(f"host {slow} waits for its data" in line for line in words), words
        assert f"host {slow} waits for its data" in pod.said(0)

    trials.each(check)
