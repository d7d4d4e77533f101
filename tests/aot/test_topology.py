"""Slices are named by their chips."""

import math

import pytest

from lmm_jax.aot import topology
from lmm_jax.config import ConfigError


@pytest.mark.parametrize(
    ("name", "grid", "accelerator"),
    [
        ("v5e-16", "v5e:4x4", "v5litepod-16"),
        ("v5e-64", "v5e:8x8", "v5litepod-64"),
        ("v6e-256", "v6e:16x16", "v6e-256"),
        ("v5p-64", "v5p:4x4x4", "v5p-128"),  # the cloud counts cores
        ("v5p-128", "v5p:4x4x8", "v5p-256"),
        ("tpu7x-64", "tpu7x:4x4x4", "tpu7x-128"),
        ("2xv5e-64", "v5e:8x8", "v5litepod-64"),  # each of two
        ("4xtpu7x-64", "tpu7x:4x4x4", "tpu7x-128"),
    ],
)
def test_slices_are_named_by_chips(name, grid, accelerator):
    found = topology.find_slice(name)
    assert (found.name, found.grid, found.accelerator) == (name, grid, accelerator)
    chips = math.prod(int(side) for side in grid.split(":")[1].split("x"))
    times = int(name[0]) if name[1] == "x" else 1
    assert chips == int(name.split("-")[1]) and found.devices == times * chips * (2 if "tpu7x" in name else 1)


def test_an_unknown_slice_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"'v5e-17' does not exist; choose from v5e-4, v5e-8, v5e-16"):
        topology.find_slice("v5e-17")
