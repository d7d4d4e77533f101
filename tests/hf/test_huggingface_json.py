"""A loaded tokenizer.json is exported as it was released; a chat there has our ids, ends and supervised tokens."""

import json

import pytest
from PIL import Image
from tokenizers import AddedToken

from lmm_jax import config as c
from lmm_jax import families
from lmm_jax.data.conversation import IMAGE, encode, stop_id
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.data.tokenizer.huggingface import EXTRA
from lmm_jax.hf.processor import begin_note, write_processor
from lmm_jax.hf.tokenizer_json import added_ids
from lmm_jax.hf.write_config import transformers_keys
from tests.data.tokenizer.kinds import LOC
from tests.data.tokenizer.kinds import write as write_tokenizer

KINDS = {
    "chatml": "qwen",
    "qwen3": "qwen",
    "qwen2_vl": "qwen",
    "qwen3_vl": "qwen",
    "llama_3": "llama 3",
    "granite": "granite",
    "smolvlm": "smolvlm",
    "vicuna_v1": "bpe fallback",
    "mistral": "bpe fallback",
    "llama_2": "bpe fallback, legacy",
    "qa": "unigram",
    "plain": "bpe fallback",
}
QUESTIONS = (
    "What is this?",
    "  two  spaces ",
    "<image>\nWhat?",
    "What <image> is",
    "<image>",
    "<loc> a\n\nb",
    "日本 🙂",
)
ANSWERS = ("yes", "a cat  sat", "the\ndog ", "7")


@pytest.fixture(params=KINDS)
def exported(request, tmp_path):
    """Template, tokenizer, and the folder of an export."""
    (tmp_path / "read").mkdir()
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "read", KINDS[request.param]))
    config = c.base()
    config.model.scales = (4,)
    config.model.vision.update(image_size=28, patch_size=14)
    config.data.template = request.param
    write_processor(tmp_path / "out", config, tokenizer, families.WHOLES["llava"])
    keys = transformers_keys(config, tokenizer, families.WHOLES["llava"])
    (tmp_path / "out/config.json").write_text(json.dumps(keys))
    return request.param, tokenizer, tmp_path / "out"


def chats(template):
    """Conversations with an answer at the end, and one without."""
    captions = families.prompts()[template].captions
    for n, question in enumerate(q for q in QUESTIONS if not captions or "<image>" in q):
        first = [("user", question), ("assistant", ANSWERS[n % len(ANSWERS)])]
        yield first
        if not captions:
            yield [*first, ("user", QUESTIONS[n - 1]), ("assistant", ANSWERS[(n + 2) % len(ANSWERS)])]
            yield [*first, ("user", question)]


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def test_a_chat_has_our_ids_and_marks_what_we_supervise(transformers, exported):
    template, tokenizer, folder = exported
    processor = transformers.AutoProcessor.from_pretrained(folder)
    image = added_ids(tokenizer)[0]
    for turns in chats(template):
        encoded = encode(turns, tokenizer, template)
        opened = [(image, False)] * 4
        pairs = zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True)
        want = [pair for i, s in pairs for pair in (opened if i == IMAGE else [(i, s)])]
        text = processor.apply_chat_template(messages(turns))
        pictures = [Image.new("RGB", (30, 20))] * encoded.images
        assert processor(text=[text], images=pictures or None).input_ids[0] == [i for i, _ in want], turns
        ids = processor.tokenizer(text, add_special_tokens=False).input_ids  # without the begin piece
        assert ids == [image if i == IMAGE else i for i in encoded.ids[tokenizer.bos is not None :].tolist()]
        found = processor.tokenizer.apply_chat_template(
            messages(turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert found["input_ids"] == ids
        mask = encoded.supervised[tokenizer.bos is not None :].astype(int).tolist()
        assert found["assistant_masks"] == mask, turns


def test_the_end_of_an_answer_is_named_everywhere(transformers, exported):
    template, tokenizer, folder = exported
    stop = stop_id(tokenizer, template)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == stop
    assert stop not in json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    assert json.loads((folder / "config.json").read_text())["text_config"]["eos_token_id"] == stop
    if template != "plain":  # whose captions end with text
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == stop


def test_tokenizer_json_is_that_which_was_read_but_for_missing_pieces(exported):
    _, tokenizer, folder = exported
    about = json.loads((folder / "tokenizer_config.json").read_text())
    read, written = (json.loads((f / "tokenizer.json").read_text()) for f in (folder.parent / "read", folder))
    new = written.pop("added_tokens")[len(read.pop("added_tokens")) :]
    assert written == read and [token["content"] for token in new] == about.get(EXTRA, [])
    again = load_tokenizer(folder)
    assert (again.kind, again.fingerprint, again.vocab_size) == (
        "huggingface",
        tokenizer.fingerprint,
        tokenizer.vocab_size,
    )
    assert {"tokenizer_class", "pad_token", "eos_token"} <= about.keys() and "chat_template" not in about


def test_nothing_is_added_where_nothing_is_missing(tmp_path):
    (tmp_path / "out").mkdir()
    extra = [LOC, AddedToken("<image>", special=True), AddedToken("<pad>", special=True)]
    tokenizer = load_tokenizer(
        write_tokenizer(tmp_path, "llama 3", extra, pad_token="<pad>", chat_template="{{ 1/0 }}")
    )
    config = c.base()
    config.data.template = "llama_3"
    write_processor(tmp_path / "out", config, tokenizer, families.WHOLES["llava"])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    about = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert about["pad_token"] == "<pad>" and EXTRA not in about and "chat_template" not in about
    assert added_ids(tokenizer)[:2] == (tokenizer.vocab["<image>"], tokenizer.vocab["<pad>"])


def test_an_end_that_pads_too_is_generated(tmp_path):
    (tmp_path / "out").mkdir()
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, "granite", pad_token="<|end_of_text|>"))
    config = c.base()
    config.data.template = "granite"
    write_processor(tmp_path / "out", config, tokenizer, families.WHOLES["llava"])
    about = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert about["eos_token_id"] == about["pad_token_id"] and about["eos_token_id"] not in about["suppress_tokens"]


def test_what_a_server_has_to_know_of_the_begin_piece_is_said(tmp_path):
    note = begin_note(load_tokenizer(write_tokenizer(tmp_path, "llama 3")))
    assert "`<|begin_of_text|>`" in note and '"add_special_tokens": true' in note and "vLLM" in note
    assert "no begin piece" in begin_note(load_tokenizer(write_tokenizer(tmp_path, "qwen")))
