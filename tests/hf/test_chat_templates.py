"""A folder's own chat template, which is never run, tells when another layout was chosen for it."""

import json
import os

import pytest

from lmm_jax import families
from lmm_jax.data.conversation import structural_pieces
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.hf.chat_templates import find_differences
from lmm_jax.hf.processor import chat_template
from lmm_jax.hf.snapshot import model_folder

# As the models' repositories have them, cut to the strings that they join.
RELEASED = {
    "vicuna_v1": "{{ message['role'].upper() + ': ' }}<image>\n{% if generating %}{{ 'ASSISTANT:' }}{% endif %}",
    "mistral": "{{ '<<SYS>>\\n' }}{{ '[INST] ' }}{{ ' [/INST]' }}{{ content + '</s>' }}",
    "chatml_direct": "{{ '<|im_start|>' + message['role'] + '\\n' }}{{ content }}{{ '<|im_end|>' }}",
    "phi3": "{{ '<|user|>\\n' + content + '<|end|>\\n<|assistant|>\\n' }}",
    "chatml": "{{ '<|im_start|>system\\nYou are a helpful assistant.' }}{{ content + '<|im_end|>' + '\\n' }}",
    "qwen3": "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}",
    "qwen2_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|vision_start|><|image_pad|>",
    "qwen3_vl": "{{- '<|im_start|>user\\n' }}<|vision_start|><|image_pad|><|vision_end|>{{- '<|im_end|>\\n' }}",
    "llama_3": "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + content | trim + '<|eot_id|>' }}",
    "granite": "{{- '<|start_of_role|>' + role + '<|end_of_role|>' + content + '<|end_of_text|>\\n' }}",
    "smolvlm": "<|im_start|>{{ message['role'] | capitalize }}{{ ': ' }}<end_of_utterance>\n{{ 'Assistant:' }}",
}
OTHERS = {
    "<start_of_turn>user\n": "`<start_of_turn>`",
    "{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud.' }}": "a system prompt that names the model",
    "<|start_header_id|>Cutting Knowledge Date: December 2023": "a date",
    "{{ 1 / 0 }}": "lacks `ASSISTANT:`; none of ours",
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_template_that_is_the_chosen_layout_is_silent(tmp_path, name):
    assert find_differences(tmp_path, name) == ""  # there is none
    (tmp_path / "chat_template.jinja").write_text(RELEASED[name])
    assert find_differences(tmp_path, name) == ""


@pytest.mark.parametrize("chosen", RELEASED)
def test_a_template_of_another_layout_is_named_with_both(tmp_path, chosen):
    for name, text in RELEASED.items():
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
        told = find_differences(tmp_path, chosen)
        assert bool(told) == (name != chosen), name
        if told:
            assert f"layout '{chosen}'" in told and f"looks like '{name}'" in told and "tokenizer_config.json" in told
            assert told.endswith(f"template='{name}' decides")


@pytest.mark.parametrize("text", OTHERS)
def test_a_template_of_no_layout_of_ours_is_told(tmp_path, text):
    for file, content in (
        ("chat_template.json", json.dumps({"chat_template": text})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": text}]})),
        ("chat_template.jinja", text),
    ):
        (tmp_path / file).write_text(content)
        assert OTHERS[text] in find_differences(tmp_path, "vicuna_v1")
        (tmp_path / file).unlink()


@pytest.mark.parametrize("name", families.prompts())
def test_what_we_export_is_the_layout_that_it_says(models, tmp_path, name):
    added = {piece: (2000 + n, False) for n, piece in enumerate(structural_pieces(name))}
    tokenizer = SentencePiece(models["LLaMA"], added=added)
    (tmp_path / "chat_template.jinja").write_text(chat_template(tokenizer, name))
    assert find_differences(tmp_path, name) == ""


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": 3}', '{"chat_template": [3]}'])
def test_what_is_no_template_is_passed_over(tmp_path, content):
    for file in ("processor_config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(content)
    assert find_differences(tmp_path, "qa") == ""


def test_what_is_no_file_is_passed_over(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")  # reading it would wait for ever
    (tmp_path / "chat_template.json").symlink_to("/dev/zero")
    assert find_differences(tmp_path, "qa") == ""


def test_a_branch_that_is_no_file_is_named(tmp_path):
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    (tmp_path / "refs").mkdir()
    os.mkfifo(tmp_path / "refs/main")
    with pytest.raises(ValueError, match="refs/main is no file"):
        model_folder(tmp_path)
