"""The linear map's own gradient: that of XLA, reduced and scattered where the batch is shared out; the plain path."""

import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import config, sharding
from lmm_jax.aot.hlo import Module
from lmm_jax.models.linear import linear, plain, rings

ROOT = pathlib.Path(__file__).parent.parent.parent


def loss(x, kernel):
    return (jnp.sin(linear(x, kernel, ("embed",), ("heads", "head_dim"))) ** 2).sum()


def back(x, kernel):
    return (jnp.sin(linear(x, kernel, ("heads", "head_dim"), ("embed",))) ** 2).sum()


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}])
@pytest.mark.parametrize("fn", [loss, back])
def test_gradients_equal_those_of_one_device_and_are_scattered(mesh, fn, axes, monkeypatch):
    rng = np.random.default_rng(0)
    inside, outside = ((16,), (4, 6)) if fn is loss else ((4, 6), (16,))
    x = jnp.asarray(rng.normal(size=(8, 3, *inside)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*inside, *outside)), jnp.float32)
    want = jax.grad(fn, argnums=(0, 1))(x, kernel)
    lead = jnp.einsum("btd,dhk->bthk" if fn is loss else "bthk,hkd->btd", x, kernel)
    plain = jnp.einsum("btd,bt...->d..." if fn is loss else "bthk,btd->hkd", x, jnp.sin(2 * lead))
    np.testing.assert_allclose(want[1], plain, atol=1e-4)

    rules, mesh = dict(config.base().rules), sharding.make_mesh(mesh)
    # As on a slice of so many axes: several scatters, one after the other, and over three axes as many gathers.
    monkeypatch.setattr("lmm_jax.models.linear.rings", lambda axis: rings_of(mesh.shape[axis], axes))
    names = ("embed", "heads", "head_dim") if fn is loss else ("heads", "head_dim", "embed")
    with sharding.use(mesh, rules):
        placed = jax.NamedSharding(mesh, sharding.partition(kernel.shape, *names))
        batch = jax.NamedSharding(mesh, sharding.partition(x.shape, "batch", *[None] * (x.ndim - 1)))
        step = jax.jit(jax.grad(fn, argnums=(0, 1)), out_shardings=(batch, placed))
        compiled = step.lower(jax.device_put(x, batch), jax.device_put(kernel, placed)).compile()
        found = compiled(jax.device_put(x, batch), jax.device_put(kernel, placed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)
    moved = Module(compiled.as_text()).collectives(8)
    assert sum(c.kind == "reduce-scatter" for c in moved) == axes
    if mesh.size == mesh.shape["fsdp"]:
        gathered = [c for c in moved if c.kind == "all-gather"]  # once: forward and backward share it here
        assert {len(group) for c in gathered for group in c.groups} == {8 if axes == 2 else 2}
        assert sum(c.traffic for c in gathered) == kernel.nbytes * 7 // 8


def rings_of(size, axes):
    """`size` devices along so many axes, two along each while there are enough."""
    return (*(2 if size >> i > 1 else 1 for i in range(axes - 1)), max(size >> (axes - 1), 1))


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}])
@pytest.mark.parametrize("fn", [loss, back])
def test_the_plain_path_gives_the_same_values_and_gradients(mesh, fn):
    rng = np.random.default_rng(0)
    inside, outside = ((16,), (4, 6)) if fn is loss else ((4, 6), (16,))
    x = jnp.asarray(rng.normal(size=(8, 3, *inside)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*inside, *outside)), jnp.float32)
    rules, mesh = dict(config.base().rules), sharding.make_mesh(mesh)

    def run():
        def values(x, kernel):  # anew, so that nothing that was traced before is taken
            return jax.value_and_grad(fn, argnums=(0, 1))(x, kernel)

        with sharding.use(mesh, rules):
            batch = jax.NamedSharding(mesh, sharding.partition(x.shape, "batch", *[None] * (x.ndim - 1)))
            names = ("embed", "heads", "head_dim") if fn is loss else ("heads", "head_dim", "embed")
            placed = jax.NamedSharding(mesh, sharding.partition(kernel.shape, *names))
            traced = jax.jit(values).trace(jax.device_put(x, batch), jax.device_put(kernel, placed))
            found = traced.lower().compile()(jax.device_put(x, batch), jax.device_put(kernel, placed))
            return found, "psum_scatter" in str(traced.jaxpr) or "reduce_scatter" in str(traced.jaxpr)

    want, scattered = run()
    with plain():
        found, scattered_plainly = run()
    assert scattered and not scattered_plainly
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)


def test_an_environment_variable_takes_the_plain_path():
    traced = (
        "import jax, jax.numpy as jnp; from lmm_jax.models.linear import linear; "
        "print(jax.make_jaxpr(lambda x, y: linear(x, y, ('embed',), ('mlp',)))(jnp.ones((2, 3)), jnp.ones((3, 4))))"
    )
    for value, is_plain in (("1", True), ("0", False)):
        env = os.environ | {"LMM_PLAIN_LINEAR": value, "JAX_PLATFORMS": "cpu"}
        run = subprocess.run([sys.executable, "-c", traced], cwd=ROOT, env=env, capture_output=True, text=True)
        assert "dot_general" in run.stdout and ("custom_vjp" not in run.stdout) == is_plain, run.stderr


def saved(*differentiated):
    """Shapes that the backward pass of `loss` is given."""
    shapes = (jnp.ones((8, 3, 16)), jnp.ones((16, 4, 6)))

    def pull(*args):
        return jax.vjp(
            lambda *a: loss(
                *(a[differentiated.index(i)] if i in differentiated else x for i, x in enumerate(shapes))
            ),
            *args,
        )[1]

    return {x.shape for x in jax.tree.leaves(jax.eval_shape(pull, *(shapes[i] for i in differentiated)))}


def test_a_frozen_kernel_saves_no_input_and_a_first_layer_no_kernel():
    assert (8, 3, 16) in saved(0, 1) and (16, 4, 6) in saved(0, 1)
    assert (8, 3, 16) not in saved(0) and (16, 4, 6) in saved(0)
    assert (8, 3, 16) in saved(1) and (16, 4, 6) not in saved(1)


@pytest.mark.parametrize(
    ("grid", "sizes"), [((8, 8), (8, 8)), ((4, 4, 4), (4, 4, 4)), ((1, 16), (16,)), ((2, 16), (2, 16))]
)
def test_an_axis_over_a_torus_falls_into_its_rings(grid, sizes):
    places = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid), axis=1)
    line = [types.SimpleNamespace(coords=tuple(place), core_on_chip=0, platform="tpu") for place in places.tolist()]
    devices = np.empty(len(line), object)
    devices[:] = line
    mesh = types.SimpleNamespace(
        devices=devices.reshape(1, -1, 1, 1), axis_names=sharding.MESH_AXES, shape={"fsdp": len(line)}
    )
    token = sharding._mesh.set(mesh)
    try:
        assert rings("fsdp") == sizes
    finally:
        sharding._mesh.reset(token)


def test_other_devices_have_no_rings():
    with sharding.use(sharding.make_mesh({"fsdp": 8}), {}):
        assert rings("fsdp") == (8,)
        assert rings("tensor") == (1,)
