"""Rows shared out over the mesh's context axis: the loss and gradients of one device, and even work."""

import jax
import numpy as np
import pytest

from lmm_jax.training.optimizer import split
from lmm_jax.training.step import loss_and_grads

HD = (  # overview and tiles in the sequence with their doubles added, as configs/deepstack.py:recipe=hd
    "data.sequence=grid",
    "data.stacks=zoom",
    "data.zoom=2",
    "data.views=25",
    "data.length=112",
    "model.newline=True",
    "model.decoder.inject_layers=(0,1,2,3)",
)


def loss_and_gradients(setup, devices, *overrides, recipe):
    """Of the first batch of a recipe, on so many devices."""
    s = setup(devices, *overrides, recipe=recipe)
    parts = split(s.state.params, s.program.rates)
    with s.program.use():
        run = jax.jit(loss_and_grads, static_argnums=0)
        return run(s.program.model, *parts, s.place(s.host_batch(0)))


CASES = [
    ("m3", ("data.length=120",), (4, "mesh.data=1", "mesh.context=4")),
    ("deepstack", ("data.length=64",), (8, "mesh.data=1", "mesh.fsdp=2", "mesh.context=4")),
    ("deepstack", HD, (8, "mesh.data=2", "mesh.tensor=2", "mesh.context=2")),
]


@pytest.mark.parametrize(("recipe", "overrides", "mesh"), CASES)
def test_devices_that_share_a_row_give_the_loss_and_gradients_of_one(setup, recipe, overrides, mesh):
    devices, *mesh = mesh
    want = loss_and_gradients(setup, 1, *overrides, recipe=recipe)
    found = loss_and_gradients(setup, devices, *overrides, *mesh, recipe=recipe)
    assert 1 < float(want[0]) < 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)
