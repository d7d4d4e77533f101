"""The train state before its first step: complete, the same on every mesh, and as it was planned."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from lmm_jax import sharding
from lmm_jax.data.pipeline import HOST_ONLY
from lmm_jax.training.state import abstract_params, abstract_state, init_state, make_program
from tests.opened import open_packs

SHARDED = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
FROZEN = 'optimizer.groups=(("vision", 0.0),)'


def shapes(params):
    return {path: (x.shape, x.dtype) for path, x in flatten_dict(params, sep="/").items()}


@pytest.mark.parametrize("recipe", ["m3", "deepstack", "hybrid", "qwen3vl_style"])
def test_the_smallest_batch_touches_every_parameter_of_a_real_one(tiny, recipe):
    config = tiny(recipe=recipe)
    program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    pack = open_packs(config, "train", config.train.batch_size, shuffle=True)[0]
    batch = {name: x[None] for name, x in pack.items() if name not in HOST_ONLY}
    init = functools.partial(program.model.init, method=lambda m, b: m.logits(m(b)))
    assert shapes(nn.unbox(program.boxed)) == shapes(
        nn.unbox(jax.eval_shape(init, jax.random.key(0), batch)["params"])
    )


def test_the_first_values_are_the_same_on_any_mesh(setup):
    one, many = setup(1).state, setup(8, *SHARDED).program
    found = init_state(many)
    sharding.assert_sharded(found, many.shardings, "first state")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(found))


def test_seeds_give_other_kernels(setup, tiny):
    first = flatten_dict(setup(1).state.params, sep="/")
    program = make_program(tiny("seed=1"), sharding.make_mesh({}, jax.devices()[:1]))
    for path, x in flatten_dict(init_state(program).params, sep="/").items():
        assert np.array_equal(x, first[path]) == ("kernel" not in path and np.ptp(first[path]) == 0), path


def test_the_plan_tells_shapes_types_and_places(setup):
    s = setup(8, *SHARDED)
    planned = abstract_state(s.program)
    jax.tree.map(lambda p, x: np.testing.assert_equal((p.shape, p.dtype), (x.shape, x.dtype)), planned, s.state)
    sharding.assert_sharded(s.state, jax.tree.map(lambda p: p.sharding, planned), "first state")
    half = abstract_params(s.program, "bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}
    assert jax.tree.map(lambda x: x.sharding, half) == s.program.shardings.params


def test_what_is_frozen_has_no_optimizer_state(tiny):
    program = make_program(tiny(FROZEN, *SHARDED))
    planned = abstract_state(program)
    trained = {path for path in flatten_dict(planned.params, sep="/") if not path.startswith("vision/")}
    assert {path for path, rate in program.rates.items() if rate} == trained
    large = [x for x in jax.tree.leaves(planned.opt_state) if x.ndim]
    assert len(large) == 2 * len([x for x in map(flatten_dict(planned.params, sep="/").get, trained) if x.ndim])
