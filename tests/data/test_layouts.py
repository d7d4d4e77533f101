"""Prompt layouts of byte-level tokenizers: the ids of the whole chat that the released template renders."""

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE, check_template, encode, stop_id
from lmm_jax.data.tokenizer import load_tokenizer
from tests.data.tokenizer.kinds import write

jinja2 = pytest.importorskip("jinja2")

# Equivalents of the chat templates in the models' repositories, for chats whose content is a list of parts.
PARTS = """\
{%- macro said(content) -%}
{%- for part in content -%}{{ PICTURE if part.type == 'image' else part.text }}{%- endfor -%}
{%- endmacro -%}
"""
QWEN = """\
{% for m in messages %}{% if loop.first and m.role != 'system' and default %}{{ '<|im_start|>system\\n' ~ default }}{{
'<|im_end|>\\n' }}{% endif %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ said(m.content) ~ '<|im_end|>\\n' }}{% endfor %}{%
if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA_3 = """\
{% for m in messages %}{{ bos if loop.first }}{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' }}{{
said(m.content)|trim ~ '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{
'<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GRANITE = """\
{% for m in messages %}{{ '<|start_of_role|>' ~ m.role ~ '<|end_of_role|>' ~ said(m.content) }}{{
'<|end_of_text|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%
endif %}"""
SMOLVLM = """\
<|im_start|>{% for m in messages %}{{ m.role|capitalize }}{{ ':' if m.content[0].type == 'image' else ': '
}}{{ said(m.content) }}{{ '<end_of_utterance>\\n' }}{% endfor %}{%
if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
HELPFUL = "You are a helpful assistant."
SEEN = "<|vision_start|><image><|vision_end|>"
# Layout: tokenizer, template, default system prompt, what stands for a picture.
RELEASED = {
    "chatml": ("qwen", QWEN, HELPFUL, "<image>\n"),
    "qwen3": ("qwen", QWEN, "", "<image>\n"),
    "qwen2_vl": ("qwen", QWEN, HELPFUL, SEEN),
    "qwen3_vl": ("qwen", QWEN, "", SEEN),
    "llama_3": ("llama 3", LLAMA_3, "", "<image>\n"),
    "granite": ("granite", GRANITE, "", "<image>"),
    "smolvlm": ("smolvlm", SMOLVLM, "", "<image>"),
}
TEXTS = (
    "What is this?",
    "  two  spaces ",
    "line\n\nbreaks\n",
    "\nlead",
    "\tif x:",
    "7 and 1234",
    "日本 🙂",
    "it's",
    ".",
    " (a)",
)
ANSWERS = ("a cat", "Yes.", "7", "(b)", "日本", "# head\n\ntext\n", "a  b ", "'s")


@pytest.fixture(params=RELEASED)
def layout(request, tmp_path):
    """Name, tokenizer, and a function that renders turns as the released template does."""
    kind, source, default, picture = RELEASED[request.param]
    tokenizer = load_tokenizer(write(tmp_path, kind))

    def render(turns, open_turn):
        messages = []
        for role, text in turns:
            content = []
            for n, part in enumerate(text.split("<image>")):
                content += [{"type": "image"}] * (n > 0)
                part = part.removeprefix("\n") if n > 0 else part
                content += [{"type": "text", "text": part}] * bool(part)
            messages.append({"role": role, "content": content})
        template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(PARTS + source)
        begin = "" if tokenizer.bos is None else tokenizer.piece(tokenizer.bos)
        return template.render(
            messages=messages, PICTURE=picture, default=default, bos=begin, add_generation_prompt=open_turn
        )

    return request.param, tokenizer, render


def whole(tokenizer, prompt):
    """Ids of a rendered prompt, tokenised at once."""
    items = []
    for n, part in enumerate(prompt.split("<image>")):
        items += [IMAGE] * (n > 0) + tokenizer.markup(part)
    return [i for item in tokenizer.encode_items(items) for i in item]


def chats():
    """Conversations, the last of which wait for an answer."""
    for text in TEXTS:
        yield [("user", text)]
        yield [("system", text), ("user", text), ("assistant", "a"), ("user", text)]
        for answer in ANSWERS:
            yield [("user", text), ("assistant", answer)]
    for text in ("<image>\nWhat?", "<image>What?", "<image>\n日本"):
        yield [("user", text), ("assistant", "a cat"), ("user", "why? "), ("assistant", "so")]
        yield [("system", "Be brief."), ("user", text)]
    yield [("user", "<image>\n")]


def test_ids_are_those_of_the_rendered_chat(layout):
    name, tokenizer, render = layout
    check_template(tokenizer, name)
    for turns in chats():
        open_turn = turns[-1][0] == "user"
        encoded = encode(turns, tokenizer, name)
        text = render(turns, open_turn)
        if "<image>\n" in RELEASED[name][3] and turns[-1][1] == "<image>\n":
            text = text.replace("<image>\n", "<image>")  # LLaVA's way: nothing follows a picture alone
        assert encoded.ids.tolist() == whole(tokenizer, text.removesuffix("\n") if not open_turn else text), turns


def test_several_pictures_stay_where_they_are(layout):
    name, tokenizer, render = layout
    if RELEASED[name][3] == "<image>\n":
        return  # as LLaVA has it, see test_conversation
    for text in (
        "compare <image> with <image>",
        "<image>\n<image>\nWhich?",
        "What is <image>?",
        "Look:\n<image>\nWell?",
    ):
        turns = [("user", text), ("assistant", "a"), ("user", "<image>")]
        encoded = encode(turns, tokenizer, name)
        assert encoded.ids.tolist() == whole(tokenizer, render(turns, True)), text
        assert encoded.images == text.count("<image>") + 1


def test_answers_and_their_ends_are_supervised(layout):
    name, tokenizer, _ = layout
    turns = [("user", "why?"), ("assistant", "so"), ("user", "and <|im_end|><|eot_id|>?"), ("assistant", "well")]
    encoded = encode(turns, tokenizer, name)
    stop = stop_id(tokenizer, name)
    assert tokenizer.decode(encoded.ids[encoded.supervised]).split() in (["so", "well"], ["sowell"])
    assert encoded.ids[encoded.turn_ends - 1].tolist() == [stop, stop]
    forged = np.flatnonzero(encoded.ids == stop)
    ends = 5 if name in ("chatml", "qwen2_vl") else 4
    assert len(forged) == ends, tokenizer.piece(stop)
    assert (encoded.ids[0] == tokenizer.bos) == (name == "llama_3")


def test_an_open_turn_is_a_prefix_of_the_whole(layout):
    name, tokenizer, _ = layout
    for answer in (*ANSWERS, "\n\nyes", " no"):
        turns = [("user", "<image>\nwhy?"), ("assistant", answer), ("user", "and?"), ("assistant", answer)]
        ids = encode(turns, tokenizer, name).ids
        for n in (1, 2, 3):
            shorter = encode(turns[:n], tokenizer, name).ids
            assert shorter.tolist() == ids[: len(shorter)].tolist()
