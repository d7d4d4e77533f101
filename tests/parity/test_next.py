"""LLaVA-NeXT's grids under M3's scales: merging with un-padding and newline, `spatial` and `flat`."""

import json

import numpy as np
import pytest

from lmm_jax.data.images import open_picture
from lmm_jax.data.packing import Capacity
from tests.opened import pack_layout
from tests.parity.reference import Reference, close, labels_of, segment, unpadded, write_folder

ATOL = 1e-4  # the set's README


class Next(Reference):
    """M3's weights in a model with any-resolution grids; every row of a batch is a pack."""

    def __init__(self, golden, tmp, merge):
        about = json.loads((golden / "config.json").read_text())
        keys = about["text"] | about["mm"] | about["next"] | {"matryoshka_vis_token_scale": about["scales"]}
        keys["mm_patch_merge_type"] = merge
        super().__init__(write_folder(golden, tmp / "model", keys, about["vision"]))
        self.z, self.scales = np.load(golden / "next_anyres.npz"), tuple(about["scales"])
        self.most = keys["tokenizer_model_max_length"]
        self.rows = [unpadded(self.z, row) for row in range(len(self.z["input_ids"]))]
        self.pictures = [open_picture(golden / f"images/{name}.png") for name in self.z["image_names"]]

    def layout(self, scales, length=0):
        probe = pack_layout(self.config)
        views = [probe.visual.views_of_tiling(probe.visual.tiling(*p.size)) for p in self.pictures]
        with self.config.unlocked():
            config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.model.scales = scales
        return pack_layout(config, Capacity(1, length, max(views), length))

    def slots(self, row, scale, scales=None):
        layout = self.layout(scales or self.scales)
        return layout.slots(layout.place([self.pictures[row].size])[0], scale)

    def batch(self, scale_sets, length=None, rows=None, scales=None):
        """A pack for each of `rows` with a copy at each scale of its set."""
        rows, scales, packs = rows or range(len(self.rows)), scales or self.scales, []
        copies = [
            [segment(*self.rows[r], [self.slots(r, s, scales)], 1 << scales.index(s), self.most) for s in scale_sets]
            for r in rows
        ]
        layout = self.layout(scales, length or max(sum(map(len, c)) for c in copies))
        packs = [
            layout.assemble(c, [(self.pictures[r].size, layout.see(self.pictures[r]))])
            for r, c in zip(rows, copies, strict=True)
        ]
        return {name: np.stack([p[name] for p in packs]) for name in packs[0]}


@pytest.fixture(scope="module")
def make(golden, tmp_path_factory):
    return lambda merge: Next(golden / "m3", tmp_path_factory.mktemp("next"), merge)


@pytest.fixture(scope="module")
def unpad(make):
    return make("spatial_unpad")


def test_merged_tokens_logits_and_loss_at_every_scale(unpad):
    m, z = unpad, unpad.z
    longest = z[f"attention_mask_{max(m.scales)}"].shape[1]
    for scale in m.scales:
        batch, mask = m.batch([scale], longest), z[f"attention_mask_{scale}"].astype(bool)
        T, out = mask.shape[1], m.forward(batch)
        np.testing.assert_array_equal(batch["segment"][:, 0, :T] > 0, mask)
        np.testing.assert_array_equal(labels_of(batch)[:, :T], z[f"labels_{scale}"])
        np.testing.assert_array_equal((batch["segment"] > 0).sum((1, 2)), z[f"length_{scale}"])
        for row in range(len(m.rows)):
            merged = out.bank[row][m.slots(row, scale)]
            assert len(merged) == z[f"num_tokens_{scale}_{row}"]
            if f"merged_{scale}_{row}" in z.files:
                close(merged, z[f"merged_{scale}_{row}"], ATOL)
            else:
                close(merged[::17], z[f"merged_stride_{scale}_{row}"], ATOL)
                close(merged.sum(0) / len(merged), z[f"merged_sum_{scale}_{row}"] / len(merged), ATOL)
        row, at = z[f"logit_rows_{scale}"].T
        close(out.logits[row, 0, at], z[f"logits_{scale}"], ATOL)
        sums = np.log(np.exp(np.float64(out.logits[:, 0, :T])).sum(-1))
        close(sums[mask], z[f"logsumexp_{scale}"][mask], ATOL)
        close(out.loss, z[f"loss_{scale}"], ATOL)


def test_several_scales_in_one_packed_batch(unpad):
    some = unpad.scales[:3]
    loss = unpad.forward(unpad.batch(some)).loss
    close(loss, np.mean([unpad.z[f"loss_{s}"] for s in some]), ATOL)


@pytest.mark.parametrize(("merge", "name"), [("spatial", "spatial"), ("flat", "flat")])
def test_other_merges(make, merge, name):
    m = make(merge)
    scales = sorted({int(k.split("_")[2]) for k in m.z.files if k.startswith(f"merged_{name}_")})
    assert scales and not m.config.model.newline
    bank = m.bank(m.batch([scales[0]])["pixels"])
    for scale in scales:
        for row in range(len(m.rows)):
            close(bank[row][m.slots(row, scale)], m.z[f"merged_{name}_{scale}_{row}"], ATOL)


def test_a_picture_of_one_crop_gets_one_newline(unpad, golden):
    with np.load(golden / "m3/llava15.npz") as z:
        pixels = unpad.pixels(z["pixel_values"][:1])
    layout = unpad.layout(unpad.scales)
    bank = unpad.bank(pixels[None])
    for key in [k for k in unpad.z.files if k.startswith("single_")]:
        scale = int(key.removeprefix("single_"))
        cells = layout.visual.slots((), scale, (1, 1))
        before = sum(unpad.scales[: unpad.scales.index(scale)])
        close(bank[0][np.where(cells < 0, -1, before + cells)], unpad.z[key], ATOL)


@pytest.mark.long
def test_greedy_tokens_at_every_scale(unpad):
    prompts = {scale: unpad.batch([scale], rows=[0], scales=(scale,)) for scale in unpad.scales}
    longest = max(batch["id"].shape[-1] for batch in prompts.values())  # a length for all: one program decodes them
    for scale in unpad.scales:
        want = unpad.z[f"gen_tokens_{scale}"]
        batch = unpad.batch([scale], longest, rows=[0], scales=(scale,))
        np.testing.assert_array_equal(unpad.greedy(batch, scale, len(want))[0], want)
