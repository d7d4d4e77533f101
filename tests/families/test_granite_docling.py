"""Granite-Docling beside transformers: ids, pixels, logits, answers and the router, trained, and exported again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax.config import ConfigError, visual_layout
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.packing import Capacity
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.generation.auto import by_density
from lmm_jax.hf.names import original_name
from lmm_jax.release.verify import LOGITS
from tests.families import beside, granite
from tests.release.recipes import CONFIGS

NEW = 12
# Prompts, and the sizes of the pictures in them: one tile, several, and pictures in several turns.
CASES = {
    "one tile": (("<image>What is it?",), [(50, 40)]),
    "wide": (("<image>What is it?",), [(300, 120)]),
    "tall": (("<image>What is it?",), [(130, 260)]),
    "several": (("<image>Is it<image>?", "a page", "and\n<image>"), [(50, 40), (130, 260), (70, 64)]),
    "text alone": (("What is it?",), []),
}
FEW = ("one tile", "several")
SHOWN = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in CASES]


@pytest.fixture(scope="module")
def released(transformers, tmp_path_factory):
    """`(folder, transformers' model, its processor, our model)`."""
    import torch

    folder = tmp_path_factory.mktemp("granite")
    theirs, processor = granite.write(folder, transformers, torch)
    return folder, theirs, processor, lmm.load(folder, dtype="float32")


def asked(case):
    """`(pictures, prompt of ours, prompt of theirs)` of a case."""
    turns, sizes = CASES[case]
    pictures = [granite.page(*size, seed=n) for n, size in enumerate(sizes)]
    roles = ("user", "assistant")
    ours = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    # A line break behind a picture's tag belongs to the tag: the chat template makes them of one item.
    return pictures, ours, granite.prompt(*(turn.replace("<image>\n", "<image>") for turn in turns))


def pixels_in(inputs):
    """Tiles `[V, 3, H, W]` that transformers' processor made."""
    return inputs["pixel_values"][inputs["pixel_attention_mask"]].numpy()


def pixels_of(model, batch, pictures):
    """The same of a batch of ours, in which the whole of each picture comes first and not last."""
    visual, vision, views = visual_layout(model.program.config), model.program.model.vision, []
    for picture in pictures:
        views += [len(views) + n for n in visual.views_in_sequence(visual.tiling(*picture.size))]
    pixels = batch["pixels"][0][views].astype(np.float32) / 255
    return np.moveaxis((pixels - vision.mean) / vision.std, -1, -3)


@pytest.mark.parametrize("scale", granite.TOKENS)
@pytest.mark.parametrize("case", SHOWN)
def test_ids_pixels_logits_and_answers_are_those_of_transformers(released, case, scale):
    import torch

    _, theirs, processor, model = released
    pictures, ours, text = asked(case)
    inputs = processor(
        images=pictures or None, text=text, return_tensors="pt", fine_route=scale == max(granite.TOKENS)
    )
    batch = model.batch(pictures, ours, scale)
    length = int((batch["segment"] > 0).sum())
    ids, slot = batch["id"].reshape(-1)[:length], batch["slot"].reshape(-1)[:length]
    assert np.where(slot >= 0, theirs.config.image_token_id, ids).tolist() == inputs["input_ids"][0].tolist()
    if pictures:
        np.testing.assert_allclose(pixels_of(model, batch, pictures), pixels_in(inputs), atol=1e-5)
    with torch.no_grad():
        want = theirs(**inputs).logits[0].numpy()
    pieces = model.tokenizer.vocab_size
    assert want.std() > 0.1
    _, found = beside.hidden_and_logits(model, batch, scale)
    np.testing.assert_allclose(found[:length, :pieces], want[:, :pieces], atol=1e-4)
    new = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    new = new[: new.index(model.stop)] if model.stop in new else new
    assert model.generate_ids([pictures], [ours], scale=scale, max_new_tokens=NEW) == [new]
    assert len(set(new)) > 2


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1]])
def test_the_router_chooses_as_the_released_one_does(released, case):
    import torch

    _, theirs, processor, model = released
    pictures, ours, text = asked(case)
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    with torch.no_grad():
        router = theirs.model.density_router
        features, _ = theirs.model.vision_model.encode(inputs["pixel_values"][inputs["pixel_attention_mask"]])
        want = torch.sigmoid(router(features, torch.zeros(len(features), dtype=torch.long), 1)).item()
        fine = theirs.model.predict_fine_route(inputs["pixel_values"], inputs["pixel_attention_mask"]).item()
    found = model.expect(pictures, ours)
    np.testing.assert_allclose(found, [1 - want, want], atol=1e-5)
    assert model.auto.about["threshold"] == theirs.config.density_router_threshold
    assert (
        model.generate(pictures, ours, scale="auto", max_new_tokens=1, return_logprobs=True).scale
        == (granite.TOKENS[fine])
    )
    for threshold in (0.0, want - 1e-4, want + 1e-4, 1.0):
        chosen = by_density(model.scales, granite.TOKENS[0], threshold)
        assert chosen.first(chosen.way, found) == granite.TOKENS[want >= threshold]


@pytest.mark.long
def test_packed_copies_have_the_loss_and_the_gradients_of_transformers(released):
    """A conversation about two pages, at both budgets in one pack, trains as in transformers at each by itself."""
    _, theirs, processor, model = released
    pictures = [granite.page(50, 40), granite.page(130, 260, seed=1)]
    turns = [("user", "<image>Is it<image>?"), ("assistant", "7 of 89, 1,234")]
    batch, supervised = beside.training_batch(model, turns, pictures, granite.TOKENS)
    theirs.zero_grad()
    losses = []
    for scale in granite.TOKENS:
        text = granite.prompt(turns[0][1]) + turns[1][1] + "<|end_of_text|>"
        fine = scale == max(granite.TOKENS)
        inputs = processor(images=pictures, text=text, return_tensors="pt", fine_route=fine)
        labels = inputs["input_ids"].clone()
        labels[:, :-supervised] = beside.IGNORED
        loss = theirs(**inputs, labels=labels).loss / 2
        loss.backward()
        losses.append(loss.item())
    assert losses[0] != losses[1]
    loss, grads = beside.gradients(model, batch)
    assert loss == pytest.approx(sum(losses), abs=1e-5)
    beside.same_gradients(grads, theirs, ("density_router",))


def test_a_long_conversation_is_cut_behind_an_answer(released):
    """What is left of it is what the processor makes of its first rounds, marks and pictures included."""
    _, theirs, processor, model = released
    pictures = [granite.page(50, 40, seed=n) for n in range(3)]
    turns = [(role, text) for n in range(3) for role, text in (("user", f"<image>and {n}?"), ("assistant", f"{n} a"))]
    config = model.program.config
    visual = visual_layout(config).with_marks(model.tokenizer)
    said = granite.prompt(*(text for _, text in turns[:3])) + turns[3][1] + "<|end_of_text|>"
    for scale in granite.TOKENS:
        inputs = processor(
            images=pictures[:2], text=said, return_tensors="pt", fine_route=scale == max(granite.TOKENS)
        )
        want = inputs["input_ids"][0].tolist()
        layout = PackLayout.from_config(config, visual, Capacity(1, len(want) + 5, 3, 64))
        layout = dataclasses.replace(layout, too_long="cut", scales=(scale,))
        sizes = [picture.size for picture in pictures]
        (segment,) = layout.training_segments(turns, sizes, model.tokenizer, (scale,))
        found = np.where(segment.slot >= 0, theirs.config.image_token_id, segment.id)
        assert found.tolist() == want


@pytest.fixture(scope="module")
def prepared(released, tmp_path_factory):
    """A folder of conversations about pages, prepared with the model's tokenizer."""
    folder = tmp_path_factory.mktemp("pages")
    rows = granite.rows(folder)
    prepare.prepare_rows(rows, None, folder / "data", released[0], "granite", workers=0, max_refused=0.0)
    return folder / "data"


def config_of(released, data, *overrides):
    arguments = f"model={released[0]},data={data},steps=5,packs=8,length=512,rate=1e-2"
    return lmm.load_config(
        f"{CONFIGS}/granite_docling.py:{arguments}", "model.dtype=float32", "train.log_every=1", *overrides
    )


@pytest.fixture(scope="module")
def trained(released, prepared, tmp_path_factory):
    """A workdir of five steps at both budgets and one that is nested beneath them, over eight devices."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = config_of(released, prepared, "model.scales=(1,4,16)", "mesh.fsdp=8")
    assert lmm.train(config, workdir)["step"] == 5
    return workdir


@pytest.mark.long
def test_five_steps_train_all_but_encoder_and_router(released, trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    now, before = (flatten_dict(jax.device_get(m.params), sep="/") for m in (lmm.load(trained), released[3]))
    assert now.keys() == before.keys()
    changed = {path.split("/")[0] for path, x in now.items() if not np.array_equal(x, before[path])}
    assert changed == {"decoder", "projector", *(f"level_projectors_{n}" for n in range(3))}


@pytest.mark.long
def test_what_was_trained_runs_in_transformers_and_comes_back_to_the_bit(trained, transformers, tmp_path):
    import torch

    found = lmm.export(trained, tmp_path / "out", verify=True)
    assert found["max_logit_difference"] <= LOGITS
    ours, again = lmm.load(trained), lmm.load(tmp_path / "out", dtype="float32")
    assert again.scales == (1, 4, 16) and again.auto is not None
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    want = beside.original(ours.params, ours.program.config.model)
    for name, x in theirs.named_parameters():
        np.testing.assert_array_equal(x.detach().numpy(), want[original_name(name)][: len(x)], name)


def test_a_router_that_would_train_is_refused(released, prepared):
    with pytest.raises(ConfigError, match=r"it is read, not trained; add \('density_router', 0.0\)"):
        config_of(released, prepared, "optimizer.groups=(('vision',0.0),)")
