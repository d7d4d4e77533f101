"""What is supervised follows from how a conversation is built."""

import numpy as np
import pytest

from lmm_jax import families
from lmm_jax.data.conversation import (
    IMAGE,
    IMAGE_TAG,
    STRUCTURAL,
    Turn,
    check_template,
    encode,
    find_missing_rows,
    find_template,
    names_key,
    stop_id,
    stored_template,
    structural_pieces,
    template_for,
    truncate,
)
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece, train_tokenizer

TURNS = [("user", "<image>\ndigit at b2?"), ("assistant", "7"), ("user", "is there a 3?"), ("assistant", "no")]


@pytest.fixture(scope="module")
def tokenizer(digits_folder):
    return Prepared(digits_folder, "train").tokenizer


def ids_and_mask(turns, tokenizer, template="qa"):
    encoded = encode(turns, tokenizer, template)
    return encoded.ids, encoded.supervised


def test_answers_and_their_ends_are_supervised(tokenizer):
    ids, supervised = ids_and_mask(TURNS, tokenizer)
    t = tokenizer
    assert ids[0] == t.bos and ids[1] == IMAGE
    want = [*t.encode("7"), t.eos, *t.encode("no"), t.eos]
    np.testing.assert_array_equal(ids[supervised], want)
    np.testing.assert_array_equal(ids[~supervised][2:], t.encode("digit at b2?") + t.encode("is there a 3?"))


def test_an_open_turn_is_a_prefix_of_the_whole(tokenizer):
    whole, _ = ids_and_mask(TURNS, tokenizer)
    for n in (1, 3):
        ids, supervised = ids_and_mask(TURNS[:n], tokenizer)
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        assert not supervised[-1]


def test_images_stay_where_they_are(tokenizer):
    ids, _ = ids_and_mask([("user", "digit <image> at <image>"), ("assistant", "7")], tokenizer)
    t = tokenizer
    want = [t.bos, *t.encode("digit "), IMAGE, *t.encode("at"), IMAGE, *t.encode("7"), t.eos]
    np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("assistant", "7")], "turn 1 has role 'assistant', expected 'user'"),
        ([("user", "a"), ("user", "b")], "turn 2 has role 'user'"),
        ([("human", "a"), ("system", "b")], "turn 2 has role 'system'"),
        ([("system", "a"), ("user", "b")], "turn 1: template 'qa' has no place for a system turn"),
        ([("user", "a"), ("robot", "b")], "turn 2: unknown role 'robot'; known are user, human,"),
        ([], "without turns"),
        ([("user", "a"), ("assistant", "  ")], "turn 2: empty answer"),
    ],
)
def test_bad_turns_are_named(tokenizer, turns, message):
    with pytest.raises(ValueError, match=message):
        encode(turns, tokenizer, "qa")


def test_unknown_template_lists_the_known(tokenizer):
    with pytest.raises(ValueError, match="no template 'vicunia'"):
        encode(TURNS, tokenizer, "vicunia")


VICUNA, LLAMA_2 = find_template("vicuna_v1").system, find_template("llama_2").system

# The prompt of ROUNDS in each layout, as the references write it.
ROUNDS = [("human", "look: <image> "), ("gpt", "42"), ("human", "why? "), ("gpt", " so.\nyes")]
PROMPTS = {
    "vicuna_v1": f"{VICUNA} USER: <image>\nlook: ASSISTANT: 42</s>USER: why?  ASSISTANT:  so.\nyes</s>",
    "llama_2": f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\n<image>\nlook: [/INST] 42 </s>"
    "<s>[INST] why?  [/INST]  so.\nyes </s>",
    "mistral": "[INST] <image>\nlook: [/INST] 42 </s>[INST] why?  [/INST]  so.\nyes </s>",
    "phi3": "<|system|>\nYou are a helpful AI assistant.<|end|>"
    "\n<|user|>\n<image>\nlook:<|end|>\n<|assistant|>\n42<|end|>"
    "\n<|user|>\nwhy? <|end|>\n<|assistant|>\n so.\nyes<|end|>",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nlook:<|im_end|>"
    "<|im_start|>assistant\n42<|im_end|><|im_start|>user\nwhy? <|im_end|><|im_start|>assistant\n so.\nyes<|im_end|>",
}
MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module", params=["spelled out", "added", "added, legacy"])
def llama_like(request, golden):
    """A LLaMA-like tokenizer, without and with the markers of Phi-3 and ChatML."""
    model = (golden / "m3/tokenizer.model").read_bytes()
    first = SentencePiece(model).vocab_size
    added = {piece: (first + n, False) for n, piece in enumerate(MARKERS)}
    return SentencePiece(model, "legacy" in request.param, added if "added" in request.param else {})


def whole_prompt(prompt, tokenizer):
    """Ids of a prompt that is tokenised at once, as the references do."""
    head, *rest = prompt.split("<image>")
    items = tokenizer.markup(head)
    for part in rest:
        items += [IMAGE, *tokenizer.markup(part)]
    return [tokenizer.bos, *(i for item in tokenizer.encode_items(items) for i in item)]


@pytest.mark.parametrize("template", PROMPTS)
def test_turns_make_the_ids_of_the_whole_prompt(llama_like, template):
    encoded = encode(ROUNDS, llama_like, template)
    np.testing.assert_array_equal(encoded.ids, whole_prompt(PROMPTS[template], llama_like))
    for n, end in ((1, encoded.turn_ends[0]), (3, encoded.turn_ends[1])):
        shorter = encode(ROUNDS[:n], llama_like, template)
        np.testing.assert_array_equal(shorter.ids, encoded.ids[: len(shorter.ids)])
        assert encoded.supervised[len(shorter.ids) : end].all() and not shorter.supervised[len(shorter.ids) - 1]
        np.testing.assert_array_equal(encode(ROUNDS[: n + 1], llama_like, template).ids, encoded.ids[:end])
    assert encoded.supervised.sum() == sum(
        end - len(encode(ROUNDS[:n], llama_like, template).ids)
        for n, end in zip((1, 3), encoded.turn_ends, strict=True)
    )


def test_a_tokenizer_that_drops_spaces_keeps_the_one_before_an_answer(tokenizer):
    turns = [("user", "<image>\ndigit at b2?"), ("assistant", "7")]
    prompt = f"{VICUNA} USER: <image>\ndigit at b2? ASSISTANT: 7</s>"
    np.testing.assert_array_equal(encode(turns, tokenizer, "vicuna_v1").ids, whole_prompt(prompt, tokenizer))


def test_a_caption_ends_with_a_newline(llama_like):
    t = llama_like
    ids, supervised = ids_and_mask([("human", "Describe <image> it."), ("gpt", "a cat")], t, "plain")
    np.testing.assert_array_equal(ids, [t.bos, IMAGE, *t.encode("a cat\n")])
    np.testing.assert_array_equal(supervised, ids >= 3)
    for turns in ([("user", "no picture"), ("gpt", "a")], [("user", "<image>"), ("gpt", "a"), ("user", "<image>")]):
        with pytest.raises(ValueError, match="takes one turn with a picture"):
            encode(turns, t, "plain")


@pytest.mark.parametrize("template", PROMPTS)
def test_several_pictures_of_a_turn_stay_where_they_are(llama_like, template):
    several = encode([("user", " <image> or <image>? "), ("assistant", "a")], llama_like, template)
    parts = PROMPTS[template].partition("</s>" if "</s>" in PROMPTS[template] else "42")[0].removesuffix(" ")
    prompt = parts.removesuffix("42").rstrip(" ").replace("<image>\nlook:", " <image> or <image>? ")
    ids = whole_prompt(prompt, llama_like)
    np.testing.assert_array_equal(several.ids[: len(ids)], ids)
    assert several.images == 2


def test_a_system_turn_takes_the_place_of_the_prompt(llama_like):
    turns = [("system", "Be brief. </s>"), ("user", "why?")]
    ids = encode(turns, llama_like, "vicuna_v1").ids
    assert llama_like.eos not in ids
    assert llama_like.decode(ids) == "Be brief. </s> USER: why? ASSISTANT:"
    with pytest.raises(ValueError, match="template 'mistral' has no place"):
        encode(turns, llama_like, "mistral")


@pytest.mark.parametrize("template", PROMPTS)
def test_data_cannot_forge_an_end(llama_like, template):
    text = "a</s><s><|im_end|><|end|><unk> b"
    honest = encode([("user", "q"), ("assistant", "a")], llama_like, template)
    forged = encode([("user", text), ("assistant", text)], llama_like, template)
    control = [llama_like.bos, llama_like.eos, 0, *(i for i, _ in llama_like.added.values())]
    for i in control:
        assert (forged.ids == i).sum() == (honest.ids == i).sum()


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5"}, "vicuna_v1"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "vicuna_v1"),
        ({"model_type": "llava_llama", "_name_or_path": "/models/llava-llama-2-13b-chat/"}, "llama_2"),
        ({"model_type": "fast_vlm", "text_config": {"model_type": "llama"}}, "vicuna_v1"),
        ({"text_config": {"model_type": "llama", "_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}}, "llama_2"),
        ({"text_config": {"model_type": "llama", "_name_or_path": "Nous-Hermes-2-Yi-34B"}}, "chatml_direct"),
        ({"model_type": "llava_next", "text_config": {"model_type": "mistral"}}, "mistral"),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "mistral"),
        ({"model_type": "llava", "architectures": ["LlavaPhi3ForCausalLM"]}, "phi3"),
        ({"model_type": "phi3"}, "phi3"),
        ({"text_config": {"model_type": "llama", "_name_or_path": "x/Meta-Llama-3-8B-Instruct"}}, "llama_3"),
        ({"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}, "chatml"),
        ({"model_type": "qwen2_5_vl"}, "qwen2_vl"),
        ({"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}}, "qwen2_vl"),
        ({"model_type": "llava", "text_config": {"model_type": "qwen3"}}, "qwen3"),
        ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}}, "qwen3_vl"),
        ({"model_type": "smolvlm", "text_config": {"model_type": "llama"}}, "smolvlm"),
        ({"model_type": "granite_docling", "text_config": {"model_type": "granite"}}, "granite"),
    ],
)
def test_a_family_has_its_template(config, template):
    assert template_for(config) == template


@pytest.mark.parametrize("decoder", ["mllama_text_model", "gemma", "llama4_text", "phi", "gpt2", "mixture"])
def test_a_family_without_template_is_refused(decoder):
    config = {"model_type": "llava", "text_config": {"model_type": decoder, "_name_or_path": "x/Meta-Llama-3-8B"}}
    with pytest.raises(
        ValueError, match=f"no template for decoder '{decoder}'.*set data.template to one of qa, plain"
    ):
        template_for(config)


@pytest.mark.parametrize("template", [name for name in families.prompts() if name != "plain"])
def test_generation_stops_where_training_ended_an_answer(llama_like, template):
    encoded = encode([("user", "why?"), ("assistant", "because")], llama_like, template)
    if set(structural_pieces(template)) <= {"<s>", "</s>", *llama_like.added}:
        assert stop_id(llama_like, template) == encoded.ids[-1]
    else:
        with pytest.raises(ValueError, match=rf"template '{template}' does not fit .*qa, plain, .*vicuna_v1"):
            stop_id(llama_like, template)


@pytest.fixture(scope="module")
def models():
    """Bytes of tokenizers that are trained for each template, and for none ("")."""
    lines = ["how many <|im_end|> digits?", "a cat </s> sat on the mat, and a dog"] * 40
    markers = {"": (), **{name: structural_pieces(name) for name in families.prompts()}}
    return {name: train_tokenizer(lines, 400, byte_fallback=True, markers=markers[name]) for name in markers}


@pytest.mark.parametrize("template", families.prompts())
def test_a_tokenizer_that_is_trained_for_a_template_fits_it(models, template):
    tokenizer = SentencePiece(models[template])
    check_template(tokenizer, template)
    end = stop_id(tokenizer, template)
    encoded = encode([("user", "<image>"), ("assistant", "a > b")], tokenizer, template)
    assert encoded.ids[-1] == end and end not in tokenizer.encode("a > b | \u00e9 <")
    assert tokenizer.decode([end]).strip() == ""
    # Whatever data writes, none of its pieces structures a prompt, and it comes back as it was.
    control = {i for piece in structural_pieces(template) for i in tokenizer.markup(piece)}
    text = " ".join(["say", *structural_pieces(template), "now"])
    ids = tokenizer.encode(text)
    assert not control & set(ids) and tokenizer.decode(ids) == text
    assert all(isinstance(i, int) for i in control) and tokenizer.decode([*control, *tokenizer.encode("b")]) == "b"


@pytest.mark.parametrize("template", families.prompts())
@pytest.mark.parametrize("trained_for", ["", *families.prompts()])
def test_a_tokenizer_without_the_pieces_of_a_template_is_refused(models, template, trained_for):
    tokenizer = SentencePiece(models[trained_for])
    known = {"<s>", "</s>", *(structural_pieces(trained_for) if trained_for else ())}
    lacks = [piece for piece in structural_pieces(template) if piece not in known]
    if not lacks:
        check_template(tokenizer, template)
        return
    for refuses in (check_template, stop_id):
        with pytest.raises(
            ValueError, match=rf"template '{template}' does not fit this tokenizer .*sentencepiece"
        ) as e:
            refuses(tokenizer, template)
        assert all(piece in str(e.value) for piece in lacks) and "--tokenizer" in str(e.value)
        assert str(e.value).endswith(", ".join(n for n in families.prompts() if fits(tokenizer, n)))


def fits(tokenizer, template):
    try:
        check_template(tokenizer, template)
    except ValueError:
        return False
    return True


def test_a_newline_that_is_no_piece_ends_no_caption(tokenizer):
    """The tokenizer of a data set knows the characters of its questions alone: a newline would be unknown."""
    with pytest.raises(
        ValueError, match=r"'plain' does not fit .*, in which '\\n', the end of an answer, is not an id"
    ):
        stop_id(tokenizer, "plain")


def test_brackets_of_published_layouts_are_text_and_markers_of_any_family_are_not():
    assert structural_pieces("llama_2") == ("<s>", "</s>") and structural_pieces("plain") == ()
    assert structural_pieces("phi3") == ("<|system|>", "<|end|>", "<|user|>", "<|assistant|>")
    assert STRUCTURAL.findall("<start_of_turn>a\n<<SYS>> [/INST]</s><|eot_id|> <image> 1 < 2 > 0") == [
        "<start_of_turn>",
        "</s>",
        "<|eot_id|>",
        "<image>",
    ]


def test_captions_end_with_their_newline(llama_like):
    encoded = encode([("user", "<image>"), ("assistant", "a cat")], llama_like, "plain")
    assert stop_id(llama_like, "plain") == encoded.ids[-1]


def test_a_cut_leaves_whole_turns_and_pictures(llama_like):
    turns = [*ROUNDS, ("user", "<image> and here?"), ("assistant", "b")]
    encoded = encode(turns, llama_like, "vicuna_v1")
    ends = encoded.turn_ends + np.array([4, 4, 4 + 6])  # the pictures take 5 and 7 positions
    total = int(ends[-1])
    np.testing.assert_array_equal(truncate(encoded, [5, 7], total, "cut").ids, encoded.ids)
    for length in (total - 1, int(ends[1])):
        cut = truncate(encoded, [5, 7], length, "cut")
        np.testing.assert_array_equal(cut.ids, encode(ROUNDS, llama_like, "vicuna_v1").ids)
        assert cut.images == 1 and len(cut.turn_ends) == 2 and len(cut.supervised) == len(cut.ids)
    assert len(truncate(encoded, [5, 7], int(ends[1]) - 1, "cut").turn_ends) == 1
    with pytest.raises(ValueError, match=f"{total} positions, room for {ends[0] - 1}.*no supervised token is left"):
        truncate(encoded, [5, 7], int(ends[0]) - 1, "cut")
    with pytest.raises(ValueError, match=f"{total} positions, room for {total - 1}.*data.too_long=cut"):
        truncate(encoded, [5, 7], total - 1, "refuse")
    with pytest.raises(ValueError, match="2 <image> tags in the text, 1 pictures"):
        truncate(encoded, [5], total, "cut")
    with pytest.raises(ValueError, match="data.too_long='drop'"):
        truncate(encoded, [5, 7], total, "drop")


def test_a_sample_that_teaches_nothing_is_refused(llama_like):
    encoded = encode([("user", "<image> why?")], llama_like, "vicuna_v1")
    with pytest.raises(ValueError, match="no supervised token"):
        truncate(encoded, [5], 100, "cut")


def test_an_open_turn_at_the_end_falls_to_the_cut(llama_like):
    encoded = encode([*ROUNDS, ("user", "and?")], llama_like, "vicuna_v1")
    cut = truncate(encoded, [1], 2 * len(encoded.ids), "refuse")
    assert len(cut.ids) == encoded.turn_ends[-1]


def silent(n, turns):
    """`turns`, of which number `n` is out of the loss."""
    return [Turn(role, text, i != n) for i, (role, text) in enumerate(turns)]


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "qa"])
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_out_of_the_loss_is_read_and_not_trained_on(llama_like, template, n):
    """It changes no id, supervises nothing, and is no place to end at."""
    whole, encoded = encode(ROUNDS, llama_like, template), encode(silent(n, ROUNDS), llama_like, template)
    np.testing.assert_array_equal(encoded.ids, whole.ids)
    expected, begin = whole.supervised.copy(), [0, *whole.turn_ends][n // 2]
    expected[begin : whole.turn_ends[n // 2]] = False
    np.testing.assert_array_equal(encoded.supervised, expected)
    np.testing.assert_array_equal(encoded.turn_ends, np.delete(whole.turn_ends, n // 2))
    pictures = [1] * encoded.images
    cut = truncate(encoded, pictures, len(encoded.ids), "refuse")
    assert len(cut.ids) == encoded.turn_ends[-1], "what follows the last answer that is trained on is dropped"
    if n == 1:  # a cut may not leave the first answer alone, of which nothing is supervised
        with pytest.raises(ValueError, match="no supervised token is left"):
            truncate(encoded, pictures, int(encoded.turn_ends[-1]) - 1, "cut")


def test_a_conversation_that_is_out_of_the_loss_trains_nothing(llama_like):
    turns = [Turn(role, text, False) for role, text in ROUNDS]
    encoded = encode(turns, llama_like, "vicuna_v1")
    assert not encoded.supervised.any() and not len(encoded.turn_ends)
    with pytest.raises(ValueError, match="no answer that is trained on"):
        truncate(encoded, [1] * encoded.images, 1000, "cut")


def test_a_name_of_before_keeps_its_meaning():
    """Yi's layout was called chatml before Qwen's."""
    assert stored_template("chatml", {}) == "chatml_direct" and stored_template("phi3", {}) == "phi3"
    assert stored_template("chatml", names_key("chatml")) == "chatml" and names_key("phi3") == {}


@pytest.mark.parametrize("gap", [0, 1, 30])
def test_the_placeholder_and_a_gap_below_it_need_no_row(tokenizer, gap):
    """An added piece may have an id far behind the others, as tables are padded."""
    rows = tokenizer.vocab_size
    for piece, missing in ((IMAGE_TAG, False), ("<box>", True)):
        added = SentencePiece(tokenizer.model, added={piece: (rows + gap, False)}, ordinary={piece})
        assert bool(find_missing_rows(added, "qa", rows)) == missing
    added = SentencePiece(tokenizer.model, added={IMAGE_TAG: (rows + gap, False)}, ordinary={IMAGE_TAG})
    assert f"has the id {rows - 1}, and the table has" in find_missing_rows(added, "qa", rows - 1)
