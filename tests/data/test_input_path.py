"""Prepared conversations through the whole input path: pictures of many shapes, text alone."""

import json

import numpy as np
import pytest
from PIL import Image

import lmm_jax as lmm
from lmm_jax.config import use_encoder
from lmm_jax.data.packing import NO_ROW
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import as_pictures, as_turns
from tests.opened import open_packs

WORDS = tuple(f"word{i}" for i in range(25))


def text_rows(path, count):
    rng = np.random.default_rng(1)
    with path.open("w") as f:
        for n in rng.integers(1, 20, count):
            turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": sentence(rng, n)}]
            f.write(json.dumps({"conversations": turns}) + "\n")


def sentence(rng, n):
    return " ".join(rng.choice(WORDS, n))


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """48 conversations of 0 to 3 drawn pictures and 1 to 4 rounds, a third of them text alone."""
    folder, rng = tmp_path_factory.mktemp("mixed"), np.random.default_rng(0)
    rows = []
    for i in range(48):
        names = []
        for k in range(0 if i % 3 == 0 else 1 + i % 3):
            names.append(f"{i}_{k}.png")
            size = rng.integers(8, 60, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / names[-1])
        turns = []
        for n in range(1 + i % 4):
            tags = "<image>\n" * len(names) if n == 0 else ""
            turns.append({"role": "user", "content": tags + sentence(rng, rng.integers(3, 9))})
            turns.append({"role": "assistant", "content": sentence(rng, rng.integers(1, 12))})
        rows.append({"id": f"row{i}", "images": names, "messages": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    counts = prepare_rows(folder / "rows.json", None, folder / "out", template="qa", workers=0)
    assert counts["rows"] == 48 and not counts["refused"]
    return folder / "out"


@pytest.fixture(scope="module")
def config(tiny, mixed_folder):
    def make(*overrides):
        own = (f"data.path={mixed_folder}", "data.length=512", "data.max_left_out=1")  # for thin pictures on canvases
        config = tiny("model.decoder.vocab_size=512", *own, *overrides)
        with config.unlocked():
            config.data.rows = config.data.views = config.data.targets = None
        return config

    return make


def test_the_planner_packs_conversations_with_their_pictures(config):
    packs = open_packs(config("train.scales_per_step=4"), "train", packs_per_step=2, shuffle=True)
    seen, tokens = [], packs.data[0].index
    for position in range(packs.stream._end(0)):
        pack = packs[position]
        assert not pack["faults"]
        seen += pack["record_index"].tolist()
        # Each segment is one conversation at one scale, its positions counted from 0.
        starts = (pack["position"] == 0) & (pack["segment"] > 0)
        assert starts.sum() == len(np.unique(pack["segment"][pack["segment"] > 0]))
        # Copies stand where they were planned: record by record, the longest first.
        planned = [n for s, r in packs.members(position) for n in packs.datasets[s].needs.copies[r] if n]
        stands = [np.argwhere(pack["segment"] == number) for number in range(1, len(planned) + 1)]
        assert [len(at) for at in stands] == planned
        rows = packs.stream[position].rows
        assert [at[0, 0] for at in stands] == rows[rows != NO_ROW].tolist()
        assert pack["slot"].max() < packs.layout.views * sum(packs.layout.scales)
    assert sorted(seen) == list(range(48))
    assert packs.layout.views > 3 and (tokens["turn_images"].max()) == 3


LAYOUTS = {
    "unpad": dict(aspect="anyres", tilings=((1, 2), (2, 1), (2, 2)), sequence="unpad"),
    "L": dict(aspect="stretch", tilings=((1, 2), (2, 1), (2, 2)), stacks="samples"),
    "HD": dict(aspect="stretch", tilings=((1, 2), (2, 1)), zoom=2, sequence="grid", stacks="zoom"),
    "V": dict(aspect="stretch", tilings=((2, 2),), stacks="encoder"),
    "own": dict(aspect="own", canvas=(72, 72)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pack_shows_each_conversation_what_it_shows_alone(config, name):
    """Colours stand for features: what lies at each position of a pack, and over it, however it is packed."""
    config = config("model.scales=(9,1)", "train.scales_per_step=2", "data.length=1024", "data.too_long=cut")
    with config.unlocked():
        config.data.update(LAYOUTS[name])
        config.model.newline = name in ("unpad", "HD")
        config.model.decoder.inject_layers = tuple(range({"L": 4, "HD": 4}.get(name, 0)))
        config.model.vision.update(image_size=24, patch_size=8, depth=2, regroup=(1, 2) if name == "V" else ())
        if name == "own":
            config.model.encoder, config.model.vision = (
                "convnext",
                {"image_size": 24, "patch_size": 4, "depths": (1, 1), "widths": (8, 8)},
            )
    packs = open_packs(config, "train", packs_per_step=1, shuffle=True)
    layout, views = packs.layout, []
    for position in range(packs.stream._end(0)):
        pack, segments = packs[position], iter(range(1, 99))
        assert not pack["faults"]
        visible = colours(pack, layout)
        for member in packs.members(position):
            record, sizes = packs.data[0][member[1]], packs.datasets[0].all_sizes(member[1])
            shown = layout.place(packs.sizes(*member))
            views.append(sum(layout.visual.views_of_tiling(p.tiling) for p in shown))
            segment = layout.training_segments(as_turns(record), sizes, packs.tokenizer, (9, 1))
            seen = [(p.size, layout.see(picture)) for p, picture in zip(shown, as_pictures(record), strict=False)]
            alone = layout.assemble(segment, seen)
            by_itself = colours(alone, layout)
            for number in range(1, 1 + len(segment)):
                there, here = pack["segment"] == next(segments), alone["segment"] == number
                np.testing.assert_array_equal(pack["id"][there], alone["id"][here])
                np.testing.assert_array_equal(visible[:, there], by_itself[:, here])
    assert len(set(views)) > 2 and layout.views > max(views)


def colours(pack, layout):
    """`[1 + S, R, T, 3]`: mean colour of what stands at each position, then of what each stack adds; newline is 1."""
    a = layout.visual
    (rows, columns), k = a.view_grid, a.cell
    cells = pack["pixels"].astype(float).reshape(-1, rows, k, columns, k, 3).mean((2, 4))
    if a.stacks == "encoder":
        cells = cells.reshape(-1, 5, rows, columns, 3).sum(1)  # some function of all views of a picture
    table = np.concatenate([cells.reshape(-1, 3), np.zeros((1, 3))])
    grids = cells[None] if a.direct else table[pack["gather"]]
    banks = []
    for grid in grids:
        parts = [grid[:, : rows // j * j, : columns // j * j] for j in (1, 3)]
        parts = [
            x.reshape(-1, x.shape[1] // j, j, x.shape[2] // j, j, 3).mean((2, 4))
            for x, j in zip(parts, (1, 3), strict=True)
        ]
        banks.append(np.concatenate([*(x.reshape(-1, 3) for x in parts), np.ones((1, 3))]))
    assert pack["slot"].max() < len(banks[0])
    return np.where((pack["slot"] >= 0)[..., None], np.stack(banks)[:, pack["slot"]], -1)


def test_pictures_that_are_too_thin_are_left_out_and_named(config, tmp_path):
    Image.new("RGB", (900, 8)).save(tmp_path / "thin.png")
    Image.new("RGB", (90, 80)).save(tmp_path / "good.png")
    turns = [("user", "<image>\nwhat"), ("assistant", "this"), ("user", "and <image>"), ("assistant", "that")]
    rows = [
        {
            "images": list(names),
            "messages": [{"role": role, "content": text} for role, text in turns[: 2 * len(names)]],
        }
        for names in (("good.png",), ("thin.png",), ("good.png", "thin.png"))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare_rows(tmp_path / "rows.json", None, tmp_path / "out", template="qa", workers=0)
    config = config("model.scales=(9,1)", "train.scales_per_step=2", f"data.path={tmp_path / 'out'}")
    with config.unlocked():
        config.data.update(LAYOUTS["own"], rows=1, views=1)
        use_encoder(config, "convnext")
        config.model.vision.update(image_size=24, depths=(1, 1), widths=(8, 8))
    packs = open_packs(config, "train", packs_per_step=1, shuffle=True)
    assert packs.left_out == [(0, 1), (0, 2)] and packs.members(0) == [(0, 0)]
    assert {reason for *_, reason in packs.why_left_out()} == {"a picture is too thin to have a visual token"}


@pytest.mark.long
def test_a_batch_without_pictures_has_no_pixels_and_trains(config, mixed_folder, tmp_path):
    text_rows(tmp_path / "rows.jsonl", 60)
    prepare_rows(
        tmp_path / "rows.jsonl", None, tmp_path / "text", mixed_folder / "tokenizer.model", template="qa", workers=0
    )
    both = config(
        "train.batch_size=1", "train.steps=12", "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=8", "data.length=128"
    )
    with both.unlocked():
        both.data.path, both.data.mixture = None, ((str(mixed_folder), 1.0), (str(tmp_path / "text"), 40.0))
        both.data.rows, both.data.views = 1, 2
    packs = open_packs(both, "train", packs_per_step=1, shuffle=True)
    shows = ["pixels" in packs[p] for p in range(12)]
    assert True in shows and False in shows
    assert shows == [any(dataset == 0 and record % 3 for dataset, record in packs.members(p)) for p in range(12)]
    result = lmm.train(both, tmp_path / "run")
    assert result["step"] == 12 and np.isfinite(result["loss"]) and result["bad_records"] == 0
