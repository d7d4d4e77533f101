"""M3 on LLaVA-1.5, and on LLaVA-NeXT's grids, against the reference's numbers."""

import functools
import json

import jax
import numpy as np
import pytest

from lmm_jax.models.encoders.vit import ViTBlock
from lmm_jax.reduction import find_reduction
from tests.parity.reference import (
    Reference,
    close,
    grid_slots,
    labels_of,
    make_batch,
    pad_views,
    segment,
    unpadded,
    write_folder,
)

ATOL = 1e-4  # the set's README


@pytest.fixture(scope="module")
def m3(golden, tmp_path_factory):
    folder = golden / "m3"
    config = json.loads((folder / "config.json").read_text())
    keys = config["text"] | config["mm"] | config["llava15"] | {"matryoshka_vis_token_scale": config["scales"]}
    out = Reference(write_folder(folder, tmp_path_factory.mktemp("m3") / "model", keys, config["vision"]))
    out.z, out.mixed = np.load(folder / "llava15.npz"), np.load(folder / "mixed.npz")
    out.norms = json.loads((folder / "grad_norms.json").read_text())
    out.scales, out.aspect = tuple(config["scales"]), config["llava15"]["image_aspect_ratio"]
    out.views = out.pixels(out.z["pixel_values"])
    out.rows = [unpadded(out.z, row) for row in range(len(out.z["input_ids"]))]
    return out


def blocks(m3, scale, images=1, views=1, scales=None):
    return [grid_slots(i, scale, scales or m3.scales, views) for i in range(images)]


def one_scale(m3, scale):
    """The batch of both samples at one scale, in that scale's loss group; of equal shape at all scales."""
    bit, length = 1 << m3.scales.index(scale), m3.z[f"attention_mask_{max(m3.scales)}"].shape[1]
    packs = [[segment(*row, blocks(m3, scale), bit)] for row in m3.rows]
    return make_batch(packs, length=length, pixels=m3.views[:, None])


def all_scales(m3):
    """One pack a sample: its copies at every scale behind each other."""
    packs = [[segment(*row, blocks(m3, s), 1 << i) for i, s in enumerate(m3.scales)] for row in m3.rows]
    return make_batch(packs, pixels=m3.views[:, None])


def test_config_and_tensors(m3):
    assert m3.config.model.scales == m3.scales
    assert m3.config.data.aspect == m3.aspect and m3.config.data.template == "vicuna_v1"
    assert not any("mm_projector" in name or "lm_head" in name for name in m3.skipped)
    assert {why.split(" ")[0] for why in m3.skipped.values()} <= {"past", "follows", "this"}


def test_vision_hidden_states(m3):
    vision, params = m3.model.vision, m3.params["vision"]
    capture = {"capture_intermediates": lambda module, _: module.name == "norm_pre", "mutable": "intermediates"}
    (features,), state = jax.jit(functools.partial(vision.apply, **capture))({"params": params}, m3.views)
    g = vision.grid
    close(features.reshape(len(m3.views), g * g, -1), m3.z["vision_features"], ATOL)
    x = state["intermediates"]["norm_pre"]["__call__"][0]
    shown, read = m3.z["clip_hidden_0"].shape[1], range(vision.depth + 1)[vision.level]
    block = jax.jit(ViTBlock(vision.heads, vision.mlp_dim, vision.norm_eps, vision.dtype).apply)
    for number in range(read + 1):  # blocks past the state that is read are not ours
        close(x[:, :shown], m3.z[f"clip_hidden_{number}"], ATOL)
        if number < read:
            layer = {"params": {k: {n: v[number] for n, v in p.items()} for k, p in params["blocks_0"].items()}}
            x, _ = block(layer, x, None, None)


def test_projection_and_pooling_at_all_scales(m3):
    features = m3.z["vision_features"]
    projected = m3.model.projector.apply({"params": m3.params["projector"]}, features)
    close(projected, m3.z["projected"], ATOL)
    side, pool = m3.model.vision.grid, find_reduction(m3.model.reduction)
    grids = m3.z["projected"].reshape(len(features), side, side, -1)
    for scale in m3.scales:
        close(pool(grids, scale, side), m3.z[f"pooled_{scale}"], ATOL)
    odd = [int(k.rsplit("_", 1)[1]) for k in m3.z.files if k.startswith("pooled_odd_")]
    exact = [s for s in odd if m3.z[f"pooled_odd_{s}"].shape[1] == s]
    assert odd
    for scale in exact:
        close(pool(grids[:1], scale, side), m3.z[f"pooled_odd_{scale}"], ATOL)
    for scale in set(odd) - set(exact):  # the reference silently gives other counts
        with pytest.raises(ValueError, match="valid scales are"):
            pool(grids[:1], scale, side)


def test_each_scale_alone(m3):
    for i, scale in enumerate(m3.scales):
        batch = one_scale(m3, scale)
        out = m3.forward(batch)
        mask = m3.z[f"attention_mask_{scale}"]
        T = mask.shape[1]
        np.testing.assert_array_equal(batch["segment"][:, 0, :T] > 0, mask)
        np.testing.assert_array_equal(labels_of(batch)[:, :T], m3.z[f"labels_{scale}"])
        close(out.bank[:, blocks(m3, scale)[0]], m3.z[f"pooled_{scale}"], ATOL)
        close(out.embeds[:, 0, :T][mask], m3.z[f"inputs_embeds_{scale}"][mask], ATOL)
        row, at = m3.z[f"logit_rows_{scale}"].T
        close(out.logits[row, 0, at], m3.z[f"logits_{scale}"], ATOL)
        sums = np.log(np.exp(np.float64(out.logits[:, 0, :T])).sum(-1))
        close(sums[mask], m3.z[f"logsumexp_{scale}"][mask], ATOL)
        close(out.loss, m3.z[f"loss_{scale}"], ATOL)
        loss, groups, grads = m3.gradients(batch, frozen=("vision",))
        close(loss, m3.z[f"loss_{scale}"], ATOL)
        close(groups[i], m3.z[f"loss_{scale}"], ATOL)
        prefix = f"grad_single_{scale}__"
        for key in (key for key in m3.z.files if key.startswith(prefix)):
            close(grads[key.removeprefix(prefix)], m3.z[key], ATOL)
    close(m3.z["eval_mode_forward_loss"], m3.z[f"loss_{max(m3.scales)}"], 0)


@pytest.mark.parametrize("frozen", [("vision",), ()], ids=["tower frozen", "tower trained"])
def test_training_step_of_all_scales_from_one_packed_batch(m3, frozen):
    loss, groups, grads = m3.gradients(all_scales(m3), frozen)
    close(loss, m3.z["train_loss"], ATOL)
    close(groups, [m3.z[f"loss_{s}"] for s in m3.scales], ATOL)
    which = "" if frozen else "_if_vision_trained"
    norms = m3.norms[f"grad_norms{which}"]
    for name, want in norms.items():
        close(np.linalg.norm(grads[name]), want, ATOL, 1e-4)
    for name in m3.norms[f"params_without_grad{which}"]:
        assert name not in grads, name
    if frozen:
        for key in m3.z.files:
            if key.startswith("grad__"):
                close(grads[key.removeprefix("grad__")], m3.z[key], ATOL)
        total = np.sqrt(sum((np.float64(g) ** 2).sum() for g in grads.values()))
        close(total, m3.z["grad_norm_total"], ATOL)


def test_greedy_tokens_at_every_scale(m3):
    prompts = [m3.z[f"gen_prompt_{row}"] for row in range(len(m3.rows))]
    packs_at = {
        scale: [[segment(ids, ids < 0, blocks(m3, scale, scales=(scale,)))] for ids in prompts] for scale in m3.scales
    }
    longest = max(len(row) for packs in packs_at.values() for (row,) in packs)  # for all: one program decodes them
    for scale, packs in packs_at.items():
        want = np.stack([m3.z[f"gen_tokens_{row}_{scale}"] for row in range(len(prompts))])
        got = m3.greedy(make_batch(packs, length=longest, pixels=m3.views[:, None]), scale, want.shape[1])
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(m3.z["gen_tokens_0_None"], m3.z[f"gen_tokens_0_{max(m3.scales)}"])


def mixed_cases(m3):
    keys = [k.removeprefix("loss_") for k in m3.mixed.files if k.startswith("loss_")]
    return [(key, *key.split("_")) for key in keys]


def mixed_parts(m3):
    """Rows `(ids, supervised, pictures)` and `pixels` of the odd batch."""
    y = m3.mixed
    rows = [unpadded(y, row) for row in range(len(y["input_ids"]))]
    order, views, counts = iter(y["image_order"].tolist()), [], []
    for ids, _ in rows:
        n = int((ids < 0).sum())
        taken = [next(order) for _ in range(max(n, 1))]  # a row of text alone uses up a blank one
        views.append([m3.views[i] for i in taken] if n else [])
        counts.append(n)
    return list(zip(*zip(*rows, strict=True), counts, strict=True)), pad_views(views)


def test_mixed_rows_truncation_and_both_padding_sides(m3):
    rows, pixels = mixed_parts(m3)
    longest = max(m3.mixed[f"labels_{key}"].shape[1] for key, *_ in mixed_cases(m3))
    sides = set()
    for key, side, most, scale in mixed_cases(m3):
        scale, bit = int(scale), 1 << m3.scales.index(int(scale))
        packs = [[segment(ids, sup, blocks(m3, scale, n, pixels.shape[1]), bit, int(most))] for ids, sup, n in rows]
        batch = make_batch(packs, side, longest, pixels=pixels)
        mask = m3.mixed[f"attention_mask_{key}"].astype(bool)
        T = mask.shape[1]
        theirs = slice(None, T) if side == "right" else slice(-T, None)
        np.testing.assert_array_equal(labels_of(batch)[:, theirs], m3.mixed[f"labels_{key}"])
        np.testing.assert_array_equal(batch["position"][:, 0, theirs] * mask, m3.mixed[f"position_ids_{key}"])
        out = m3.forward(batch)
        close(out.embeds[:, 0, theirs][mask], m3.mixed[f"inputs_embeds_{key}"][mask], ATOL)
        close(out.loss, m3.mixed[f"loss_{key}"], ATOL)
        sides.add(side)
    assert sides == {"right", "left"}


def test_mixed_rows_of_several_scales_in_one_packed_batch(m3):
    rows, pixels = mixed_parts(m3)
    cases = {(int(most), int(scale)) for _, _, most, scale in mixed_cases(m3)}
    batches = {}
    for most in {most for most, _ in cases}:
        scales = sorted(scale for m, scale in cases if m == most)
        bits = {s: 1 << m3.scales.index(s) for s in scales}
        packs = []
        for ids, supervised, n in rows:
            if n:
                copies = [segment(ids, supervised, blocks(m3, s, n, pixels.shape[1]), bits[s], most) for s in scales]
            else:  # once, in the group of every scale
                copies = [segment(ids, supervised, [], sum(bits.values()), most)]
            packs.append(copies)
        batches[most] = packs, np.mean([m3.mixed[f"loss_right_{most}_{s}"] for s in scales])
    longest = max(sum(map(len, segments)) for packs, _ in batches.values() for segments in packs)
    for packs, want in batches.values():
        close(m3.forward(make_batch(packs, length=longest, pixels=pixels)).loss, want, ATOL)
