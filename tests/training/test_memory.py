"""What a run takes is counted from shapes and shardings, and held against what is free."""

import dataclasses
import math

import jax
import pytest

from lmm_jax import free_memory, sharding
from lmm_jax.config import ConfigError
from lmm_jax.training import memory
from lmm_jax.training.state import abstract_state, init_state, make_program

FROZEN = 'optimizer.groups=(("decoder", 0.0),)'


def nbytes(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("overrides", [(), (FROZEN,)])
def test_state_and_gradients_are_those_that_are_allocated(tiny, overrides):
    program = make_program(tiny(*overrides))
    state = init_state(program)
    found = memory.of_training(program)
    assert found.state == nbytes(state) and found.parameters == sum(x.size for x in jax.tree.leaves(state.params))
    held = sum(shard.data.nbytes for x in jax.tree.leaves(state) for shard in x.addressable_shards)
    trained = sum(
        shard.data.nbytes
        for path, x in jax.tree.leaves_with_path(state.params)
        if program.rates[jax.tree_util.keystr(path, simple=True, separator="/")]
        for shard in x.addressable_shards
    )
    assert found.needed == held + trained
    assert memory.of_params(program).state == nbytes(state.params)
    assert memory.of_params(program, "bfloat16").state == nbytes(state.params) / 2


def test_more_devices_hold_less_each(tiny, monkeypatch):
    """On accelerators it is a device that has to hold its share; here the devices share one host."""
    config = tiny("mesh.fsdp=8", "mesh.data=1", "model.decoder.width=256")
    whole = memory.of_training(make_program(config, sharding.make_mesh({}, jax.devices()[:1])))
    shared = memory.of_training(make_program(config))
    assert whole.state == shared.state and whole.state <= shared.needed < 2 * whole.needed


def test_what_cannot_fit_is_refused_with_the_fields_that_change_it(tiny, monkeypatch):
    program = make_program(tiny())
    needed = memory.of_training(program).needed
    monkeypatch.setattr(free_memory, "of_host", lambda: needed)
    assert memory.check_training(program).fits
    monkeypatch.setattr(free_memory, "of_host", lambda: needed - 1)
    with pytest.raises(
        ConfigError, match=r"parameters, .* GiB of state; this host \(cpu\) needs .*lmm compile"
    ) as error:
        memory.check_training(program)
    for field in ("model.decoder.width", "model.decoder.depth", "optimizer.groups", "mesh.fsdp"):
        assert field in str(error.value)
    monkeypatch.setattr(free_memory, "of_host", lambda: 1000)
    with pytest.raises(ValueError, match=r"this model cannot fit: .*lmm compile --step decode"):
        memory.check_params(program)
    monkeypatch.setattr(free_memory, "of_host", lambda: None)  # a system that does not say
    assert memory.check_training(program).fits and "of the unknown that" in str(memory.of_training(program))


def test_an_accelerator_s_memory_is_asked_of_the_device(tiny):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 100, "bytes_in_use": 30}

    assert free_memory.of_device(Device()) == 70
    assert free_memory.of_device(type("Silent", (), {"memory_stats": lambda self: None})()) is None
    found = dataclasses.replace(memory.of_training(make_program(tiny())), device=True, there=0, kind="TPU v5e")
    assert not found.fits and "a device (TPU v5e) needs at least" in str(found)


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 5\ninactive_file 300\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "CONTAINERS", [tuple(tmp_path / name for name in ("max", "current", "stat"))])
    assert free_memory.of_host() == free_memory._of_container() == 400
    (tmp_path / "max").write_text("max")
    assert free_memory._of_container() is None and free_memory.of_host() > 1000


def test_abstract_state_costs_nothing(tiny):
    """A model of trillions of parameters can be counted."""
    program = make_program(tiny("model.decoder.width=100000", "model.decoder.depth=1000"))
    assert memory.of_training(program).state == nbytes(abstract_state(program)) > 2**40
