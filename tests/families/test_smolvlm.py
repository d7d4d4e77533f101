"""SmolVLM beside transformers: ids, pixels, logits and answers, gradients, trained, and exported again."""

import json

import jax
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.config import ConfigError, visual_layout
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.views import longest_tilings, make_views, sizes_by_longest
from lmm_jax.hf.names import original_name
from lmm_jax.hf.read_config import LoadError
from tests.families import beside, smolvlm
from tests.families.granite import page, rows
from tests.release.recipes import CONFIGS

NEW = 12
# Prompts, and the sizes of the pictures in them.
CASES = {
    "wide": (("<image>What is it?",), [(50, 20)]),
    "square": (("<image>What is it?",), [(40, 40)]),
    "several": (("<image>Is it<image>?", "a page", "and<image>"), [(50, 40), (13, 160), (700, 64)]),
    "text alone": (("What is it?",), []),
}
FEW = ("wide", "several")
SHOWN = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in CASES]


@pytest.fixture(scope="module")
def released(transformers, tmp_path_factory):
    """`(folder, transformers' model, its image processor, its tokenizer, our model)`."""
    import torch

    folder = tmp_path_factory.mktemp("smolvlm")
    return folder, *smolvlm.write(folder, transformers, torch), lmm.load(folder, dtype="float32")


def inputs_and_batch(released, case):
    """`(pictures, our prompt, their inputs, our batch)` of a case."""
    _, _, processor, tokenizer, model = released
    turns, sizes = CASES[case]
    pictures = [page(*size, seed=n) for n, size in enumerate(sizes)]
    ours = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    inputs = smolvlm.inputs_of(pictures, smolvlm.prompt(*turns), processor, tokenizer)
    return pictures, ours, inputs, model.batch(pictures, ours, smolvlm.TOKENS)


@pytest.mark.parametrize("case", SHOWN)
def test_ids_pixels_logits_and_answers_are_those_of_transformers(released, case):
    import torch

    _, theirs, _, _, model = released
    pictures, ours, inputs, batch = inputs_and_batch(released, case)
    length = int((batch["segment"] > 0).sum())
    ids, slot = batch["id"].reshape(-1)[:length], batch["slot"].reshape(-1)[:length]
    assert np.where(slot >= 0, theirs.config.image_token_id, ids).tolist() == inputs["input_ids"][0].tolist()
    if pictures:
        visual, views = visual_layout(model.program.config), []
        for picture in pictures:  # the whole of each comes first here, and last there
            views += [len(views) + n for n in visual.views_in_sequence(visual.tiling(*picture.size))]
        pixels = batch["pixels"][0][views].astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(np.moveaxis(pixels, -1, -3), inputs["pixel_values"][0].numpy(), atol=1e-5)
    with torch.no_grad():
        want = theirs(**inputs).logits[0].numpy()
    pieces = model.tokenizer.vocab_size
    assert want.std() > 0.1
    _, found = beside.hidden_and_logits(model, batch, smolvlm.TOKENS)
    np.testing.assert_allclose(found[:length, :pieces], want[:, :pieces], atol=1e-4)
    new = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    new = new[: new.index(model.stop)] if model.stop in new else new
    assert model.generate_ids([pictures], [ours], max_new_tokens=NEW) == [new]
    assert len(set(new)) > 2


@pytest.mark.parametrize("side, most", [(32, 3), (64, 4), (512, 4), (384, 4), (32, 1)])
def test_pictures_of_any_shape_have_the_tiles_of_smolvlms_processor(transformers, side, most):
    """Their sizes are compared at all shapes, and of small tiles the pixels of some."""
    from transformers.models.smolvlm import image_processing_pil_smolvlm as released

    longest, rng = side * most, np.random.default_rng(0)
    sizes = [(1, 1), (1, 900), (900, 1), (longest, longest), (longest, longest - 1), (longest + 1, longest)]
    sizes += [(longest, side * n) for n in range(1, most + 1)] + [(side * n + 1, longest) for n in range(most)]
    sizes += np.exp(rng.uniform(0, np.log(5000), (3000, 2))).astype(int).clip(1).tolist()
    scaled, tiles = sizes_by_longest(sizes, side, most)
    assert set(map(tuple, tiles.tolist())) <= set(longest_tilings(most))
    processor = smolvlm.image_processor(longest, side)

    class Shape:
        """A picture that has a shape and no pixels."""

        def __init__(self, height, width):
            self.shape = (3, height, width)

    def resized(_, size, **__):
        return size.height, size.width

    processor.resize = resized
    for (width, height), (w, h), (across, down) in zip(sizes, scaled.tolist(), tiles.tolist(), strict=True):
        theirs = released.get_resize_output_image_size(Shape(height, width), longest)
        assert theirs == (h, w)
        assert processor.resize_for_vision_encoder(Shape(h, w), side) == (down * side, across * side)
    if side > 64:
        return
    processor = smolvlm.image_processor(longest, side)
    for (width, height), tiling in [*zip(sizes, map(tuple, tiles.tolist()), strict=True)][:40]:
        picture = page(min(width, 900), min(height, 900), seed=width)
        made = processor([[picture]], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        if picture.size == (width, height):
            tiling = () if tiling == (1, 1) else tiling
            views = make_views(picture, side, "longest", tiling)
            np.testing.assert_array_equal(np.roll(views, -1, axis=0).transpose(0, 3, 1, 2), made)


@pytest.mark.parametrize("side", range(4, 64))
def test_the_sides_that_are_refused_are_those_where_positions_differ(transformers, side):
    import torch
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    from lmm_jax.families import ENCODERS

    config = transformers.models.smolvlm.SmolVLMVisionConfig(hidden_size=1, image_size=side, patch_size=1)
    module = SmolVLMVisionEmbeddings(config)
    with torch.no_grad():
        module.patch_embedding.weight.zero_(), module.patch_embedding.bias.zero_()
        module.position_embedding.weight.copy_(torch.arange(side * side, dtype=torch.float32)[:, None])
        found = module(torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool))
    same = torch.equal(found[0, :, 0], torch.arange(side * side, dtype=torch.float32))
    assert same == (side not in ENCODERS["smolvlm"].misplaced)


def test_packed_copies_have_the_loss_and_the_gradients_of_transformers(released):
    _, theirs, processor, tokenizer, model = released
    pictures = [page(50, 20), page(13, 60, seed=1)]
    turns = [("user", "<image>Is it<image>?"), ("assistant", "7 of 89, 1,234")]
    batch, supervised = beside.training_batch(model, turns, pictures, (smolvlm.TOKENS,))
    theirs.zero_grad()
    text = smolvlm.prompt(turns[0][1]) + " " + turns[1][1] + "<end_of_utterance>"
    inputs = smolvlm.inputs_of(pictures, text, processor, tokenizer)
    labels = inputs["input_ids"].clone()
    labels[:, :-supervised] = beside.IGNORED
    loss = theirs(**inputs, labels=labels).loss
    loss.backward()
    found, grads = beside.gradients(model, batch)
    assert found == pytest.approx(loss.item(), abs=1e-5)
    beside.same_gradients(grads, theirs)


BAD = {
    "config.json": [
        ({"scale_factor": 0}, "scale_factor = 0 is not supported"),
        ({"vision_config": {"hidden_act": "gelu"}}, "hidden_act = 'gelu'"),
        (
            {"vision_config": {"image_size": 100}},
            "transformers gives some of them another's position",
        ),
    ],
    "preprocessor_config.json": [
        ({"do_image_splitting": False}, "do_image_splitting = False"),
        ({"resample": 3}, "resample = 3"),
        ({"size": {"longest_edge": 100}}, "size = {'longest_edge': 100}"),
        ({"size": {"height": 96, "width": 96}}, "size = {'height': 96, 'width': 96}"),
        ({"max_image_size": {"longest_edge": 64}}, "max_image_size: pictures of 64 pixels for a tower of 32"),
        ({"image_processor_type": "Idefics2ImageProcessor"}, "'Idefics2ImageProcessor' is not supported"),
    ],
}


@pytest.mark.parametrize("file, change, words", [(file, *bad) for file, of in BAD.items() for bad in of])
def test_what_is_not_reproduced_is_refused_by_file_key_and_value(released, tmp_path, file, change, words):
    for path in released[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = json.loads((tmp_path / file).read_text())
    for key, value in change.items():
        content[key] = content[key] | value if key == "vision_config" else value
    if change == {"vision_config": {"image_size": 100}}:  # of 25 patches a side
        about = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").unlink()
        about |= {"max_image_size": {"longest_edge": 100}, "size": {"longest_edge": 300}}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(LoadError) as error:
        lmm.load(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def config_of(released, data, *overrides):
    arguments = f"model={released[0]},data={data},steps=5,packs=8,length=512,rate=1e-2"
    return lmm.load_config(
        f"{CONFIGS}/smolvlm.py:{arguments}", "model.dtype=float32", "train.log_every=1", *overrides
    )


@pytest.mark.parametrize(
    "field, words",
    [
        ("data.tilings=((3,1),(3,2))", "must be all with a side of n tiles"),
        ("data.sequence=whole", "goes with data.sequence='tiles' or 'flat'"),
        ("model.vision.image_size=2048", "4096 of them in a row at most"),
    ],
)
def test_fields_that_do_not_go_with_the_longest_side_are_refused(field, words):
    with pytest.raises(ConfigError, match=words):
        lmm.load_config(f"{CONFIGS}/smolvlm.py", field)


@pytest.mark.long
def test_five_steps_train_and_what_was_trained_comes_back_to_the_bit(released, transformers, tmp_path):
    """At its own budget and a nested one, packed and scanned over eight devices, exported and read by both."""
    import torch

    prepare.prepare_rows(rows(tmp_path), None, tmp_path / "data", released[0], "smolvlm", workers=0, max_refused=0.0)
    config = config_of(released, tmp_path / "data", "model.scales=(1,4)", "mesh.fsdp=8")
    assert lmm.train(config, tmp_path / "run")["step"] == 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    lmm.export(tmp_path / "run", tmp_path / "out")
    ours, again = lmm.load(tmp_path / "run"), lmm.load(tmp_path / "out", dtype="float32")
    assert again.scales == (1, 4)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    want = beside.original(ours.params, ours.program.config.model)
    for name, x in theirs.named_parameters():
        np.testing.assert_array_equal(x.detach().numpy(), want[original_name(name)][: len(x)], name)
