"""ConvNeXt's parts, its start, and masked canvases; its numbers are held by tests/parity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from lmm_jax import config, sharding
from lmm_jax.models.encoders import convnext
from lmm_jax.models.encoders.convnext import ConvNeXt, Stage, cover, depthwise, space_to_depth

TINY = {"image_size": 64, "depths": (1, 2, 1), "widths": (8, 12, 16), "remat": False}


def test_both_forms_of_a_depthwise_convolution_agree_with_gradients(monkeypatch):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 9, 5, 4)), jax.random.normal(jax.random.key(1), (7, 7, 4))

    def of_platform(name):
        monkeypatch.setattr(convnext, "platform", lambda: name)

        def value_and_grads(x, kernel):
            value, back = jax.vjp(depthwise, x, kernel)
            return value, back(value)

        assert ("conv_general_dilated" in str(jax.make_jaxpr(value_and_grads)(x, kernel))) == (name != "cpu")
        return jax.jit(value_and_grads)(x, kernel)

    for a, b in zip(jax.tree.leaves(of_platform("cpu")), jax.tree.leaves(of_platform("tpu")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_depthwise_sums_in_float32():
    x = jnp.ones((1, 7, 7, 1), jnp.bfloat16)
    kernel = jnp.full((7, 7, 1), 1 + 2**-10)
    got = depthwise(x, kernel)
    assert got.dtype == jnp.bfloat16
    assert got[0, 3, 3, 0] == jnp.bfloat16(49 * (1 + 2**-10))


def test_space_to_depth_drops_remainders():
    x = np.arange(2 * 5 * 7 * 3).reshape(2, 5, 7, 3)
    out = space_to_depth(x, 2)
    assert out.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(out[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))


def test_cover_is_the_picture_s_own_floor():
    mask = cover(jnp.array([[9, 4], [0, 0]]), 3, 2, 4)
    np.testing.assert_array_equal(mask[0, ..., 0], [[1, 0], [1, 0], [0, 0]])
    assert not mask[1].any()


def test_levels_are_finer_maps_of_the_same_picture():
    model = ConvNeXt(**TINY, stack_levels=(2, 1))
    pixels = jnp.zeros((2, 64, 96, 3), jnp.uint8)
    shapes = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), pixels)[0])
    assert [x.shape for x in shapes] == [(2, 4, 6, 16), (2, 8, 12, 12), (2, 16, 24, 8)]
    assert model.level_strides == (2, 4) and model.stride == 16 and model.grid == 4


@pytest.mark.long
def test_sharded_stages_have_the_gradients_of_one_device():
    model = ConvNeXt(**TINY | {"depths": (1, 1), "widths": (8, 12)}, stack_levels=(1,))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), np.uint8)
    boxed = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    # Not as they start, with scales of 1e-6 that hide all but the stem.
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), nn.unbox(boxed))

    def loss(params, pixels):
        return sum((x**2).mean() for x in model.apply({"params": params}, pixels))

    want = jax.jit(jax.value_and_grad(loss))(params, pixels)
    rules, mesh = dict(config.base().rules), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.param_shardings(boxed, mesh, rules))
    with sharding.use(mesh, rules):
        got = jax.jit(jax.value_and_grad(loss))(
            placed, jax.device_put(pixels, jax.NamedSharding(mesh, jax.P("data")))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(want[1]))


def test_levels_that_are_no_earlier_stages_are_refused():
    with pytest.raises(ValueError, match="stack_levels"):
        ConvNeXt(**TINY, stack_levels=(3,)).check()


def test_the_fifth_stage_starts_as_the_reference_s():
    """Uniform in ± fan-in^-1/2, biases too, norms 1 and 0, layer scale 1e-6 (ConvLLaVA's code)."""
    stage = Stage(depth=2, width=64, reduce=True, norm_eps=1e-6, dtype="float32", remat=False)
    init = jax.jit(lambda: stage.init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)), None, 64))
    params = nn.unbox(init())["params"]
    flat = flatten_dict(params, sep="/")
    fan_in = {"reduce": 4 * 32, "blocks/depthwise": 49, "blocks/up": 64, "blocks/down": 256}
    for name, n in fan_in.items():
        for leaf in ("kernel", "bias"):
            x = np.asarray(flat.pop(f"{name}/{leaf}"))
            bound = n**-0.5
            assert np.abs(x).max() <= bound and np.abs(x).max() > 0.85 * bound, name
            np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.2)
    for path, x in flat.items():
        np.testing.assert_array_equal(x, np.float32({"blocks/scale": 1e-6}.get(path, path.endswith("scale"))))
