"""Mesh, logical axes, and which host loads what."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmm_jax import sharding

RULES = {"batch": ("data", "fsdp"), "embed": "fsdp", "mlp": "tensor"}


def test_mesh_fills_one_axis_and_refuses_what_does_not_fit():
    assert dict(sharding.make_mesh({"fsdp": -1, "tensor": 2}).shape) == {
        "data": 1,
        "fsdp": 4,
        "tensor": 2,
        "context": 1,
    }
    with pytest.raises(ValueError, match="unknown mesh axes"):
        sharding.make_mesh({"fdsp": -1})
    with pytest.raises(ValueError, match="only one axis"):
        sharding.make_mesh({"fsdp": -1, "data": -1})
    with pytest.raises(ValueError, match="needs 3 devices, there are 8"):
        sharding.make_mesh({"fsdp": 3})


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_params_follow_the_rules():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    found = sharding.param_shardings({"a": boxed((64, 32), ("embed", "mlp"))}, mesh, RULES)
    assert found["a"].spec == P("fsdp", "tensor")


def test_large_params_that_do_not_divide_are_errors_and_small_ones_are_replicated():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert sharding.param_shardings({"a": boxed((9, 5), ("embed", "mlp"))}, mesh, RULES)["a"].spec == P(None, None)
    with pytest.raises(ValueError, match=r"parameter a .* axis 'embed' of size 1001 does not divide"):
        sharding.param_shardings({"a": boxed((1001, 256), ("embed", "mlp"))}, mesh, RULES)


def test_misspelt_axes_are_errors():
    mesh = sharding.make_mesh({"fsdp": -1})
    with pytest.raises(ValueError, match="unknown logical axis 'embde'"):
        sharding.param_shardings({"a": boxed((8, 8), ("embde", None))}, mesh, RULES)
    with pytest.raises(ValueError, match="unknown logical axis 'bach'"):
        sharding.constrain(jnp.zeros((8, 2)), "bach", None)
    with pytest.raises(ValueError, match="no mesh axis 'fdsp'"), sharding.use(mesh, {"embed": "fdsp"}):
        pass
    with pytest.raises(ValueError, match="names no logical axes"):
        sharding.param_shardings({"a": jax.ShapeDtypeStruct((8,), jnp.float32)}, mesh, RULES)


def test_constraints_shard_and_drop_what_does_not_divide():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    with sharding.use(mesh, RULES):
        assert sharding.platform() == "cpu"
        y = jax.jit(lambda x: sharding.constrain(x * 2, "batch", "mlp"))(jnp.zeros((8, 3)))
    assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P("fsdp", None)), 2)


def test_a_batch_goes_to_its_devices_and_back():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shape = (3, 8)
    packs = sharding.local_packs(mesh, RULES, shape)
    np.testing.assert_array_equal(packs, np.arange(24))
    x = np.arange(24 * 5).reshape(24, 5)
    placed = sharding.to_global({"x": x}, packs, mesh, RULES, shape)["x"]
    np.testing.assert_array_equal(placed, x.reshape(3, 8, 5))
    assert placed.sharding.shard_shape(placed.shape) == (3, 2, 5)
    with pytest.raises(ValueError, match="6 packs a micro-batch do not divide"):
        sharding.local_packs(mesh, RULES, (1, 6))


def test_a_leaf_on_one_device_is_noticed():
    mesh = sharding.make_mesh({"fsdp": -1})
    want = {"a": jax.sharding.NamedSharding(mesh, P("fsdp"))}
    sharding.assert_sharded({"a": jax.device_put(jnp.zeros(8), want["a"])}, want, "state")
    with pytest.raises(AssertionError, match="state: a"):
        sharding.assert_sharded({"a": jnp.zeros(8)}, want, "state")
