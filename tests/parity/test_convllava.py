"""ConvLLaVA: stages, tokens, the whole model, and pictures of their own shapes in one batch."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from lmm_jax.data.images import open_picture
from lmm_jax.data.views import resize_short_side
from lmm_jax.models.encoders.convnext import depthwise, space_to_depth
from lmm_jax.models.layers import Dense, LayerNorm
from tests.parity.reference import (
    Reference,
    close,
    grid_slots,
    labels_of,
    make_batch,
    segment,
    unpadded,
    write_folder,
)

# The set's README.
FEATURES, LOGITS, LOSS, NORMS = 2e-5, 1e-4, 1e-5, 1e-4
SHAPES = ("square", "nonsquare", "odd")


def released(golden, out):
    """The golden set as a released folder `out`, read by our loader."""
    config = json.loads((golden / "config.json").read_text())
    keys = config["llm"] | {"mm_projector_type": config["projector"]["type"], "image_aspect_ratio": "pad"}
    write_folder(golden, out, keys, config["vision"])
    (out / "vision_tower/preprocessor_config.json").write_text(json.dumps(config["image_processor"]))
    return Reference(out)


@pytest.fixture(scope="module")
def convllava(golden, tmp_path_factory):
    folder = golden / "convllava"
    out = released(folder, tmp_path_factory.mktemp("convllava") / "model")
    out.golden, out.size = folder, json.loads((folder / "config.json").read_text())["resolution"]
    out.vision, out.z = np.load(folder / "vision.npz"), np.load(folder / "lmm.npz")
    out.norms = json.loads((folder / "grad_norms.json").read_text())
    out.encode = jax.jit(lambda params, *inputs: out.model.vision.apply({"params": params["vision"]}, *inputs)[0])
    return out


def rows_last(x):
    """NCHW to NHWC."""
    return np.moveaxis(x, 1, -1)


def test_config_and_tensors(convllava):
    vision = convllava.model.vision
    assert vision.image_size == convllava.size
    assert convllava.config.data.aspect == "pad"
    assert set(convllava.skipped.values()) == {"follows the last stage, whose output is read without it"}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage(convllava, shape):
    z, vision = convllava.vision, convllava.model.vision
    pixels = convllava.pixels(z[f"{shape}/pixel_values"], np.float32)
    shown = {"norm_pre": "stem"} | {f"stage_{n}": f"stage{n}" for n in range(1, len(vision.depths) + 1)}
    (features,), state = vision.apply(
        {"params": convllava.params["vision"]},
        pixels,
        capture_intermediates=lambda module, _: module.name in shown and len(module.path) == 1,
        mutable=["intermediates"],
    )
    for name, theirs in shown.items():
        close(state["intermediates"][name]["__call__"][0], rows_last(z[f"{shape}/{theirs}"]), FEATURES)
    tokens = features.reshape(1, -1, features.shape[-1])
    close(tokens, z[f"{shape}/tokens"], FEATURES)
    projected = convllava.model.projector.apply({"params": convllava.params["projector"]}, tokens)
    close(projected, z[f"{shape}/projected"], FEATURES)


def test_inside_a_block(convllava):
    z, stage = convllava.vision, convllava.params["vision"]["stage_3"]
    wanted = {k.rsplit("/", 1)[1]: z[k] for k in z.files if k.startswith("block/stage3_layer0/")}
    eps = convllava.model.vision.norm_eps
    x = LayerNorm(eps).apply({"params": stage["norm"]}, rows_last(z["square/stage2"]))
    close(x, rows_last(wanted.pop("down_norm")), FEATURES)
    width = stage["reduce"]["bias"].shape[0]
    reduce = Dense((width,), ("pixels",), ("embed",), True)
    x = reduce.apply({"params": stage["reduce"]}, space_to_depth(x, 2))
    close(x, rows_last(wanted.pop("down_conv")), FEATURES)
    block = jax.tree.map(lambda p: p[0], stage["blocks"])
    y = depthwise(x, block["depthwise"]["kernel"]) + block["depthwise"]["bias"]
    close(y, rows_last(wanted.pop("dwconv")), FEATURES)
    y = LayerNorm(eps).apply({"params": block["norm"]}, y)
    close(y, wanted.pop("norm_nhwc"), FEATURES)
    up, down = (Dense((n,), ("embed",), ("mlp",), True) for n in (4 * width, width))
    y = nn.gelu(up.apply({"params": block["up"]}, y), approximate=False)
    close(y, wanted.pop("gelu_nhwc"), FEATURES)
    y = down.apply({"params": block["down"]}, y)
    close(y, wanted.pop("pw2_nhwc"), FEATURES)
    close(x + block["scale"] * y, rows_last(wanted.pop("out")), FEATURES)
    assert not wanted


@pytest.mark.long
def test_pictures_of_different_sizes_in_one_batch_give_what_each_gives_alone(convllava):
    pictures = [convllava.pixels(convllava.vision[f"{s}/pixel_values"], np.float32)[0] for s in SHAPES]
    path = next(convllava.golden.glob("img0_*.png"))
    pictures.append(resize_short_side(open_picture(path), convllava.size).astype(np.float32))
    extent = np.array([p.shape[:2] for p in pictures], np.int32)
    stride = convllava.model.vision.stride
    height, width = -(-extent.max(0) // stride) * stride
    # What lies beside a picture must not matter.
    canvas = np.random.default_rng(0).uniform(0, 255, (len(pictures), height, width, 3)).astype(np.float32)
    for of, picture in zip(canvas, pictures, strict=True):
        of[: picture.shape[0], : picture.shape[1]] = picture
    together = convllava.encode(convllava.params, canvas, extent)
    for features, picture, name in zip(together, pictures, (*SHAPES, None), strict=True):
        rows, columns = np.array(picture.shape[:2]) // stride
        alone = convllava.encode(convllava.params, picture[None])
        assert alone.shape[1:3] == (rows, columns)
        close(features[:rows, :columns], alone[0], FEATURES)
        if name:
            close(features[:rows, :columns], rows_last(convllava.vision[f"{name}/stage5"])[0], FEATURES)
    with np.load(convllava.golden / "preprocess.npz") as z:
        projected = convllava.model.projector.apply({"params": convllava.params["projector"]}, alone)
        close(projected.reshape(1, -1, projected.shape[-1]), z["img0/shortside_projected"], FEATURES)


def batch_of(convllava, name, pictures, most=None):
    """A recorded batch; `pictures` of `pair/images` in the order of its rows, None for text alone."""
    z, vision = convllava.z, convllava.model.vision
    scale, views = vision.grid**2, convllava.pixels(z["pair/images"])
    packs = []
    for row, picture in enumerate(pictures):
        shown = [] if picture is None else [grid_slots(0, scale, (scale,), 1)]
        packs.append([segment(*unpadded(z, row, prefix=f"{name}/"), shown, 1, most)])
    length = None if most else max(z[f"{n}/mm_labels"].shape[1] for n in ("pair", "mixed"))
    pixels = np.stack([np.zeros_like(views[0]) if p is None else views[p] for p in pictures])
    return make_batch(packs, length=length, pixels=pixels[:, None])


@pytest.mark.parametrize(("name", "pictures"), [("pair", (0, 1)), ("mixed", (0, None))])
def test_embeddings_logits_and_loss(convllava, name, pictures):
    batch, z = batch_of(convllava, name, pictures), convllava.z
    mask = z[f"{name}/mm_attention_mask"].astype(bool)
    T = mask.shape[1]
    np.testing.assert_array_equal(batch["segment"][:, 0, :T] > 0, mask)
    np.testing.assert_array_equal(labels_of(batch)[:, :T], z[f"{name}/mm_labels"])
    assert (batch["group"] > 0).sum() == z[f"{name}/n_loss_tokens"]
    out = convllava.forward(batch)
    close(out.embeds[:, 0, :T][mask], z[f"{name}/mm_inputs_embeds"][mask], FEATURES)
    last = mask.sum(1) - 1
    close(out.logits[np.arange(len(last)), 0, last], z[f"{name}/last_valid_logits"], LOGITS)
    if f"{name}/logits" in z.files:
        close(out.logits[:, 0, :T][mask], z[f"{name}/logits"][mask], LOGITS)
    close(out.loss, z[f"{name}/loss"], LOSS)


def test_gradients(convllava):
    loss, _, grads = convllava.gradients(batch_of(convllava, "pair", (0, 1)))
    close(loss, convllava.z["pair/loss"], LOSS)
    for name, want in convllava.norms.items():
        if want is None:
            assert name not in grads, name
        else:
            close(np.linalg.norm(grads[name]) / want, 1, NORMS)
    for key in convllava.z.files:
        if key.startswith("grad/"):
            want = convllava.z[key]
            close(grads[key.removeprefix("grad/")] / np.linalg.norm(want), want / np.linalg.norm(want), NORMS)


def test_truncation(convllava):
    z = convllava.z
    batch = batch_of(convllava, "pair", (0, 1), int(z["trunc/max_length"]))
    np.testing.assert_array_equal(batch["segment"][:, 0] > 0, z["trunc/mm_attention_mask"].astype(bool))
    np.testing.assert_array_equal(labels_of(batch), z["trunc/mm_labels"])


def test_greedy_tokens(convllava):
    z, scale = convllava.z, convllava.model.vision.grid**2
    views = convllava.pixels(z["pair/images"])
    for picture in (0, 1):
        ids = z[f"gen{picture}/input_ids"][0]
        batch = make_batch(
            [[segment(ids, ids < 0, [grid_slots(0, scale, (scale,), 1)])]], pixels=views[None, [picture]]
        )
        want = z[f"gen{picture}/tokens"]
        np.testing.assert_array_equal(convllava.greedy(batch, scale, len(want))[0], want)
