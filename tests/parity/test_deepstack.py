"""DeepStack-L, -L-HD and -V, their variants, edge cases and ablations, against the reference's numbers."""

import json
import math

import jax
import numpy as np
import pytest

from lmm_jax.data.images import open_picture
from lmm_jax.data.packing import Capacity
from lmm_jax.data.segments import blank
from lmm_jax.models.encoders.vit import ViTBlock
from lmm_jax.models.visual_tokens import sample_strided, tile_mosaic
from tests.opened import pack_layout
from tests.parity.reference import Reference, close, labels_of, segment, unpadded, write_folder

# The set's README.
ACTIVATIONS, LOSS, NORMS = 1e-4, 1e-5, 1e-3


class DeepStack(Reference):
    """One model of the set; every row of a batch is a pack.

    Attributes:
      z: its recorded arrays.
      rows: `(ids, supervised)` of each row.
      pictures: opened, of each row.
    """

    def __init__(self, golden, tmp, case, **overrides):
        self.golden, about = golden, json.loads((golden / "config.json").read_text())
        keys = about["llm_config"] | about["case_overrides"][case] | overrides
        super().__init__(write_folder(golden, tmp / "model", keys, about["vision_config"]))
        self.z = np.load(golden / f"{case}.npz")
        self.norms = json.loads((golden / "grad_norms.json").read_text())[case]
        self.rows = [unpadded(self.z, row) for row in range(len(self.z["input_ids"]))]
        self.pictures = [[open_picture(golden / f"image{row}.png")] for row in range(len(self.rows))]
        self.most = keys["tokenizer_model_max_length"]
        self.scale = self.config.model.scales[0]

    def batch(self, rows=None, pictures=None, side="right", most=None, length=None):
        """A batch of a pack a row; `placed` of each pack is left in `self.placed`."""
        rows, pictures = rows or self.rows, self.pictures if pictures is None else pictures
        sizes = [[p.size for p in of] for of in pictures]
        probe = pack_layout(self.config)
        views = [sum(probe.visual.views_of_tiling(p.tiling) for p in probe.place(of)) for of in sizes]
        layout = pack_layout(self.config, Capacity(1, 0, max(views), 0))
        self.placed = [layout.place(of) for of in sizes]
        self.slots = [[layout.slots(p, self.scale) for p in of] for of in self.placed]
        segments = [segment(*row, slots, 1, most or self.most) for row, slots in zip(rows, self.slots, strict=True)]
        length = length or max(map(len, segments))
        packs = []
        for one, of in zip(segments, pictures, strict=True):
            parts = [one]
            if side == "left":
                parts = [*([blank(length - len(one))] if len(one) < length else []), one]
            fitted = pack_layout(self.config, Capacity(1, length, max(views), length))
            packs.append(fitted.assemble(parts, [(p.size, fitted.see(p)) for p in of]))
        return {name: np.stack([p[name] for p in packs]) for name in packs[0]}


@pytest.fixture(scope="module")
def make(golden, tmp_path_factory):
    """`make(case, **keys)`: a model of the set with some keys of its config changed."""

    def build(case="deepstack_l", **keys):
        return DeepStack(golden / "deepstack", tmp_path_factory.mktemp("deepstack"), case, **keys)

    return build


@pytest.fixture(scope="module")
def deepstack_l(make):
    return make()


@pytest.fixture(scope="module")
def deepstack_l_hd(make):
    return make("deepstack_l_hd")


@pytest.fixture(scope="module")
def deepstack_v(make):
    return make("deepstack_v")


def check_sequence(m, batch):
    """What all three models record of the decoder's input and output."""
    z, mask = m.z, m.z["attention_mask_expanded"].astype(bool)
    np.testing.assert_array_equal(batch["segment"][:, 0] > 0, mask)
    np.testing.assert_array_equal(labels_of(batch), z["labels_expanded"])
    out = m.forward(batch)
    close(out.embeds[:, 0][mask], z["inputs_embeds"][mask], ACTIVATIONS)
    inputs, last = m.layer_inputs(batch)
    shown = len(z["layer_in"])
    close(inputs[:shown, :, 0][:, mask], z["layer_in"][:, mask], ACTIVATIONS)
    if "layer_out" in z.files:
        close(last[:, 0][mask], z["layer_out"][0][mask], ACTIVATIONS)
    close(out.hidden[:, 0][mask], z["final_norm"][mask], ACTIVATIONS)
    close(out.logits[:, 0][mask], z["logits"][mask], ACTIVATIONS)
    return out


def check_gradients(m, batch):
    loss, _, grads = m.gradients(batch)
    close(loss, m.z["loss"], LOSS)
    for name, want in m.norms.items():
        if want is None:
            assert name not in grads, name
        else:
            close(np.linalg.norm(grads[name]), want, 1e-6, NORMS)
    for key in m.z.files:
        if key.startswith("grad/"):
            close(grads[key.removeprefix("grad/")], m.z[key], ACTIVATIONS)


def check_greedy(m):
    """Each row in a pack of its own, over a cache; and its logits where they are recorded."""
    batch = m.batch([(ids, ids < 0) for ids, _ in m.rows])
    want = np.stack([m.z[f"greedy_sample{row}"] for row in range(len(m.rows))])
    np.testing.assert_array_equal(m.greedy(batch, m.scale, want.shape[1]), want)
    if "single_logits_sample0" in m.z.files:
        for row, logits in enumerate(m.forward(batch).logits[:, 0]):
            want = m.z[f"single_logits_sample{row}"]
            close(logits[: len(want)], want, ACTIVATIONS)


def test_l_features_stacks_and_sequence(deepstack_l):
    m, batch = deepstack_l, deepstack_l.batch()
    z, bank = m.z, m.model.vision.grid**2
    features = jax.jit(lambda p, x: m.model.vision.apply({"params": p}, x)[0])
    views = [m.pixels(np.load(m.golden / "preprocess.npz")[f"L/image{i}/pixel_values"]) for i in range(len(m.rows))]
    order = np.concatenate([*(v[:1] for v in views), *(v[1:] for v in views)])
    found = features(m.params["vision"], order).reshape(len(order), bank, -1)
    close(found, z["clip_features"], ACTIVATIONS)
    projected = m.model.projector.apply({"params": m.params["projector"]}, z["clip_features"])
    close(projected, z["projected_features"], ACTIVATIONS)
    out = check_sequence(m, batch)
    close(out.bank, z["global_tokens"], ACTIVATIONS)
    close(out.stacks, z["stacks"], ACTIVATIONS)


def test_l_gradients(deepstack_l):
    check_gradients(deepstack_l, deepstack_l.batch())


def test_l_greedy_tokens_and_rows_alone(deepstack_l):
    check_greedy(deepstack_l)


def variants(golden):
    with np.load(golden / "deepstack/deepstack_l.npz") as z:
        return sorted({k.split("/")[0] for k in z.files if k.startswith("variant")})


@pytest.mark.long
def test_l_start_interval_sampling_and_truncation(make, golden):
    names = variants(golden)
    assert names
    for name in names:
        what = name.removeprefix("variant_")
        keys, rows, most = {}, None, None
        if what.startswith("start"):
            start, interval = what.removeprefix("start").split("_interval")
            keys = {"deepstack_start_id": int(start), "deepstack_interval": int(interval)}
        elif what.startswith("sampling"):
            keys = {"deepstack_sampling": what.split("_")[1]}
        elif what.startswith("maxlen"):
            keys = {"tokenizer_model_max_length": int(what.removeprefix("maxlen"))}
        else:
            raise AssertionError(f"unknown variant {name}")
        m = make(**keys)
        if what.startswith("maxlen"):  # cuts inside a picture
            rows = [unpadded(m.z, row, labels="labels_all_text") for row in range(len(m.rows))]
            most = m.most
        batch = m.batch(rows, most=most)
        mask = batch["segment"][:, 0] > 0
        out = m.forward(batch)
        close(out.logits[:, 0][mask], m.z[f"{name}/logits"][mask], ACTIVATIONS)
        close(out.loss, m.z[f"{name}/loss"], LOSS)


@pytest.mark.parametrize("side", ["right", "left"])
def test_text_beside_a_picture_gets_nothing_of_it(deepstack_l, side):
    """The reference adds the stacks of the text row's dummy; its corrected numbers hold on either padding side."""
    m, e = deepstack_l, np.load(deepstack_l.golden / "edge_cases.npz")
    rows = [unpadded(e, row, prefix="mixed/") for row in range(2)]
    batch = m.batch(rows, [[], m.pictures[0]], side)
    mask = e["mixed/attention_mask_expanded"].astype(bool)
    out = m.forward(batch)
    last = batch["segment"][:, 0].max(1, keepdims=True)
    ours = (batch["segment"][:, 0] == last) if side == "left" else mask
    close(out.logits[:, 0][ours], e["mixed/fixed_logits"][mask], ACTIVATIONS)
    close(out.loss, e["mixed/fixed_loss"], LOSS)
    if side == "right":
        np.testing.assert_array_equal(labels_of(batch), e["mixed/labels_expanded"])
    wrong = e["mixed/reference_buggy_logits"][mask] - e["mixed/fixed_logits"][mask]
    assert np.abs(wrong).max() > 100 * ACTIVATIONS  # so that the two can be told apart


def test_the_second_picture_of_a_row_gets_its_own_stacks(deepstack_l):
    m, e = deepstack_l, np.load(deepstack_l.golden / "edge_cases.npz")
    ids, labels = e["twoimg/input_ids"][0], e["twoimg/labels"][0]
    batch = m.batch([(ids, labels >= 0)], [[picture for of in m.pictures for picture in of]])
    np.testing.assert_array_equal(labels_of(batch), e["twoimg/labels_expanded"])
    out = m.forward(batch)
    close(out.logits[:, 0], e["twoimg/fixed_logits"], ACTIVATIONS)
    close(out.loss, e["twoimg/fixed_loss"], LOSS)


def test_two_samples_packed_in_one_row_give_the_batch_s_loss(deepstack_l):
    m = deepstack_l
    pictures = [picture for of in m.pictures for picture in of]
    ids = [row[0] for row in m.rows]
    batch = m.batch([(np.concatenate(ids), np.concatenate([row[1] for row in m.rows]))], [pictures])
    first = len(ids[0]) - 1 + len(m.slots[0][0])  # made two segments of it
    batch["segment"][0, 0, first:] = 2
    batch["position"][0, 0, first:] -= first
    batch["group"] *= batch["target_at"] != first - 1
    close(m.forward(batch).loss, m.z["loss"], LOSS)


ABLATIONS = {
    "only_global_features": lambda whole, stacks, n: (None, [whole]),
    "dummy_local": lambda whole, stacks, n: ([whole], [whole] * len(stacks)),
    "global_and_local": lambda whole, stacks, n: (None, [whole, *stacks]),
    "string_woglobal": lambda whole, stacks, n: (stacks[:n], []),
    "string_withglobal": lambda whole, stacks, n: ([whole, *stacks[:n]], []),
}


@pytest.mark.parametrize("word", ABLATIONS)
def test_ablations_rearrange_the_recorded_tokens(make, deepstack_l, word):
    """What stands in the sequence and what is added, put together from recorded `global_tokens` and `stacks`."""
    m, z = make(deepstack_args_for_ablation=word), deepstack_l.z
    out, slots = m.forward(m.batch()), m.slots
    for row, whole in enumerate(z["global_tokens"]):
        tiles = math.prod(deepstack_l_tiling(deepstack_l, row))
        sequence, added = ABLATIONS[word](whole, list(z["stacks"][:, row]), tiles)
        want = np.zeros_like(whole) if sequence is None else np.concatenate(sequence)
        close(out.bank[row][slots[row][0]], want, ACTIVATIONS)
        assert (0 if out.stacks is None else len(out.stacks)) == len(added)
        for ours, theirs in zip([] if out.stacks is None else out.stacks, added, strict=True):
            close(ours[row][slots[row][0]], theirs, ACTIVATIONS)
    first = m.config.model.decoder.inject_layers
    assert first == tuple(range(1, 1 + len(first)))


def deepstack_l_tiling(m, row):
    return pack_layout(m.config).place([m.pictures[row][0].size])[0].tiling


def test_ablations_that_never_worked_are_refused(make):
    for keys, message in (
        ({"deepstack_args_for_ablation": "2xsample+hires_local"}, "hires_local"),
        ({"deepstack_sampling": "2d_scaledown"}, "deepstack_sampling"),
        ({"deepstack_args_for_ablation": "deepstack_vit"}, "lsvit_start_layer_N"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**keys)


def test_hd_projection_stacks_and_sequence(deepstack_l_hd):
    m = deepstack_l_hd
    out = check_sequence(m, m.batch())
    z, n = m.z, m.model.vision.grid**2
    pixels = [m.pixels(np.load(m.golden / "preprocess.npz")[f"HD/image{i}/pixel_values"]) for i in range(len(m.rows))]
    units = [1 + math.prod(placed[0].tiling) for placed in m.placed]
    order = [
        *(p[:u] for p, u in zip(pixels, units, strict=True)),
        *(p[u:] for p, u in zip(pixels, units, strict=True)),
    ]

    def project(model, x):
        return model.projector(model.vision(x)[0])

    found = jax.jit(lambda p, x: m.model.apply({"params": p}, x, method=project))(m.params, np.concatenate(order))
    close(found.reshape(-1, n, found.shape[-1]), z["projected_features"], ACTIVATIONS)
    for row, of in enumerate(m.slots):
        close(out.bank[row][of[0]], z[f"global_tokens_sample{row}"], ACTIVATIONS)
        close(out.stacks[:, row, of[0]], z[f"stacks_sample{row}"], ACTIVATIONS)


def test_hd_gradients_with_the_newline_s(deepstack_l_hd):
    assert deepstack_l_hd.norms["model.image_newline"]
    check_gradients(deepstack_l_hd, deepstack_l_hd.batch())


def test_hd_greedy_tokens(deepstack_l_hd):
    check_greedy(deepstack_l_hd)


def test_v_hidden_states(deepstack_v):
    m, vision = deepstack_v, deepstack_v.model.vision
    batch, z = deepstack_v.batch(), deepstack_v.z
    start, n = vision.regroup
    views = batch["pixels"].reshape(-1, *batch["pixels"].shape[2:])
    (features,), state = vision.apply(
        {"params": m.params["vision"]},
        views,
        capture_intermediates=lambda module, _: module.name == "norm_pre",
        mutable=["intermediates"],
    )
    x, stacks = state["intermediates"]["norm_pre"]["__call__"][0], None
    per = 1 + n * n
    theirs = [*range(0, len(views), per), *(i for i in range(len(views)) if i % per)]
    layers = [
        jax.tree.map(lambda p: p[i], m.params["vision"][f"blocks_{a}"])  # noqa: B023
        for a, b in vision.runs()
        for i in range(b - a)
    ]
    block = ViTBlock(vision.heads, vision.mlp_dim, vision.norm_eps, vision.dtype)
    shown = 0
    for number, layer in enumerate([*layers, None]):
        if number == start:
            tiles = x.reshape(-1, per, *x.shape[1:])[:, 1:, 1:]
            tiles = tiles.reshape(-1, n, n, vision.grid, vision.grid, vision.width)
            stacks = sample_strided(tile_mosaic(tiles), n).reshape(n * n, -1, vision.grid**2, vision.width)
            x = x[::per]
        if stacks is not None and number - start < len(stacks):
            x = x.at[:, 1:].add(stacks[number - start])
        name = f"vit_hidden_{number:02}"
        if name in z.files:
            close(x[np.array(theirs)] if number < start else x, z[name], ACTIVATIONS)
            shown += 1
        if layer is not None:
            x, _ = block.apply({"params": layer}, x, None, None)
    assert shown > start
    close(features, x[:, 1:].reshape(features.shape), ACTIVATIONS)


def test_v_projection_and_sequence(deepstack_v):
    m = deepstack_v
    out = check_sequence(m, m.batch())
    assert out.stacks is None
    close(out.bank, m.z["projected_features"], ACTIVATIONS)
    close(out.bank, m.z["global_tokens"], ACTIVATIONS)


def test_v_gradients(deepstack_v):
    check_gradients(deepstack_v, deepstack_v.batch())


def test_v_greedy_tokens(deepstack_v):
    check_greedy(deepstack_v)
