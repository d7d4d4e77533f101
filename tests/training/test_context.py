"""Rows shared out over the mesh's context axis: the loss and gradients of one device, in a part of its memory."""

import jax
import numpy as np
import pytest

from lmm_jax.training.optimizer import split
from lmm_jax.training.state import make_program
from lmm_jax.training.step import loss_and_grads

HD = (  # overview and tiles in the sequence with their doubles added, as configs/deepstack.py:recipe=hd
    "data.sequence=grid",
    "data.stacks=zoom",
    "data.zoom=2",
    "data.views=50",
    "data.length=224",
    "data.targets=80",
    "model.newline=True",
    "model.decoder.inject_layers=(0,1,2,3)",
)
TWO = ("data.views=10", "data.length=112", "data.targets=80")  # pictures in most rows
TWO_BY_FOUR = ("mesh.data=1", "mesh.fsdp=2", "mesh.context=4")


def loss_and_gradients(setup, devices, *overrides, recipe):
    """Of the first batch of a recipe, on so many devices."""
    s = setup(devices, *overrides, recipe=recipe)
    parts = split(s.state.params, s.program.rates)
    batch = s.host_batch(0)
    with s.program.use():
        run = jax.jit(loss_and_grads, static_argnums=0)
        return batch, run(s.program.model, *parts, s.place(batch))


@pytest.mark.parametrize(
    ("recipe", "overrides", "mesh"),
    [
        ("m3", (), (4, "mesh.data=1", "mesh.context=4")),  # copies of a conversation in a row
        ("deepstack", HD, (8, *TWO_BY_FOUR)),
        pytest.param("m3", (), (4, "mesh.data=1", "mesh.fsdp=2", "mesh.context=2"), marks=pytest.mark.long),
        pytest.param("deepstack", TWO, (8, *TWO_BY_FOUR), marks=pytest.mark.long),
        pytest.param("deepstack_v", TWO, (8, "mesh.tensor=2", "mesh.context=2"), marks=pytest.mark.long),
        pytest.param("hybrid", ("data.length=64",), (8, *TWO_BY_FOUR), marks=pytest.mark.long),
    ],
)
def test_devices_that_share_a_row_give_the_loss_and_gradients_of_one(setup, recipe, overrides, mesh):
    devices, *mesh = mesh
    batch, want = loss_and_gradients(setup, 1, *overrides, recipe=recipe)
    if overrides in (HD, TWO):
        assert (batch["segment"].max(axis=(1, 2)) > 1).any()
    assert (batch["segment"][..., -1] == 0).any()  # a row with padding
    _, found = loss_and_gradients(setup, devices, *overrides, *mesh, recipe=recipe)
    assert 1 < float(want[0]) < 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)


def test_a_row_that_does_not_divide_is_refused(tiny):
    with pytest.raises(ValueError, match=r"data.length=121 does not divide into 16 chunks.*mesh.context"):
        make_program(tiny("data.length=121", "mesh.data=1", "mesh.context=8"))
    with pytest.raises(ValueError, match=r"config.rules.length=.*'fsdp'.* also share out packs or heads"):
        make_program(tiny("rules.length=fsdp", "mesh.data=1", "mesh.fsdp=8"))
