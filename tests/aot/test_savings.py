"""What options that store less save, as a table and as the state that a run really has."""

import jax
import pytest

from lmm_jax import sharding
from lmm_jax.aot.report import _savings
from lmm_jax.aot.savings import options, savings
from lmm_jax.training import memory
from lmm_jax.training.state import abstract_state, make_program

WIDE = ("model.decoder.width=256", "model.decoder.mlp_dim=256", "model.dtype=bfloat16")  # wide enough to be factored
MESH = ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")


@pytest.fixture(scope="module")
def rows(tiny):
    config = tiny(*WIDE, *MESH, "init.from=elsewhere")
    return config, {row["name"]: row for row in savings(config, sharding.make_mesh(config.mesh))}


def test_each_option_stores_less_than_all(rows):
    config, found = rows
    assert list(found) == list(options(config))
    whole, half, factored, both, lora, lora_half = (row["state_bytes"] for row in found.values())
    assert both < factored < whole and both < half < whole and lora_half < lora < whole
    params = sum(x.size for x in jax.tree.leaves(make_program(config).boxed))
    sizes = [row["checkpoint_bytes"] for row in found.values()]
    assert sizes[0] == pytest.approx(12 * params, rel=0.01) and sizes[1] == pytest.approx(8 * params, rel=0.01)
    assert sizes[4] == sizes[5] == pytest.approx(12 * found["LoRA of rank 32"]["trainable"], rel=0.01)
    words = "\n".join(_savings(list(found.values())))
    assert "LoRA of rank 32, frozen kernels in bfloat16" in words and "MiB" in words


@pytest.mark.parametrize("number", range(6))
def test_the_table_is_what_a_run_plans_and_every_moment_has_its_sharding(rows, tiny, number):
    config, found = rows
    name, fields = list(options(config).items())[number]
    program = make_program(tiny(*WIDE, *MESH, *(f"{field}={value}" for field, value in fields.items())))
    state, row = abstract_state(program), found[name]
    taken = memory.of_training(program)
    held = row["state_bytes"] + row["gradient_bytes"]
    assert taken.needed == pytest.approx(8 * held, rel=1e-3)  # and counters
    large = [x for x in jax.tree.leaves(state.opt_state) if x.size > sharding.SMALL]
    assert all(not x.sharding.is_fully_replicated for x in large)
