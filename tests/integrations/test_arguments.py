"""What lmms-eval says, read: without lmms-eval."""

import ast
import pathlib
import re

import pytest

from lmm_jax.integrations import arguments, lmms_eval_models
from lmm_jax.integrations.arguments import read_generation, read_load_options, split_pictures

GREEDY = {"stop": [], "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (None, GREEDY),
        ({"temperature": 0, "top_p": 0, "num_beams": 1}, GREEDY),  # as sixteen of its tasks say
        ({"temperature": 0.7, "do_sample": False}, GREEDY),
        ({"until": None, "temperature": None}, GREEDY),
        ({"until": "\n\n", "stop_sequences": ["."]}, GREEDY | {"stop": ["\n\n", "."]}),
        ({"temperature": 0.2, "top_p": None}, GREEDY | {"temperature": 0.2, "seed": 7}),
        ({"do_sample": True, "top_k": 3, "seed": 1}, GREEDY | {"temperature": 1.0, "seed": 6, "top_k": 3}),
        (
            {"temperature": 1, "repetition_penalty": 1.2},
            GREEDY | {"temperature": 1, "seed": 7, "repetition_penalty": 1.2},
        ),
    ],
    ids=lambda value: str(value),
)
def test_answers_are_greedy_unless_a_task_asks_for_drawn_ones(given, options):
    before = str(given)
    assert read_generation(given, number=5, seed=2).options == options
    assert str(given) == before  # the harness writes it into its results


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({}, 1024),
        ({"max_new_tokens": 16}, 16),
        ({"max_gen_toks": 8}, 8),
        ({"max_gen_toks": 8, "max_new_tokens": 9}, 9),
    ],
)
def test_a_task_says_how_long_an_answer_may_be(given, tokens):
    assert read_generation(given, 0, 0).max_new_tokens == tokens


def test_what_is_not_known_is_given_back_to_be_said():
    given = {"image_aspect_ratio": "pad", "skip_special_tokens": False, "length_penalty": 2}
    assert read_generation(given, 0, 0).ignored == ("skip_special_tokens", "length_penalty")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_beams": 3}, "num_beams: an answer is greedy or drawn here"),
        ({"n": 2}, "n: an answer"),
        ({"num_beams": "many"}, "num_beams='many'"),
        ({"until": 3}, "until=3"),
        ({"until": ["a", None]}, "until="),
        ({"until": ["a", ""]}, "stop[1] is an empty text"),
        ({"temperature": 0.5, "top_p": 0}, "top_p=0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": -1}, "temperature=-1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"seed": "x"}, "seed='x'"),
    ],
    ids=lambda value: str(value),
)
def test_an_option_that_cannot_be_meant_is_named(given, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        read_generation(given, 0, 0)


def test_what_lmm_load_takes_may_be_said_and_nothing_else():
    assert read_load_options({"dtype": "auto", "template": "qa"}) == {"dtype": None, "template": "qa"}
    with pytest.raises(ValueError, match="model_args: 'device_map' is not known; beside .* dtype, template"):
        read_load_options({"device_map": "cpu"})
    with pytest.raises(ValueError, match="'path'"):
        read_load_options({"path": "elsewhere"})


def part(value):
    return {"type": "text", "text": value} if isinstance(value, str) else {"type": "image", "url": value}


@pytest.mark.parametrize(
    ("content", "images", "kept"),
    [
        ([1, "what?"], [], [1, "what?"]),
        ([1, 2, "is <image> like <image>?"], [1, 2], "is <image> like <image>?"),
        ([1, "and <image> of ", "it"], [1], "and <image> of it"),
        ([1, 2, "is <image> enough?"], [], [1, 2, "is <image> enough?"]),  # which `Model.request` refuses
        (["<image>"], [], ["<image>"]),
    ],
)
def test_tags_say_where_pictures_stand_if_there_is_one_for_each(content, images, kept):
    said = [{"role": "system", "content": "s"}, {"role": "user", "content": [part(one) for one in content]}]
    found, prompt = split_pictures(said)
    assert found == images
    assert prompt == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": kept if isinstance(kept, str) else [part(one) for one in kept]},
    ]


@pytest.mark.parametrize("messages", [None, [], "what?"])
def test_what_is_no_list_of_messages_is_refused(messages):
    with pytest.raises(ValueError, match="doc_to_messages gave"):
        split_pictures(messages)


def test_the_classes_that_the_entry_point_names_are_there(monkeypatch):
    import sys
    import types

    registry = types.ModuleType("registry")
    registry.ModelManifest = lambda **fields: fields
    for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
        monkeypatch.setitem(sys.modules, name, registry)
    found = lmms_eval_models()
    file = pathlib.Path(arguments.__file__).with_name("lmms_eval.py")
    classes = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}
    for path in (found["simple_class_path"], found["chat_class_path"]):
        module, name = path.rsplit(".", 1)
        assert module == "lmm_jax.integrations.lmms_eval"
        assert name in classes
    setup = (file.parents[2] / "setup.py").read_text()
    assert '"lmms_eval.models": ["lmm_jax = lmm_jax.integrations:lmms_eval_models"]' in setup
