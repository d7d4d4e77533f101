"""LLaVA-OneVision beside transformers: ids, pixels, logits and answers, gradients, trained, and exported again."""

import json
import types

import jax
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.config import ConfigError, visual_layout
from lmm_jax.data.images import open_picture
from lmm_jax.data.pipeline import Packs
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepared import as_turns
from lmm_jax.families import WHOLES
from lmm_jax.hf.names import original_name
from lmm_jax.hf.processor import write_processor
from lmm_jax.hf.read_config import LoadError, read_model_config
from lmm_jax.hf.write_config import architecture, original_keys, transformers_keys
from lmm_jax.tools.shown_pack import ShownPack
from tests.families import beside, onevision
from tests.families.granite import page
from tests.release.recipes import CONFIGS

NEW = 12
# Prompts, and the sizes of the pictures in them. What is large is shrunk; "several" are seen whole.
CASES = {
    "small": (("<image>\nWhat is it?",), [(40, 25)]),
    "large": (("<image>\nWhat is it?",), [(160, 130)]),
    "tall": (("<image>\nWhat is it?",), [(60, 190)]),
    "thin": (("<image>\nWhat is it?",), [(400, 20)]),
    "several": (("<image>\nIs it<image>?", "7", "and?"), [(40, 70), (130, 20)]),
    "text alone": (("What is it?",), []),
}
FEW = ("small", "large", "several")
SHOWN = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in CASES]


@pytest.fixture(scope="module")
def released(transformers, tmp_path_factory):
    """`(folder, transformers' model, its processor, our model)`."""
    import torch

    folder = tmp_path_factory.mktemp("onevision")
    return folder, *onevision.write(folder, transformers, torch), lmm.load(folder, dtype="float32")


def inputs_and_batch(released, case):
    """`(pictures, our prompt, their inputs, our batch)` of a case."""
    _, _, processor, model = released
    turns, sizes = CASES[case]
    pictures = [page(*size, seed=n) for n, size in enumerate(sizes)]
    ours = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    # Pictures of a conversation are a list of their own, as `apply_chat_template` hands them on.
    inputs = processor(images=[pictures] if pictures else None, text=[onevision.prompt(*turns)], return_tensors="pt")
    return pictures, ours, inputs, model.batch(pictures, ours, onevision.TOKENS)


@pytest.mark.parametrize("case", SHOWN)
def test_ids_pixels_logits_and_answers_are_those_of_transformers(released, case):
    import torch

    _, theirs, _, model = released
    pictures, ours, inputs, batch = inputs_and_batch(released, case)
    length = int((batch["segment"] > 0).sum())
    ids, slot = batch["id"].reshape(-1)[:length], batch["slot"].reshape(-1)[:length]
    assert np.where(slot >= 0, theirs.config.image_token_index, ids).tolist() == inputs["input_ids"][0].tolist()
    assert (batch["blend_share"] % 1 > 0).any() == (case in ("large", "tall"))
    if pictures:
        vision = model.program.config.model.vision
        pixels = (batch["pixels"][0].astype(np.float32) / 255 - vision.mean) / vision.std
        want = np.concatenate(list(inputs["pixel_values"].numpy()))
        np.testing.assert_allclose(np.moveaxis(pixels, -1, -3), want, atol=1e-5)
    with torch.no_grad():
        want = theirs(**inputs).logits[0].numpy()
    pieces = model.tokenizer.vocab_size
    assert want.std() > 0.1
    _, found = beside.hidden_and_logits(model, batch, onevision.TOKENS)
    np.testing.assert_allclose(found[:length, :pieces], want[:, :pieces], atol=1e-4)
    new = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    new = new[: new.index(model.stop)] if model.stop in new else new
    assert model.generate_ids([pictures], [ours], max_new_tokens=NEW) == [new]
    assert len(set(new)) > 2


@pytest.mark.parametrize("most", [1, 4, 9])
def test_pictures_of_any_shape_have_the_tokens_of_transformers_in_their_shares(transformers, most):
    """At real size: how many by its processor, and of random features what its class makes of them."""
    import torch
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    side, grid = 384, 27
    config = lmm.load_config(f"{CONFIGS}/llava_onevision.py", f"data.shrink={most}")
    visual = visual_layout(config)
    pinpoints = WHOLES["llava_onevision"].defaults["image_grid_pinpoints"]
    assert [(rows * side, columns * side) for columns, rows in visual.tilings] == list(map(tuple, pinpoints))
    pieces = {"image_token": "<image>", "video_token": "<video>", "image_token_id": 1, "video_token_id": 2}
    tokenizer = types.SimpleNamespace(**pieces)
    processor = onevision.processor(onevision.image_processor(side, pinpoints), tokenizer, most, grid**2)
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(20), np.log(5000), (400, 2))).astype(int).tolist()
    sizes += [(side * n, side * m + d) for n in (1, 3, 6) for m in (1, 2, 6) for d in (-1, 0, 1)]
    counts = visual.tokens(sizes, grid**2).tolist()
    for (width, height), count in zip(sizes, counts, strict=True):
        assert processor._get_number_of_features(height, width, side, side) == count, (width, height)

    about = types.SimpleNamespace(image_size=side, patch_size=14)
    theirs = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=about, image_grid_pinpoints=pinpoints))
    newline, blended = rng.normal(size=2).astype(np.float32), 0
    for size in [(2000, 2000), (1900, 2300), (2304, 1920), (700, 3000), *sizes[::40]]:
        tiling = visual.tiling(*size)
        features = rng.normal(size=(visual.views_of_tiling(tiling), grid**2, 2)).astype(np.float32)
        (want,), _ = LlavaOnevisionModel.pack_image_features(
            theirs, [torch.tensor(features)], [size[::-1]], torch.tensor(newline), f"anyres_max_{most}"
        )
        slots, shares = visual.blends(tiling, grid**2, size)
        table = np.concatenate([features.reshape(-1, 2), newline[None]])  # the newline is slot -1
        np.testing.assert_allclose((table[slots] * shares[..., None]).sum(axis=1), want.numpy(), atol=1e-4)
        blended += bool((shares % 1 > 0).any())
    assert blended > 2


def test_packed_copies_have_the_loss_and_the_gradients_of_transformers(released):
    _, theirs, processor, model = released
    picture = page(160, 130)
    turns = [("user", "<image>\nIs it?"), ("assistant", "7 of 89, 1,234")]
    batch, supervised = beside.training_batch(model, turns, [picture], (onevision.TOKENS,))
    assert (batch["blend_share"] % 1 > 0).any()
    theirs.zero_grad()
    text = onevision.prompt(turns[0][1]) + turns[1][1] + "<|im_end|>"
    inputs = processor(images=[[picture]], text=[text], return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :-supervised] = beside.IGNORED
    loss = theirs(**inputs, labels=labels).loss
    loss.backward()
    found, grads = beside.gradients(model, batch)
    assert found == pytest.approx(loss.item(), abs=1e-5)
    beside.same_gradients(grads, theirs, ("post_layernorm.", "vision_model.head.", "vision_tower.head."))


@pytest.fixture(scope="module")
def prepared(released, tmp_path_factory):
    """A folder of conversations: text alone, a small picture, a large one, and two."""
    folder = tmp_path_factory.mktemp("rows")
    rows = onevision.write_rows(folder, page)
    prepare.prepare_rows(rows, None, folder / "data", released[0], "chatml", workers=0, max_refused=0.0)
    return folder / "data"


def config_of(released, data):
    """Of five steps at its own budget and a nested one."""
    arguments = f"model={released[0]},data={data},steps=5,packs=8,length=256,rate=1e-2"
    fields = ("model.dtype=float32", "train.log_every=1", "model.scales=(1,9)", "mesh.fsdp=8")
    return lmm.load_config(f"{CONFIGS}/llava_onevision.py:{arguments}", *fields)


def test_packs_hold_at_every_budget_what_is_asked_alone(released, prepared):
    """Every copy of every pack: its ids, and what stands at its positions by the bank's features and their shares."""
    model, config = released[3], config_of(released, prepared)
    packs = Packs(config, visual_layout(config), "train", 2, shuffle=True)
    kinds, blended = set(), 0
    for position in range(8):
        pack, members, layout = packs[position], packs.members(position), packs.layout_at(position)
        shown = ShownPack.read(packs, position)
        pictures = {len(packs.sizes(*member)) for member in members}
        several = layout.visual.aspect == "pad"
        assert all((count > 1) == several for count in pictures)
        kinds |= pictures
        if "pixels" not in pack:
            assert "blend_slot" not in pack
            continue
        for copy in shown.copies:
            images = [open_picture(data) for data in packs.data[0][members[copy.member][1]]["images"]]
            scale, where = copy.scales[0], (copy.row, slice(copy.begin, copy.end))
            (turns,) = [as_turns(packs.data[0][members[copy.member][1]])]
            asked = model.batch(images, [{"role": "user", "content": turns[0].text}], scale)
            length = int((asked["segment"] > 0).sum())
            assert pack["id"][where][:length].tolist() == asked["id"].reshape(-1)[:length].tolist()
            if not images:
                continue
            # Each slot is worth the number of its picture's token; those of this copy are counted from its first.
            first = [
                picture for picture, of in zip(shown.pictures, shown.picture_of, strict=True) if of == copy.member
            ]
            tokens = layout.grids * sum(layout.scales[: layout.scales.index(scale)]) + first[0].first_grid * scale
            found, alone = pack["blend_slot"][where][:length], asked["blend_slot"].reshape(-1, 4)[:length]
            newline = alone == alone.max()
            np.testing.assert_array_equal(np.where(newline, layout.newline, alone + tokens * (alone >= 0)), found)
            shares = asked["blend_share"].reshape(-1, 4)[:length]
            np.testing.assert_array_equal(pack["blend_share"][where][:length], shares)
            blended += bool((shares % 1 > 0).any())
    assert kinds == {0, 1, 2} and blended > 1


@pytest.mark.parametrize("scale", [1, onevision.TOKENS])
def test_a_nested_budget_answers_as_its_logits_say(released, scale):
    """Whoever answers reads what was seen of a picture once from memory, and blends it there."""
    model, picture = released[3], page(90, 60)
    batch = model.batch([picture], "<image>\nIs it?", scale)
    assert (batch["blend_share"] % 1 > 0).any()
    _, logits = beside.hidden_and_logits(model, batch, scale)
    length = int((batch["segment"] > 0).sum())
    assert model.generate_ids([[picture]], ["<image>\nIs it?"], scale, 1) == [[int(logits[length - 1].argmax())]]


def test_what_is_written_says_the_same_model_again(released, tmp_path):
    folder, _, _, model = released
    config = model.program.config
    whole = architecture(config)
    assert whole.name == "llava_onevision"
    keys = transformers_keys(config, model.tokenizer, whole)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    write_processor(tmp_path, config, model.tokenizer, whole)
    assert read_model_config(tmp_path).to_dict() == read_model_config(folder).to_dict()
    said = json.loads((folder / "config.json").read_text())
    same = ("image_token_index", "video_token_index", "vision_aspect_ratio", "image_grid_pinpoints")
    assert [keys[key] for key in same] == [said[key] for key in same]
    made = type(onevision.image_processor()).from_pretrained(tmp_path)  # and transformers makes the same pixels of it
    for size in ((40, 25), (160, 130)):
        pictures = [page(*size)]
        found, want = (of(pictures, return_tensors="np") for of in (made, onevision.image_processor()))
        np.testing.assert_allclose(found["pixel_values"], want["pixel_values"], atol=1e-6)
    about = json.loads((tmp_path / "processor_config.json").read_text())
    assert about["num_image_tokens"] == onevision.TOKENS and about["vision_aspect_ratio"] == "anyres_max_2"


@pytest.mark.parametrize(
    "fields, words",
    [
        (("data.shrink=0",), "data.shrink=0 cannot be exported, 1 to 64 can: nearest among transformers' classes is"),
        (("data.tiled_alone=False",), "data.tiled_alone=False cannot be exported, True can"),
        (("data.shrink=0", "data.tiled_alone=False"), None),
    ],
)
def test_what_no_class_of_transformers_computes_is_not_exported(fields, words):
    config = lmm.load_config(f"{CONFIGS}/llava_onevision.py", *fields)
    if words is None:
        assert architecture(config).name == "llava_next"
        return
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        architecture(config)
    with pytest.raises(ValueError, match=r"data\.(shrink=9|tiled_alone=True) cannot be exported"):
        original_keys(config)


BAD = {
    "config.json": [
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio = 'anyres' is not supported, 'anyres_max_n'"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio = 'anyres_max_0'"),
        ({"vision_aspect_ratio": "anyres_max_99"}, "n of 1 to 64 is"),
        ({"vision_feature_layer": [-1, -2]}, "vision_feature_layer = [-1, -2] names several layers"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy = 'default'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False"),
        ({"image_grid_pinpoints": [[30, 31]]}, "are not multiples of 30 pixels"),
        ({"image_grid_pinpoints": [[30, 30]]}, "is another list than that of config.json"),
    ],
    "preprocessor_config.json": [
        ({"do_center_crop": True}, "do_center_crop = True"),
        ({"crop_size": {"height": 30, "width": 30}}, "crop_size = {'height': 30, 'width': 30}"),
        ({"size": {"height": 30, "width": 40}}, "size = {'height': 30, 'width': 40}"),
        ({"size": {"height": 60, "width": 60}}, "pictures of 60 pixels for a tower of 30"),
        ({"size": None}, "pictures of 384 pixels for a tower of 30"),
        ({"resample": 2}, "resample = 2"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "'LlavaNextImageProcessor' is not supported"),
    ],
}


@pytest.mark.parametrize("file, change, words", [(file, *bad) for file, of in BAD.items() for bad in of])
def test_what_is_not_reproduced_is_refused_by_file_key_and_value(released, tmp_path, file, change, words):
    for path in released[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    content = json.loads((tmp_path / file).read_text()) | change
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(LoadError) as error:
        lmm.load(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "fields, words",
    [
        (("data.sequence=grid",), r"data.shrink=9 goes with data.sequence='unpad' and data.tilings, got 'grid'"),
        (("data.tilings=()",), r"data.tiled_alone=True: data.tilings is empty"),
        (("data.tilings=()", "data.tiled_alone=False"), r"data.shrink=9 goes with data.sequence='unpad'"),
        (("data.aspect=pad", "data.tilings=((2,2),)"), r"data.sequence='unpad' needs data.aspect='anyres'"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        lmm.load_config(f"{CONFIGS}/llava_onevision.py", *fields)


@pytest.mark.long
def test_five_steps_train_and_what_was_trained_comes_back_to_the_bit(released, prepared, transformers, tmp_path):
    """At its own budget and a nested one, packed and scanned over eight devices, exported and read by both."""
    import torch

    config = config_of(released, prepared)
    assert lmm.train(config, tmp_path / "run")["step"] == 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    lmm.export(tmp_path / "run", tmp_path / "out")
    ours, again = lmm.load(tmp_path / "run"), lmm.load(tmp_path / "out", dtype="float32")
    assert again.scales == (1, 9)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and type(theirs).__name__ == "LlavaOnevisionForConditionalGeneration"
    want = beside.original(ours.params, ours.program.config.model)
    for name, x in theirs.named_parameters():
        if "post_layernorm" not in name:  # which nothing reads
            np.testing.assert_array_equal(x.detach().numpy(), want.pop(original_name(name))[: len(x)], name)
    assert set(want) <= {"lm_head.weight"}
