"""Every key of a model's files, swept with values that mean nothing: refused by file and key, or not read at all.

A value that is refused must be refused soon, whatever it would size. A value that is taken must be one that the key
may have, or belong to a key that changes nothing.
"""

import copy
import json
import time

import pytest

from lmm_jax.config import flatten
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.hf.read_config import read_model_config
from tests.families import granite, llava, onevision, qwen, smolvlm

NOT_FINITE = ("NaN", "-Infinity", "1e400")  # as they are written
HOSTILE = ("x", "", [], {}, [1], [[-1, "x"]], {"a": {"b": []}}, -1, 0, True, False, -1.5, 10**7, 10**30, *NOT_FINITE)
FILES = ("config.json", "tower/config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = "tokenizer_config.json"
# Values of HOSTILE that some keys may have, so that another model is read, by the last name of the key.
MEANT = (
    (0, ("density_router_hidden_size", "density_router_threshold", "image_token_index")),
    (
        10**7,
        (
            *("intermediate_size", "max_position_embeddings", "original_max_position_embeddings", "rope_theta"),
            *("shortest_edge", "longest_edge", "tokenizer_model_max_length", "vocab_size"),
        ),
    ),
    (True, ("tie_word_embeddings",)),
    (False, ("use_fine_route",)),
    (-1, ("vision_feature_layer", "mm_vision_select_layer")),
)
LISTS = ("vision_feature_layer", "mm_vision_select_layer", "deepstack_visual_indexes", "matryoshka_vis_token_scale")
PARTS = ("text_config", "vision_config", "image_processor", "rope_parameters", "rope_scaling")  # {}: all by default
# A key whose fault shows elsewhere: the message names what did not fit.
ELSEWHERE = ("head_dim", "mm_vision_tower", "vision_tower", *PARTS)
MOST_SECONDS = 1.0  # of a refusal
WRITERS = {
    "llava": lambda *where: llava.write(*where, "llama", "siglip"),
    "phi3": lambda *where: llava.write(*where, "phi3", "clip"),
    "granite": lambda *where: llava.write(*where, "granite", "clip"),
    "qwen3_vl": qwen.write,
    "granite_docling": granite.write,
    "llava_onevision": onevision.write,
    "smolvlm": smolvlm.write,
}


def keys_of(content, before=()):
    """The path of every key, at all depths."""
    for key, value in content.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


def changed(content, path, value):
    """The text of a JSON object with another value."""
    content = copy.deepcopy(content)
    node = content
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "HERE"
    return json.dumps(content).replace('"HERE"', value if value in NOT_FINITE else json.dumps(value))


def is_meant(key, value):
    """Whether a key may have a value of HOSTILE."""
    if isinstance(value, list | dict):
        return (key in LISTS and value in ([1], [])) or (key in PARTS and isinstance(value, dict))
    return any(type(known) is type(value) and known == value and key in keys for known, keys in MEANT)


def sweep(folder):
    """How many values were tried; asserts that each was refused by name, or that it could be meant."""
    sound, tried, slowest = flatten(read_model_config(folder)), 0, 0.0
    fingerprint = load_tokenizer(folder).fingerprint
    for file in (*FILES, TOKENIZER):
        path = folder / file
        if not path.exists():
            continue
        text = path.read_text()
        content = json.loads(text)
        for keys in keys_of(content):
            for value in HOSTILE:
                what = f"{file}: {'.'.join(keys)} = {value!r}"
                path.write_text(changed(content, keys, value))
                begin, tried = time.monotonic(), tried + 1
                try:
                    found = flatten(read_model_config(folder)), load_tokenizer(folder).fingerprint
                except ValueError as error:
                    told = str(error)
                    assert path.name in told or keys[-1] in ELSEWHERE, f"{what}: {told}"
                    named = keys[-1] in told or keys[-1] in ELSEWHERE or keys[0] in told or file == TOKENIZER
                    assert named, f"{what}: {told}"
                else:
                    same = found == (sound, fingerprint) or file == TOKENIZER
                    assert value not in NOT_FINITE and (same or is_meant(keys[-1], value)), f"{what} was loaded"
                slowest = max(slowest, time.monotonic() - begin)
        path.write_text(text)
    assert slowest < MOST_SECONDS
    return tried


def test_every_key_of_the_original_layout_is_refused_by_name_or_not_read(m3):
    assert sweep(m3) > 500


@pytest.mark.long
@pytest.mark.parametrize("family", WRITERS)
def test_every_key_of_a_released_model_is_refused_by_name_or_not_read(transformers, tmp_path, family):
    import torch

    WRITERS[family](tmp_path, transformers, torch)
    assert sweep(tmp_path) > 700


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", ("num_hidden_layers",)),
        ("config.json", ("hidden_size",)),
        ("config.json", ("num_attention_heads",)),
        ("tower/config.json", ("num_hidden_layers",)),
        ("tower/config.json", ("image_size",)),
    ],
)
def test_ten_million_of_anything_is_refused_with_the_bound(m3, file, keys):
    content = json.loads((m3 / file).read_text())
    (m3 / file).write_text(changed(content, keys, 10**7))
    begin = time.monotonic()
    with pytest.raises(
        ValueError, match=rf"{file}: {keys[-1]} = 10000000 is not supported, a whole number from 1 to"
    ):
        read_model_config(m3)
    assert time.monotonic() - begin < MOST_SECONDS
