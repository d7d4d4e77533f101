"""Requests of lmms-eval on their way to a model and back; a few classes stand for lmms-eval and for the model."""

import dataclasses
import importlib
import sys
import types

import pytest

from lmm_jax.generation.answer import Answer
from lmm_jax.generation.model import load

NAMES = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model", "lmms_eval.models")
NAMES = (*NAMES, "lmms_eval.models.model_utils", "lmms_eval.models.model_utils.gen_metrics", "loguru")


@dataclasses.dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    def to_dict(self):
        return {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}


@dataclasses.dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class Harness:
    def __init__(self):
        self.task_dict, self.cache_hook = {}, types.SimpleNamespace(add_partial=lambda *_: None)

    def _resolve_system_prompt(self, value):
        return value


class Request:
    def __init__(self, *asked):
        self.asked = asked


class Answering:
    """A model that answers with what it was asked, in the opposite order."""

    length, tokenizer = 100, None

    def check_budget(self, scale):
        if scale not in (None, 9, "auto"):
            raise ValueError(f"scale={scale}")

    def room(self, images, prompt, scale):
        assert scale != "auto"
        return 90

    def request(self, images, prompt, scale, max_new_tokens, **options):
        if "too long" in str(prompt):
            raise ValueError("prompt takes 200 positions")
        return Request(images, prompt, scale, max_new_tokens, options)

    def answers(self, requests, at_a_time):
        for request in reversed(list(requests)):
            images, prompt, *_ = request.asked
            if images == ["damaged"]:
                yield request, OSError("picture 1 is damaged")
            else:
                yield request, Answer(f"{prompt}!", (1, 2), (0.0, 0.0), "end", 5 + len(images), len(images), 1)


@pytest.fixture
def plugin(monkeypatch):
    """The module, with what it says to the user in `said`."""
    modules = {name: types.ModuleType(name) for name in NAMES}
    said = []
    modules["lmms_eval.api.instance"].GenerationResult = GenerationResult
    modules["lmms_eval.api.instance"].TokenCounts = TokenCounts
    modules["lmms_eval.api.model"].lmms = Harness
    modules["lmms_eval.models.model_utils.gen_metrics"].log_metrics = lambda *_: None
    modules["loguru"].logger = types.SimpleNamespace(info=said.append, warning=said.append)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "lmm_jax.integrations.lmms_eval", raising=False)
    found = importlib.import_module("lmm_jax.integrations.lmms_eval")
    monkeypatch.setattr(found, "load", lambda path: Answering())
    monkeypatch.setattr(found, "said", said, raising=False)
    yield found
    sys.modules.pop("lmm_jax.integrations.lmms_eval")


def instances(*all_args):
    return [types.SimpleNamespace(args=args) for args in all_args]


def texts(results):
    return [result.text for result in results]


DOCUMENTS = {"t": {"test": [["a"], [["b"], "c"], None, ["damaged"]]}}


def simple(doc_id, context="what?", gen_kwargs=None, *more):
    return context, gen_kwargs or {}, lambda doc: doc, *more, doc_id, "t", "test"


def test_answers_come_back_in_the_order_of_the_requests_with_their_tokens(plugin):
    model = plugin.SimpleModel("m", scale=9, system_prompt="")
    model.task_dict = DOCUMENTS
    results = model.generate_until(instances(simple(1, "x"), simple(0, "y"), simple(2, "z")))
    assert texts(results) == ["x!", "y!", "z!"]
    counts = {"input_tokens": 7, "output_tokens": 2, "visual_tokens": 2}
    assert results[0].token_counts.to_dict() == counts  # of a nested list of two pictures
    assert results[2].token_counts.visual_tokens == 0


@pytest.mark.parametrize(
    ("arguments", "given", "tokens"),
    [({}, {}, 90), ({}, {"max_new_tokens": 16}, 16), ({"max_length": 30}, {}, 20)],
)
def test_an_answer_is_as_long_as_asked_for_or_as_there_is_room(plugin, arguments, given, tokens):
    model = plugin.SimpleModel("m", scale="auto", seed=3, **arguments)
    model.task_dict, seen = DOCUMENTS, []
    model.model.request = lambda *args, **options: seen.append((*args, options)) or Answering.request(0, *args)
    model.generate_until(instances(simple(0, gen_kwargs={"until": "."} | given)))
    options = {"stop": ["."], "repetition_penalty": 1.0}
    assert seen == [(["a"], "what?", "auto", tokens, options)]


def test_a_system_prompt_comes_first_in_both_forms(plugin):
    said = {"role": "user", "content": [{"type": "image", "url": "a"}]}
    for of_class, args, last in (
        (plugin.SimpleModel, simple(0), {"role": "user", "content": "what?"}),
        (plugin.ChatModel, ("what?", lambda doc: [said], {}, 0, "t", "test"), said),
    ):
        model = of_class("m", system_prompt="Be brief.")
        model.task_dict = DOCUMENTS
        (text,) = texts(model.generate_until(instances(args)))
        assert text == f"{[{'role': 'system', 'content': 'Be brief.'}, last]}!"


def test_rounds_go_on_until_the_task_ends_them(plugin):
    def text(doc, previous_output, round_idx, previous_round_info):
        assert len(previous_output) == round_idx
        assert previous_round_info == (None if round_idx == 1 else {"round": round_idx - 1})
        if round_idx == (2 if doc == ["a"] else 3):
            return None, None, True, [*previous_output, "over"], None
        return doc, f"{round_idx}", False, previous_output, {"round": round_idx}

    def messages(doc, **of_round):
        if not of_round:
            return [{"role": "user", "content": "what?"}]
        _, context, *rest = text(doc, **of_round)
        return [{"role": "user", "content": context}], *rest

    for model, args in (
        (plugin.SimpleModel("m"), lambda n: simple(n, "what?", {}, text)),
        (plugin.ChatModel("m"), lambda n: ("what?", messages, {}, n, "t", "test")),
    ):
        model.task_dict = DOCUMENTS
        first, second = model.generate_until_multi_round(instances(args(0), args(1)))
        assert [len(first.text), len(second.text)] == [3, 4]
        assert first.text[-1] == second.text[-1] == "over"
        assert "1" in first.text[1] and "2" in second.text[2]
        assert second.token_counts.output_tokens == 6
        assert isinstance(first.text, list)


def test_rounds_without_an_end_are_ended(plugin):
    model = plugin.SimpleModel("m")
    model.task_dict = DOCUMENTS
    endless = simple(0, "what?", {}, lambda doc, previous_output, **_: (doc, "again", False, previous_output, None))
    with pytest.raises(ValueError, match="^task 't', document 0 of split 'test': it is not over after 100 rounds"):
        model.generate_until_multi_round(instances(endless))
    plain = simple(0, "what?", {}, lambda doc, **_: "again")
    with pytest.raises(ValueError, match="the task gave a str for a further round, not a tuple of 5"):
        model.generate_until_multi_round(instances(plain))


@pytest.mark.parametrize(
    ("args", "error", "sentence"),
    [
        (simple(0, "too long"), ValueError, "task 't', document 0 of split 'test': prompt takes 200 positions"),
        (simple(3), OSError, "task 't', document 3 of split 'test': picture 1 is damaged"),
        (simple(0, gen_kwargs={"num_beams": 2}), ValueError, "task 't', generation_kwargs: num_beams: an answer is"),
        (simple(0)[:5], ValueError, "lmms-eval gave a request of 5 arguments; 6 or 7 are known"),
    ],
    ids=["long", "damaged", "beams", "arguments"],
)
def test_what_cannot_be_asked_ends_the_evaluation_by_its_name(plugin, args, error, sentence):
    model = plugin.SimpleModel("m")
    model.task_dict = DOCUMENTS
    with pytest.raises(error, match=f"^{sentence}"):
        model.generate_until(instances(simple(1), args))


def test_with_skip_bad_it_has_an_empty_answer_and_is_counted(plugin):
    model = plugin.SimpleModel("m", skip_bad=True)
    model.task_dict = DOCUMENTS
    results = model.generate_until(instances(simple(0, "too long"), simple(1), simple(3)))
    assert texts(results) == ["", "what?!", ""]
    assert [result.token_counts is None for result in results] == [True, False, True]
    said = "\n".join(plugin.said)
    assert "document 0 of split 'test': prompt takes 200 positions; its answer is empty" in said
    assert "document 3 of split 'test': picture 1 is damaged" in said
    assert "2 of 3 questions could not be asked" in said


def test_an_option_that_means_nothing_here_is_said_once(plugin):
    model = plugin.SimpleModel("m")
    model.task_dict = DOCUMENTS
    model.generate_until(instances(*[simple(0, gen_kwargs={"length_penalty": 2})] * 3))
    assert [line for line in plugin.said if "length_penalty" in line] == [
        "task 't', generation_kwargs: length_penalty is not known here, and ignored"
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "model_args: pretrained=DIR is missing"),
        ({"pretrained": "m", "scale": 7}, "scale=7"),
        ({"pretrained": "m", "device_map": "cpu"}, "model_args: 'device_map' is not known"),
        ({"pretrained": "m", "max_length": 101}, "model_args: max_length=101 .* 1 to 100 is valid"),
        ({"pretrained": "m", "skip_bad": "maybe"}, "model_args: skip_bad='maybe'"),
        ({"pretrained": "m", "seed": -1}, "model_args: seed=-1"),
        ({"pretrained": "m", "batch_size": "huge"}, "batch_size='huge'"),
        ({"pretrained": "m", "max_length": 10}, "task 't', document 0 .* no room for an answer in max_length=10"),
    ],
    ids=lambda value: str(value),
)
def test_arguments_that_mean_nothing_are_refused_by_name(plugin, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        model = plugin.SimpleModel(**arguments)
        model.task_dict = DOCUMENTS
        model.generate_until(instances(simple(0)))


def test_one_process_has_all_chips(plugin, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="WORLD_SIZE is 8: start one process"):
        plugin.SimpleModel("m")


def test_what_is_not_the_plug_in_s_goes_to_lmm_load(plugin, monkeypatch):
    seen = {}
    monkeypatch.setattr(plugin, "load", lambda path, **options: seen.update(path=path, **options) or Answering())
    monkeypatch.setattr(sys.modules["lmm_jax.integrations.arguments"], "load", load)
    plugin.SimpleModel(9, dtype="auto", template="qa", device="cuda:0")
    assert seen == {"path": "9", "dtype": None, "template": "qa"}
    assert any("--device cuda:0 is not what JAX runs on (cpu)" in line for line in plugin.said)
