"""Hosts that hold the others up are named, and no others."""

import numpy as np

from lmm_jax.training.pace import slow_hosts


def test_a_host_that_waits_for_its_data_is_named():
    found = np.array([[0.1, 0.2], [0.1, 0.2], [0.9, 0.2], [0.1, 0.2]])
    (words,) = slow_hosts(found, per_step=2.0)
    assert words == "host 2 waits for its data 0.9 s a step, the median host 0.1 s; a step takes 2 s"


def test_a_host_that_is_busy_with_other_things_is_named():
    (words,) = slow_hosts(np.array([[0.0, 0.1], [0.0, 0.8], [0.0, 0.1]]), per_step=1.0)
    assert words.startswith("host 1 works between two steps 0.8 s")


def test_small_and_common_differences_are_no_news():
    assert not slow_hosts(np.array([[0.001, 0.0], [0.004, 0.0]]), per_step=1.0)  # a share of the step that is small
    assert not slow_hosts(np.array([[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]]), per_step=1.0)
    assert not slow_hosts(np.array([[0.9, 0.9]]), per_step=1.0)
