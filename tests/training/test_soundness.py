"""States that must not be saved are named: numbers that are none, and copies that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import errors
from lmm_jax.training.soundness import Corrupted, check_finite, check_replicas


@pytest.fixture(scope="module")
def state(setup):
    """Over two copies of the model on four devices each."""
    return setup(8, "mesh.data=2", "mesh.fsdp=4").state


def with_leaf(state, path, change):
    flat = flatten_dict(state.params, sep="/")
    return state.replace(params=unflatten_dict(flat | {path: change(flat[path])}, sep="/"))


def on_one_device(number, change):
    """A function that changes what one device holds of an array, and nothing that the others hold."""

    def changed(x):
        pieces = [np.array(shard.data) for shard in x.addressable_shards]
        pieces[number] = change(pieces[number])
        placed = [jax.device_put(p, s.device) for p, s in zip(pieces, x.addressable_shards, strict=True)]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)

    return changed


def flip_a_bit(x):
    x.reshape(-1).view(np.uint32)[-1] ^= 1
    return x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_parameter_that_is_no_number_is_named(state, value):
    check_finite(state)
    bad = with_leaf(state, "decoder/norm/scale", lambda x: x.at[3].set(value))
    with pytest.raises(FloatingPointError, match="1 parameters are not finite after step 0, such as decoder/norm"):
        check_finite(bad)


@pytest.mark.parametrize("path", ["decoder/norm/scale", "decoder/table"])
@pytest.mark.parametrize("device", [0, 5])
def test_a_copy_that_differs_is_named_with_its_device(state, path, device):
    """A leaf that every device holds whole, and one that is shared out over four."""
    check_replicas(state)
    bad = with_leaf(state, path, on_one_device(device, flip_a_bit))
    with pytest.raises(Corrupted, match=rf"devices hold params/{path} .*devices .*\b{device}\b") as raised:
        check_replicas(bad)
    assert errors.explain(raised.value)[1] == 1


def test_the_optimizer_s_copies_count_too(state):
    count = jax.tree.leaves(state.opt_state)[0]
    changed = on_one_device(7, lambda x: x + 1)(count)
    leaves, structure = jax.tree.flatten(state.opt_state)
    with pytest.raises(Corrupted, match="opt_state"):
        check_replicas(state.replace(opt_state=jax.tree.unflatten(structure, [changed, *leaves[1:]])))


def test_what_no_two_devices_share_is_not_compared(setup):
    check_replicas(setup(1).state)
    check_replicas(jax.tree.map(jnp.asarray, setup(1).state))
