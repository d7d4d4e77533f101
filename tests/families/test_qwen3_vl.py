"""Qwen3-VL beside transformers: ids, positions, pixels, logits, answers and gradients, trained, exported again."""

import functools
import json
import math
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax.config import save_config, visual_layout
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.views import native_size
from lmm_jax.families.qwen3_vl import QWEN3_VL_TEXT, QWEN3_VL_VISION
from lmm_jax.hf.names import original_name
from lmm_jax.hf.read_config import LoadError, read_model_config
from lmm_jax.models.lmm import build
from lmm_jax.release.verify import patches_of
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import init_params
from tests.families import beside, qwen
from tests.release.recipes import CONFIGS

NEW = 12
# Parameters of whole models, a tied head counted once, as the hub counts them.
PUBLISHED = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696, "32b": 33_357_390_064}
# Prompts, and the sizes of the pictures in them.
CASES = {
    "one": (("<image>What is this?",), [(40, 30)]),
    "wide": (("<image>What is this?",), [(200, 20)]),
    "several": (("<image>a cat<image>?", "the mat", "<image>and the dog?"), [(90, 16), (20, 64), (8, 8)]),
    "text alone": (("What is this?",), []),
}
FEW = ("several",)
SHOWN = [name if name in FEW else pytest.param(name, marks=pytest.mark.long) for name in CASES]
LONG = " ".join(["the cat sat on the mat;"] * 24)  # more positions than what is kept of a prompt for the next


@pytest.fixture(scope="module")
def released(transformers, tmp_path_factory):
    """`(folder, transformers' model, its tokenizer, its image processor, our model)`."""
    import torch

    folder = tmp_path_factory.mktemp("qwen")
    return folder, *qwen.write(folder, transformers, torch), lmm.load(folder)


def asked(case):
    """`(pictures, prompt of ours, prompt of theirs)` of a case."""
    turns, sizes = CASES[case]
    pictures = [qwen.picture(*size, seed=n) for n, size in enumerate(sizes)]
    ours = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return pictures, ours, qwen.prompt(*turns)


def greedy(theirs, inputs, stop):
    found = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=0)
    new = found[0, inputs["input_ids"].shape[1] :].tolist()
    return new[: new.index(stop)] if stop in new else new


@pytest.mark.parametrize("case", SHOWN)
def test_ids_positions_pixels_logits_and_answers_are_those_of_transformers(released, case):
    import torch

    _, theirs, tokenizer, processor, model = released
    pictures, ours, text = asked(case)
    inputs = qwen.inputs(tokenizer, processor, text, pictures)
    batch = model.batch(pictures, ours)
    length = int((batch["segment"] > 0).sum())
    ids, slot = batch["id"].reshape(-1)[:length], batch["slot"].reshape(-1)[:length]
    assert np.where(slot >= 0, theirs.config.image_token_id, ids).tolist() == inputs["input_ids"][0].tolist()
    if pictures:
        grids = inputs["image_grid_thw"]
        position, _ = theirs.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], grids)
        np.testing.assert_array_equal(batch["position"][0, 0, :length].T, position[:, 0].numpy())
        for n, want in enumerate(qwen.unpatched(inputs["pixel_values"], grids)):
            height, width = batch["extent"][0, n]
            np.testing.assert_array_equal(batch["pixels"][0, n, :height, :width], want)
        views = [view[:h, :w] for view, (h, w) in zip(batch["pixels"][0], batch["extent"][0], strict=False)]
        patches = [patches_of(view.transpose(2, 0, 1) / 127.5 - 1, model.program.config.model) for view in views]
        want = inputs["pixel_values"].numpy()
        np.testing.assert_allclose(np.concatenate(patches)[: len(want)], want, atol=1e-5)
    with torch.no_grad():
        want = theirs(**inputs).logits[0].numpy()
    assert want.std() > 0.1
    _, found = beside.hidden_and_logits(model, batch)
    np.testing.assert_allclose(found[:length, : want.shape[1]], want, atol=1e-4)
    new = greedy(theirs, inputs, model.stop)
    assert model.generate_ids([pictures], [ours], max_new_tokens=NEW) == [new]
    assert len(set(new)) > 2


def test_fewer_pixels_are_a_budget_of_each_request(released):
    """A picture is made smaller as transformers' processor does with so many pixels, and takes fewer tokens."""
    _, theirs, tokenizer, processor, model = released
    picture, question = qwen.picture(60, 40), "<image>What is this?"
    seen = {}
    for most in (256, 512, qwen.MOST):
        size = {"shortest_edge": qwen.LEAST, "longest_edge": most}
        inputs = qwen.inputs(tokenizer, functools.partial(processor, size=size), qwen.prompt(question), [picture])
        (answer,) = model.generate([picture], [question], max_pixels=[most], max_new_tokens=NEW, return_logprobs=True)
        assert list(answer.ids) == greedy(theirs, inputs, model.stop)
        seen[most] = answer.visual_tokens
        assert seen[most] == int(inputs["mm_token_type_ids"].sum())
    assert seen[256] < seen[512] < seen[qwen.MOST]
    for wrong in (qwen.LEAST - 1, qwen.MOST + 1, "many", 2.5, True):
        with pytest.raises(ValueError, match="max_pixels=.*pictures of this model have 128 to 1024 pixels"):
            model.generate(picture, question, max_pixels=wrong)


def test_questions_that_begin_alike_and_answers_go_on_from_the_highest_position(released):
    """What is kept of a prompt, and what follows it, is numbered on from the picture, not from its places."""
    import torch

    _, theirs, tokenizer, processor, model = released
    picture = qwen.picture(60, 20)
    questions = [f"<image>{LONG} {end}" for end in ("what?", "and the dog?")]
    inputs = [qwen.inputs(tokenizer, processor, qwen.prompt(question), [picture]) for question in questions]
    read = model.engine.programs.compiled()["read_on"]
    found = model.generate_ids([[picture]] * 2, questions, max_new_tokens=NEW)
    assert found == [greedy(theirs, one, model.stop) for one in inputs]
    assert model.engine.programs.compiled()["read_on"] > read
    (score,) = model.score([picture], questions[0], ["a cat"])
    said = qwen.inputs(tokenizer, processor, f"{qwen.prompt(questions[0])}a cat<|im_end|>", [picture])
    first, ids = inputs[0]["input_ids"].shape[1], said["input_ids"][0]
    with torch.no_grad():
        logprobs = theirs(**said).logits[0].log_softmax(-1)
    want = logprobs[torch.arange(first - 1, len(ids) - 1), ids[first:]].sum().item()
    assert score == pytest.approx(want, abs=1e-3)


@pytest.mark.long
def test_a_packed_step_has_the_loss_and_the_gradients_of_transformers(released):
    _, theirs, tokenizer, processor, model = released
    pictures = [qwen.picture(30, 20), qwen.picture(26, 30, seed=1)]
    turns = [("user", "<image>a cat<image>?"), ("assistant", "the mat")]
    config = model.program.config
    batch, supervised = beside.training_batch(model, turns, pictures, tuple(config.model.scales))
    text = f"{qwen.prompt(turns[0][1])}the mat<|im_end|>"
    inputs = qwen.inputs(tokenizer, processor, text, pictures)
    labels = inputs["input_ids"].clone()
    labels[:, :-supervised] = beside.IGNORED
    theirs.zero_grad()
    want = theirs(**inputs, labels=labels).loss
    want.backward()
    loss, grads = beside.gradients(model, batch)
    assert loss == pytest.approx(want.item(), abs=1e-5)
    beside.same_gradients(grads, theirs)


@pytest.fixture(scope="module")
def exported(released, tmp_path_factory):
    """A workdir with the parameters of the released model, and its export."""
    *_, model = released
    workdir = tmp_path_factory.mktemp("workdir")
    save_config(model.program.config, workdir / "config.json")
    model.tokenizer.save(workdir)
    Checkpoints(workdir).save_params(model.params)
    lmm.export(workdir, workdir / "out")
    return workdir, workdir / "out"


def test_what_is_exported_is_what_was_released(released, exported, transformers):
    folder, theirs, _, _, model = released
    again = lmm.load(exported[1])
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.program.config.model == model.program.config.model
    back, info = transformers.Qwen3VLForConditionalGeneration.from_pretrained(exported[1], output_loading_info=True)
    assert not any(info.values())
    for name, x in theirs.state_dict().items():
        assert back.state_dict()[name].equal(x), name
    assert back.config.text_config.rope_parameters == theirs.config.text_config.rope_parameters
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(back.config, key) == getattr(theirs.config, key)
    assert (exported[1] / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    content = [{"type": "image"}, {"type": "text", "text": "a cat?"}]
    written = transformers.AutoTokenizer.from_pretrained(exported[1])
    rendered = written.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert rendered == qwen.prompt(f"{qwen.MARKS[0]}{qwen.PAD}{qwen.MARKS[1]}a cat?")
    keys = [json.loads((f / "preprocessor_config.json").read_text()) for f in (folder, exported[1])]
    assert keys[0].items() <= keys[1].items()


@pytest.mark.parametrize(
    ("file", "where", "key", "value", "message"),
    [
        (
            "config",
            "text_config",
            "rope_parameters",
            {"rope_type": "default", "mrope_interleaved": False},
            "mrope_inter",
        ),
        ("config", "text_config", "num_hidden_layers", 3, "more layers than levels are supported"),
        ("config", "text_config", "model_type", "qwen3", "text_config.model_type = 'qwen3' is not supported"),
        ("config", "vision_config", "deepstack_visual_indexes", [2, 1, 0], "in ascending order"),
        ("config", "vision_config", "hidden_act", "gelu", "vision_config.hidden_act = 'gelu' is not supported"),
        ("config", "vision_config", "out_hidden_size", 32, "vision_config.out_hidden_size = 32 is not supported"),
        ("preprocessor_config", None, "patch_size", 8, "patch_size = 8 is not supported for a tower that has 4"),
        ("preprocessor_config", None, "merge_size", 1, "merge_size = 1 is not supported for a tower that has 2"),
        ("preprocessor_config", None, "resample", 2, "resample = 2 is not supported"),
        (
            "preprocessor_config",
            None,
            "size",
            {"height": 64, "width": 64},
            "pixels as shortest_edge and longest_edge",
        ),
    ],
)
def test_a_key_that_changes_what_is_computed_is_refused(released, tmp_path, file, where, key, value, message):
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(released[0] / name, tmp_path / name)
    path = tmp_path / f"{file}.json"
    keys = json.loads(path.read_text())
    (keys[where] if where else keys)[key] = value
    path.write_text(json.dumps(keys))
    with pytest.raises(LoadError, match=message) as error:
        read_model_config(tmp_path)
    assert f"{file}.json" in str(error.value)


@pytest.mark.parametrize("size", PUBLISHED)
def test_a_size_has_the_published_number_of_parameters(size):
    config = lmm.load_config(
        f"{CONFIGS}/qwen3vl.py:size={size},scales=9+36+144+576", "model.decoder.vocab_multiple=1"
    )
    model = build(config.model)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(shapes))) == PUBLISHED[size]


@pytest.mark.parametrize("size", PUBLISHED)
def test_transformers_counts_a_size_alike(transformers, size):
    import torch

    config = lmm.load_config(f"{CONFIGS}/qwen3vl.py:size={size}").model
    decoder, levels = config.decoder, [level - 1 for level in config.vision.stack_levels]
    keys = {key: decoder[field] for field, key in QWEN3_VL_TEXT.keys.items() if field != "rope_theta"}
    vision = {key: config.vision[field] for field, key in QWEN3_VL_VISION.keys.items()}
    vision |= {"out_hidden_size": decoder.width, "deepstack_visual_indexes": levels}
    about = transformers.Qwen3VLConfig(
        text_config=keys | {"head_dim": 128}, vision_config=vision, tie_word_embeddings=decoder.tied
    )
    with torch.device("meta"):
        model = transformers.Qwen3VLForConditionalGeneration(about)
    assert sum(x.numel() for x in model.parameters()) == PUBLISHED[size]


def test_sizes_of_pictures_are_those_of_transformers(transformers):
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.smart_resize
    rng = np.random.default_rng(0)
    for width, height in np.exp(rng.uniform(0, np.log(5000), (5000, 2))).astype(int).tolist():
        least, most = 32**2 * int(rng.integers(1, 80)), 32**2 * int(rng.integers(80, 9000))
        if max(width, height) > 200 * min(width, height):
            assert native_size(width, height, 32, least, most) == (0, 0)
            continue
        assert native_size(width, height, 32, least, most) == theirs(height, width, 32, least, most)[::-1]


@pytest.fixture(scope="module")
def prepared(released, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    prepare.prepare_rows(
        qwen.rows(folder), None, folder / "data", released[0], "qwen3_vl", workers=0, max_refused=0.0
    )
    return folder / "data"


def config_of(released, data, *overrides):
    arguments = f"model={released[0]},data={data},steps=5,packs=8,length=192,most=1024,rate=1e-2"
    canvases = "data.canvases=((24,48),(48,24),(40,40))"
    return lmm.load_config(
        f"{CONFIGS}/qwen3vl.py:{arguments}", "train.log_every=1", "data.max_left_out=0.5", canvases, *overrides
    )


@pytest.mark.long
def test_five_steps_at_two_budgets_over_eight_devices_come_back_to_the_bit(
    released, prepared, transformers, tmp_path
):
    config = config_of(released, prepared, "model.scales=(1,9)", "mesh.fsdp=8", "optimizer.groups=()", "data.rows=2")
    assert lmm.train(config, tmp_path / "run")["step"] == 5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    ours = lmm.load(tmp_path / "run")
    now, before = (flatten_dict(jax.device_get(m.params), sep="/") for m in (ours, released[-1]))
    assert now.keys() == before.keys() and all((now[path] != before[path]).any() for path in now)
    answers = [ours.generate([qwen.picture(40, 30)], "What is this?", scale=n, max_new_tokens=4) for n in (1, 9)]
    assert all(isinstance(answer, str) for answer in answers)
    lmm.export(tmp_path / "run", tmp_path / "out")
    again = lmm.load(tmp_path / "out")
    assert again.scales == (1, 9)
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
    theirs, info = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    want = beside.original(ours.params, ours.program.config.model)
    for name, x in theirs.named_parameters():
        np.testing.assert_array_equal(x.detach().numpy(), want[original_name(name)][: len(x)], name)


def test_a_smaller_budget_is_numbered_as_a_smaller_picture(released, tmp_path):
    *_, model = released
    visual = visual_layout(model.program.config).holding([(64, 48)])
    assert visual.shown((64, 48), 9) == (3, 4) and visual.shown((64, 48), 1) == (1, 1)
    batch = model.batch([qwen.picture(64, 48)], "<image>what?", 1)
    at = np.flatnonzero(batch["slot"][0, 0] >= 0)
    assert len(at) == 1
    assert batch["position"][0, 0, at[0] : at[0] + 2].tolist() == [[at[0]] * 3, [at[0] + 1] * 3]
