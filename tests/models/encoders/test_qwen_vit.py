"""Qwen3-VL's vision transformer: beside transformers' class, on canvases, and its fields."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.models.encoders.qwen_vit import QwenViT, between, grid_angles

SIZES = {"image_size": 24, "patch_size": 4, "positions": 36, "width": 32, "depth": 4, "heads": 4, "mlp_dim": 48}
MODEL = QwenViT(**SIZES, stack_levels=(1, 3), remat=False)
PICTURES = [(24, 24), (16, 40), (8, 8), (48, 8)]  # height and width


@pytest.fixture(scope="module")
def params():
    """Parameters of which every one matters."""
    pixels = jnp.zeros((1, 8, 8, 3), jnp.uint8)
    shapes = nn.unbox(jax.eval_shape(MODEL.init, jax.random.key(0), pixels)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in PICTURES]


def on_canvases(pictures, height, width, fill):
    canvases = np.full((len(pictures), height, width, 3), fill, np.uint8)
    for canvas, picture in zip(canvases, pictures, strict=True):
        canvas[: picture.shape[0], : picture.shape[1]] = picture
    return canvases


def test_a_picture_on_any_canvas_gives_what_it_gives_alone(params, pictures):
    apply = jax.jit(MODEL.apply)
    extent = jnp.array([picture.shape[:2] for picture in pictures])
    maps = apply({"params": params}, on_canvases(pictures, 56, 64, 77), extent)
    assert [x.shape for x in maps] == [(4, 14, 16, 32)] * 3
    for x, alone in zip(maps, apply({"params": params}, pictures[1][None]), strict=True):
        np.testing.assert_allclose(x[1, :4, :10], alone[0], atol=1e-5)


def test_what_stands_beside_a_picture_has_no_gradient_and_no_nan(params, pictures):
    extent = jnp.array([[16, 40], [0, 0]])
    pixels = on_canvases(pictures[1:2] * 2, 48, 40, 0)

    def loss(params):
        x, *_ = MODEL.apply({"params": params}, pixels, extent)
        return (x[0, :4] ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    halves = np.split(np.asarray(grads["patches"]["kernel"]), MODEL.frames)
    np.testing.assert_allclose(halves[0], halves[1], rtol=1e-5)  # both frames show the same


def test_the_maps_are_those_of_transformers(params, pictures):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'lmm_jax[hf]'")
    qwen = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl", reason="as torch")
    config = qwen.Qwen3VLVisionConfig(
        depth=4, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, out_hidden_size=8,
        num_position_embeddings=36, deepstack_visual_indexes=[0, 2],
    )  # fmt: skip
    theirs = qwen.Qwen3VLVisionModel(config).eval()
    state = {name: torch.tensor(x) for name, x in as_theirs(params).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("merger" in name for name in missing)
    found = []
    for block in (0, 2, 3):
        theirs.blocks[block].register_forward_hook(lambda *args: found.append(args[2].numpy()))
    grids = torch.tensor([[1, picture.shape[0] // 4, picture.shape[1] // 4] for picture in pictures])
    with torch.no_grad():
        theirs(torch.tensor(np.concatenate([patches(picture) for picture in pictures])), grids)
    extent = jnp.array([picture.shape[:2] for picture in pictures])
    maps = jax.jit(MODEL.apply)({"params": params}, on_canvases(pictures, 48, 40, 9), extent)
    first = 0
    for n, (_, h, w) in enumerate(grids.tolist()):
        for x, of_theirs in zip(maps, (found[2], found[0], found[1]), strict=True):
            blocks = of_theirs[first : first + h * w].reshape(h // 2, w // 2, 2, 2, -1)
            np.testing.assert_allclose(x[n, :h, :w], blocks.swapaxes(1, 2).reshape(h, w, -1), atol=1e-5)
        first += h * w


def as_theirs(params):
    """Our parameters under the names of transformers' class, mergers left out."""
    kernel = params["patches"]["kernel"].reshape(2, 4, 4, 3, -1).transpose(4, 3, 0, 1, 2)
    out = {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": params["patches"]["bias"]}
    out["pos_embed.weight"] = params["position"]
    linear = {"attn.proj": "o", "mlp.linear_fc1": "up", "mlp.linear_fc2": "down"}
    for first, end in MODEL.runs():
        for layer in range(end - first):
            block = jax.tree.map(lambda x: x[layer], params[f"blocks_{first}"])  # noqa: B023
            name = f"blocks.{first + layer}."
            for n in "12":
                out[f"{name}norm{n}.weight"] = block[f"norm_{n}"]["scale"]
                out[f"{name}norm{n}.bias"] = block[f"norm_{n}"]["bias"]
            for theirs, ours in linear.items():
                bias = block[ours]["bias"]
                out[f"{name}{theirs}.weight"] = block[ours]["kernel"].reshape(-1, len(bias)).T
                out[f"{name}{theirs}.bias"] = bias
            qkv = [(block[n]["kernel"].reshape(32, 32).T, block[n]["bias"].reshape(-1)) for n in "qkv"]
            weights, biases = zip(*qkv, strict=True)
            out[f"{name}attn.qkv.weight"], out[f"{name}attn.qkv.bias"] = map(np.concatenate, (weights, biases))
    return out


def patches(picture):
    """`[h · w, 3 · 2 · 4 · 4]` as their processor gives them: blocks of 2 × 2 patches, in two frames."""
    h, w = picture.shape[0] // 4, picture.shape[1] // 4
    x = (picture.astype(np.float32) / 255 - 0.5) / 0.5
    x = x.reshape(h // 2, 2, 4, w // 2, 2, 4, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(x[:, :, :, :, :, None], 2, axis=5).reshape(h * w, -1)


def test_positions_are_interpolated_from_corner_to_corner():
    shares = between(jnp.array([5, 1, 0]), 6, 3)
    np.testing.assert_allclose(shares[0, :5], [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_allclose(shares[1, 0], [1, 0, 0])
    assert np.isfinite(shares).all()


def test_half_of_the_frequencies_turn_with_the_row():
    angles = np.asarray(grid_angles(2, 3, 8)).reshape(2, 3, 4)
    np.testing.assert_allclose(angles[1, 2], [1, 0.01, 2, 0.02], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_size": 25}, "image_size"),
        ({"heads": 16}, "heads of a multiple of 4"),
        ({"positions": 35}, "positions=35"),
        ({"stack_levels": (2, 1)}, "ascending"),
        ({"stack_levels": (5,)}, "from 1 to 4"),
    ],
)
def test_fields_that_contradict_each_other_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        QwenViT(**SIZES | {"stack_levels": ()} | fields).check()


def test_a_level_at_the_last_block_is_the_last_map():
    model = QwenViT(**SIZES, stack_levels=(4,))
    assert model.runs() == [(0, 4)] and model.level_strides == (1,) and model.grid == 6 and model.any_shape
