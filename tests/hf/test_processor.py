"""What transformers makes of an exported tokenizer, chat template and image processor: our ids and our pixels."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from lmm_jax import config as c
from lmm_jax import families
from lmm_jax.config import visual_layout
from lmm_jax.data.conversation import IMAGE, encode, find_template, stop_id, structural_pieces
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.data.views import make_views, select_tiling
from lmm_jax.families.clip import MEAN, STD
from lmm_jax.families.kinds import SYSTEM
from lmm_jax.hf.processor import generation_config, write_processor
from lmm_jax.hf.tokenizer_json import added_ids


def picture(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def ours(turns, tokenizer, template, tokens=4):
    """Our ids, with `tokens` of `<image>` for each picture."""
    image = added_ids(tokenizer)[0]
    ids = encode(turns, tokenizer, template).ids.tolist()
    return [x for i in ids for x in ([image] * tokens if i == IMAGE else [i])]


def theirs(processor, messages, pictures):
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(text=[text], images=[picture(30, 20)] * pictures or None).input_ids[0]


QUESTIONS = ("What is this?", "  two  spaces ", "", "<image>", "<image>\nWhat?", "What <image> is", "\nlead", " a")
QUESTIONS += ("compare <image> with <image>", "<image><image>", "<image> <image>\n the cat")
ANSWERS = ("yes", " no", "a cat  sat", "the\ndog ", "▁x")


def chats(template, count):
    """Conversations of one to three turns, with and without pictures, a system turn and an answer at the end."""
    rng, form = random.Random(0), find_template(template)
    for question in QUESTIONS:
        if not form.captions or "<image>" in question:
            yield [("user", question)]
            yield [("user", question), ("assistant", rng.choice(ANSWERS))]
    for _ in range(0 if form.captions else count):
        turns = [("system", rng.choice(["You  are terse. ", "", "a"]))] * (
            SYSTEM in form.opening and rng.random() < 0.4
        )
        for _ in range(rng.randrange(1, 4)):
            turns += [("user", rng.choice(QUESTIONS)), ("assistant", rng.choice(ANSWERS))]
        yield turns[: len(turns) - rng.randrange(2)]


@pytest.mark.parametrize("template", families.prompts())
@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_chats(transformers, models, write, template, legacy):
    ours_too = "ours with markers" if template == "chatml_direct" else "ours with bytes"
    names = [ours_too, "LLaMA", "LLaMA with markers"]
    for name in names if template == "qa" else [*names, "no prefix"]:  # which leaves no trace where an answer begins
        missing = [p for p in structural_pieces(template) if SentencePiece(models[name]).markup(p) == [p]]
        tokenizer = SentencePiece(models[name], legacy, {piece: (2000 + i, False) for i, piece in enumerate(missing)})
        processor = transformers.AutoProcessor.from_pretrained(write(tokenizer, template)[1])
        for turns in chats(template, 25):
            messages = [{"role": role, "content": text} for role, text in turns]
            want = ours(turns, tokenizer, template)
            assert theirs(processor, messages, encode(turns, tokenizer, template).images) == want, (name, turns)


@pytest.mark.parametrize("template", families.prompts())
def test_the_chat_template_marks_what_is_supervised(transformers, models, write, template):
    """`return_assistant_tokens_mask`, which trainers ask for, gives the ids that we train on."""
    missing = [p for p in structural_pieces(template) if SentencePiece(models["LLaMA"]).markup(p) == [p]]
    tokenizer = SentencePiece(models["LLaMA"], False, {piece: (2000 + i, False) for i, piece in enumerate(missing)})
    processor = transformers.AutoProcessor.from_pretrained(write(tokenizer, template)[1])
    for turns in chats(template, 4):
        encoded = encode(turns, tokenizer, template)
        found = processor.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert [tokenizer.bos, *found["input_ids"]] == ours(turns, tokenizer, template, 1)
        assert [0, *found["assistant_masks"]] == encoded.supervised.astype(int).tolist(), turns


@pytest.mark.parametrize("template", ["vicuna_v1", "phi3", "chatml_direct", "llama_2"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_folder_that_transformers_writes_anew_has_the_same_ids(
    transformers, models, write, tmp_path, template, legacy
):
    """transformers 5 writes no tokenizer.model, and names added pieces in tokenizer.json alone."""
    missing = [p for p in structural_pieces(template) if SentencePiece(models["LLaMA"]).markup(p) == [p]]
    added = {piece: (1200 + i, template == "phi3") for i, piece in enumerate(missing)}
    loc = 1200 + len(added)
    tokenizer = SentencePiece(models["LLaMA"], legacy, added | {"<loc>": (loc, False)}, {"<loc>"})
    folder = write(tokenizer, template)[1]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "anew")
    processor.save_pretrained(folder)  # where tokenizer.model is
    read = {
        kind: load_tokenizer(path) for kind, path in (("sentencepiece", folder), ("huggingface", tmp_path / "anew"))
    }
    for kind, again in read.items():
        assert again.kind == kind and added_ids(again)[:2] == added_ids(tokenizer)[:2]
        assert (stop_id(again, template), again.bos) == (stop_id(tokenizer, template), tokenizer.bos)
        for turns in [*chats(template, 20), [("user", "a <loc>b"), ("assistant", "x <loc> y")]]:
            want = encode(turns, tokenizer, template)
            found = encode(turns, again, template)
            assert found.ids.tolist() == want.ids.tolist(), (kind, turns)
            if loc not in want.ids:
                assert again.decode(want.ids) == tokenizer.decode(want.ids)
        assert again.decode([loc]) == "<loc>" and loc not in again.markup("<loc>")


def test_content_may_be_a_list(transformers, models, write):
    tokenizer = SentencePiece(models["LLaMA"])
    processor = transformers.AutoProcessor.from_pretrained(write(tokenizer)[1])
    image, text = {"type": "image", "image": picture(30, 20)}, {"type": "text", "text": "What is this?"}
    cases = {
        "<image>What is this?": [image, text],
        "What is this?<image>": [text, image],
        "<image>\n<image>\nWhat is this?": [image, image, text],
    }
    for string, content in cases.items():
        turns = [("user", string), ("assistant", "a cat"), ("user", "What is this?")]
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            {"role": "user", "content": [text]},
        ]
        found = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        assert found["input_ids"][0] == ours(turns, tokenizer, "vicuna_v1")


@pytest.mark.parametrize(
    ("template", "roles", "message"),
    [
        ("mistral", ("system", "user"), "no place for a system turn"),
        ("vicuna_v1", ("user", "user"), "must alternate"),
        ("vicuna_v1", ("assistant",), "must alternate"),
    ],
)
def test_a_chat_out_of_turn_is_refused(transformers, models, write, template, roles, message):
    processor = transformers.AutoProcessor.from_pretrained(write(SentencePiece(models["LLaMA"]), template)[1])
    with pytest.raises(Exception, match=message):
        processor.apply_chat_template([{"role": role, "content": "a"} for role in roles])


SIZES = [(30, 20), (20, 30), (64, 64), (1, 1), (1, 50), (50, 1), (3, 40), (40, 3), (2, 200), (900, 31), (31, 900)]
SIZES += [(333, 500), (57, 56), (55, 56), (168, 56), (700, 5)]


@pytest.mark.parametrize(
    ("aspect", "architecture", "kind"),
    [
        ("pad", "llava", "LlavaImageProcessor"),
        ("pad", "fast_vlm", "LlavaImageProcessor"),
        ("square", "llava", "CLIPImageProcessor"),
        ("stretch", "llava", "CLIPImageProcessor"),
        ("anyres", "llava_next", "LlavaNextImageProcessor"),
    ],
)
def test_pixels(transformers, models, write, aspect, architecture, kind):
    config, folder = write(
        SentencePiece(models["ours"]), architecture=architecture, aspect=aspect, size=56, scales=(16,)
    )
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__ == ("LlavaNextProcessor" if architecture == "llava_next" else "LlavaProcessor")
    assert type(processor.image_processor).__name__.startswith(kind)
    for width, height in SIZES:
        image = picture(width, height)
        tiling = select_tiling(width, height, 56, config.data.tilings) if config.data.tilings else ()
        padding = tuple(int(255 * level) for level in MEAN)
        seen = make_views(image, 56, aspect, tiling, padding=padding).astype(np.float32) / 255
        want = (seen - np.float32(MEAN)) / np.float32(STD)
        found = processor.image_processor(image, return_tensors="np")["pixel_values"].reshape(-1, 3, 56, 56)
        np.testing.assert_allclose(found.transpose(0, 2, 3, 1), want, rtol=0, atol=1e-6)


def test_next_counts_as_many_tokens(transformers, models, write):
    tokenizer = SentencePiece(models["ours"])
    config, folder = write(tokenizer, "qa", "llava_next", size=336, scales=(576,))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    visual, image = visual_layout(config), added_ids(tokenizer)[0]
    sizes = np.concatenate([np.random.default_rng(0).integers(1, 2000, (5000, 2)), SIZES])
    found = processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in sizes.tolist()])
    np.testing.assert_array_equal(found["num_image_tokens"], visual.tokens(sizes, 576))
    for size in SIZES[-3:]:
        ids = processor(text=["<image>"], images=[picture(*size)]).input_ids[0]
        assert ids.count(image) == visual.tokens([size], 576)[0]


def test_a_smaller_budget_is_a_larger_patch(transformers, models, write):
    tokenizer = SentencePiece(models["ours"])
    _, folder = write(tokenizer, "qa", size=336, scales=(1, 9, 36, 144, 576))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    for scale in (576, 144, 36, 9, 1):
        ids = processor(text=["<image>"], images=[picture(30, 20)]).input_ids[0]
        assert ids.count(added_ids(tokenizer)[0]) == scale
        processor.patch_size *= 2 if scale > 36 else (2 if scale == 36 else 3)


def test_convnext_has_no_class_token_and_deepstack_names_its_code(models, tmp_path):
    config = c.base()
    c.use_encoder(config, "convnext")
    config.model.scales = (576,)
    write_processor(tmp_path, config, SentencePiece(models["ours"]), families.WHOLES["fast_vlm"])
    about = json.loads((tmp_path / "processor_config.json").read_text())
    assert (about["patch_size"], about["num_additional_image_tokens"]) == (64, 0)
    assert about["vision_feature_select_strategy"] == "full"
    config = c.base()
    config.data.update(aspect="stretch", tilings=((1, 2), (2, 1)), stacks="samples")
    write_processor(tmp_path, config, SentencePiece(models["ours"]), families.WHOLES["deepstack"])
    about = json.loads((tmp_path / "processor_config.json").read_text())
    assert about["auto_map"]["AutoProcessor"] == "processing_deepstack.DeepStackProcessor"
    about = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (about["aspect"], about["tilings"], about["zoom"]) == ("stretch", [[1, 2], [2, 1]], 1)


def test_our_tokenizer_reads_itself_back(models, write):
    for legacy in (False, True):
        for added in ({}, {"<|end|>": (2000, True)}, {"<image>": (2000, False), "<pad>": (2003, False)}):
            tokenizer = SentencePiece(models["LLaMA"], legacy, added)
            again = SentencePiece.load(write(tokenizer)[1] / "tokenizer.model")
            assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
            assert (again.legacy, again.added) == (tokenizer.legacy, tokenizer.added)


def test_only_pieces_are_generated(transformers, models, write):
    tokenizer = SentencePiece(models["LLaMA"])
    image, pad, rows = added_ids(tokenizer)
    _, folder = write(tokenizer)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=rows, **text))
    model.lm_head.weight.data[:] = 0
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a", return_tensors="pt").input_ids
    for forbidden in (image, pad, rows - 1):
        model.lm_head.weight.data[:] = 0
        model.lm_head.weight.data[forbidden] = 100 * model.model(ids).last_hidden_state[0, -1].detach()
        assert model(ids).logits[0, -1].argmax() == forbidden
        made = model.generate(ids, attention_mask=ids > 0, max_new_tokens=2)[0, ids.shape[1] :]
        assert made.max() < tokenizer.vocab_size


def test_an_answer_ends_where_its_template_says(models):
    tokenizer, known = SentencePiece(models["LLaMA with markers"]), {"<s>", "</s>", "<|im_start|>", "<|im_end|>"}
    fitting = [name for name in families.prompts() if known.issuperset(structural_pieces(name))]
    ends = {name: generation_config(tokenizer, name)["eos_token_id"] for name in fitting}
    assert ends == {name: stop_id(tokenizer, name) for name in fitting}
    with pytest.raises(ValueError, match=r"template 'phi3' does not fit .* lacks <\|system\|>"):
        generation_config(tokenizer, "phi3")
    assert ends["vicuna_v1"] == tokenizer.eos and tokenizer.piece(ends["chatml_direct"]) == "<|im_end|>"
