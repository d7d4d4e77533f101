"""Scores, and evaluation from a workdir on another mesh."""

import json
import pathlib
import types

import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax import evaluation
from lmm_jax.config import ConfigError
from lmm_jax.data.prepare.datasets.digits import KINDS
from lmm_jax.evaluation.tasks import TASKS, Example, digits, pages
from lmm_jax.generation.answer import Answer
from tests.runs import begin

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("evaluation") / "run"
    begin(tiny("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(workdir):
    return lmm.load(workdir)


def test_scores():
    def score(kind, truth, answer):
        return digits.score(Example((), "", (truth,), kind), answer)

    assert score("cell", "7", "7") == score("exists", "no", " no ") == 1.0
    assert score("cell", "7", "77") == score("count", "1", "") == 0.0
    assert score("read", "1 2 3 4", "1 2 3 4") == 1.0
    assert score("read", "1 2 3 4", "1 9 3") == 0.5
    assert score("read", "1 2 3 4", "0 1 2 3 4") == 0.0


def test_each_test_picture_is_asked_each_kind_once(digits_folder):
    found = list(digits.examples(digits_folder, "test"))
    assert {kind: sum(e.kind == kind for e in found) for kind in KINDS} == dict.fromkeys(KINDS, 16)
    assert not any("<image>" in e.question for e in found)
    assert len(list(digits.examples(digits_folder, "test", limit=2))) == 10


def test_each_test_page_is_asked_a_cell_a_line_and_the_whole(pages_folder):
    found = list(pages.examples(pages_folder, "test"))
    assert all({e.kind for e in found[n : n + 3]} == {"cell", "line", "read"} for n in range(0, 48, 3))
    assert {(e.kind, len(e.answers[0].split())) for e in found} == {("cell", 1), ("line", 4), ("read", 16)}
    assert {e.question for e in found if e.kind == "read"} == {"read all"}
    cell, _, whole = sorted(found[:3], key=lambda e: e.kind)
    assert [pages.score(cell, answer) for answer in (*cell.answers, "", *whole.answers)] == [1.0, 0.0, 0.0]
    assert pages.score(whole, whole.answers[0][:8]) == 0.25


def test_evaluate_gives_every_kind_at_every_scale(model):
    results = evaluation.evaluate(model, ("digits",), scales=(1, 9), limit=4)
    assert list(results) == ["digits"] and list(results["digits"]) == ["1", "9"]
    values = results["digits"]["9"]
    assert {"cell", "count", "exists", "largest", "read", "n_read"} <= set(values) and values["n_read"] == 4
    assert all(0 <= values[k] <= 1 for k in ("cell", "read"))
    assert "digits tokens" in evaluation.table(results)
    with pytest.raises(ConfigError, match="task 'vqa' does not exist; choose from digits, pages, own"):
        evaluation.evaluate(model, ("vqa",))


def task(examples, **rest):
    """A task whose examples are those that the function `examples` gives."""
    about = {"FILES": "nothing at all", "SPLIT": "test", "MAX_NEW_TOKENS": 4, "examples": examples}
    return types.SimpleNamespace(**about | rest)


def repeats(*answers):
    """A model that gives these answers to whatever it is asked, and keeps what it was asked."""
    asked = []

    def request(images, prompt, scale, max_new_tokens, again):
        asked.append((images, prompt, scale, max_new_tokens))
        return len(asked) - 1

    def answer(requests):
        for n in requests:
            yield n, Answer(answers[n], (), (), "end", 1, asked[n][2], asked[n][2])

    data = types.SimpleNamespace(path=None, mixture=())
    program = types.SimpleNamespace(config=types.SimpleNamespace(data=data))
    return types.SimpleNamespace(
        request=request,
        answers=answer,
        expect=lambda images, prompt: None,
        scales=(9,),
        program=program,
        asked=asked,
        task="",
        length=60,
        tokenizer=types.SimpleNamespace(encode=str.split),  # a token a word
        check_budget=lambda scale: scale,
        room=lambda images, prompt, scale: 60 - scale * len(images) - len(str(prompt).split()),
    )


def test_any_of_several_answers_counts():
    example = Example((), "largest digit", ("7", "seven"), "largest")
    assert [digits.score(example, answer) for answer in ("7", "seven", "7 seven")] == [1.0, 1.0, 0.0]
    read = Example((), "read all", ("1 2 3 4", "4 3 2 1"), "read")
    assert [digits.score(read, answer) for answer in ("1 2 3 4", "4 3 2 9", "4 2")] == [1.0, 0.75, 0.25]


def test_a_task_may_score_all_answers_at_once(monkeypatch):
    examples = [Example((), f"is there a {n}?", ("yes",), "odd" if n % 2 else "even") for n in range(5)]

    def score_all(pairs):
        said = [answer for _, answer in pairs]
        assert all(example in examples for example, _ in pairs) and len(pairs) == 5
        return {"share of yes": np.float32(said.count("yes") / len(said)), "longest": max(map(len, said))}

    prompt = "{question} Answer yes or no."
    monkeypatch.setitem(TASKS, "odd", task(lambda *_: examples, score_all=score_all, PROMPT=prompt))
    model = repeats("yes", "no", "yes", "yes", "perhaps")
    results = evaluation.evaluate(model, ("odd",), data="anywhere")
    assert results == {"odd": {"9": {"share of yes": pytest.approx(0.6), "longest": 7.0, "n_even": 3, "n_odd": 2}}}
    assert json.loads(json.dumps(results)) == results
    assert [prompt for _, prompt, *_ in model.asked] == [f"is there a {n}? Answer yes or no." for n in range(5)]
    assert {tuple(rest) for _, _, *rest in model.asked} == {(9, 4)}
    assert "share of yes" in evaluation.table(results)


def test_each_task_reads_its_own_folder_and_split(monkeypatch):
    read = {}

    def reader(name):
        def examples(*arguments):
            read[name] = arguments
            return [Example((), "?", ("yes",), "all")]

        return task(examples, score=lambda example, answer: float(answer in example.answers), SPLIT=name)

    for name in ("a", "b"):
        monkeypatch.setitem(TASKS, name, reader(name))
    model = repeats(*["yes"] * 9)
    found = evaluation.evaluate(model, ("a", "b"), data={"a": "here", "b": "there"}, limit=3)
    assert read == {"a": ("here", "a", 3), "b": ("there", "b", 3)}
    assert found == {name: {"9": {"all": 1.0, "n_all": 1}} for name in ("a", "b")}
    model.program.config.data.path = "trained on"
    evaluation.evaluate(model, ("a", "b"), data={"b": "there"}, split="held out")
    assert read == {"a": ("trained on", "held out", None), "b": ("there", "held out", None)}
    model.program.config.data = types.SimpleNamespace(path=None, mixture=(("one", 1.0), ("one", 2.0)))
    evaluation.evaluate(model, ("a",))
    assert read["a"] == ("one", "a", None)


def test_a_mixture_run_is_evaluated_on_the_folder_that_is_named(model, digits_folder, monkeypatch):
    data = types.SimpleNamespace(path=None, mixture=((str(digits_folder), 1.0), ("elsewhere", 1.0)))
    monkeypatch.setattr(model, "program", types.SimpleNamespace(config=types.SimpleNamespace(data=data)))
    with pytest.raises(ConfigError, match="reads a folder that `lmm prepare .* several: .*, elsewhere; name one"):
        evaluation.evaluate(model, ("digits",))
    monkeypatch.undo()
    assert evaluation.load_examples(model, "digits", str(digits_folder), limit=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "name a task by --tasks, and its folder by --data DIR, since the model does not say what it was trained",
        ),
        (
            {"tasks": ("digits",)},
            "task 'digits' reads a folder .* the model names no folder of data; name one by --data DIR or --data",
        ),
        ({"tasks": "digits", "data": {"pages": "x"}}, "--data names a folder for pages; the tasks are digits"),
        ({"data": "nowhere"}, r"nowhere holds no prepared data \(no prepared.json\); run `lmm prepare`"),
        ({"data": "DIGITS", "split": "dev"}, r"has no split 'dev'; it has \['test', 'train', 'validation'\]"),
        ({"data": "DIGITS", "limit": 0}, "task 'digits' has no examples in .*, split 'test'; it reads a folder"),
        ({"tasks": ("vqa",)}, "task 'vqa' does not exist; choose from digits, pages, own"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_answered(digits_folder, arguments, message):
    model = repeats()
    if arguments.get("data") == "DIGITS":
        arguments = arguments | {"data": digits_folder}
    with pytest.raises((ConfigError, FileNotFoundError, ValueError), match=message):
        evaluation.evaluate(model, **arguments)
    assert not model.asked


def test_the_task_is_that_of_the_data_unless_one_is_named(digits_folder, pages_folder, tmp_path):
    """Of the folder that is named, of the one that was trained on, or the one that an export remembers."""
    model = repeats()
    assert evaluation.find_tasks(model, digits_folder) == ("digits",)
    assert evaluation.find_tasks(model, {"pages": "here", "own": "there"}) == ("pages", "own")
    model.task = "own"
    assert evaluation.find_tasks(model) == ("own",)
    model.program.config.data.path = str(pages_folder)
    assert evaluation.find_tasks(model) == ("pages",)
    about = json.loads((digits_folder / "prepared.json").read_text())
    (tmp_path / "prepared.json").write_text(json.dumps(about | {"source": {"data": "rows.json"}}))
    model.program.config.data.path = str(tmp_path)
    assert evaluation.find_tasks(model) == ("own",)
    (tmp_path / "prepared.json").write_text(json.dumps(about | {"source": {"dataset": "squares"}}))
    with pytest.raises(ConfigError, match="since its data are 'squares', which no task is called: digits reads a "):
        evaluation.find_tasks(model)
    with pytest.raises(FileNotFoundError, match="nowhere holds no prepared data"):
        evaluation.find_tasks(model, "nowhere")


def test_questions_that_do_not_fit_are_left_out_at_every_scale_and_said(monkeypatch, capsys):
    short, long = (Example((), " ".join(["word"] * n), ("yes it is", "yes"), "all") for n in (57, 60))
    monkeypatch.setitem(TASKS, "long", task(lambda *_: [short, long], score=lambda *_: 1.0))
    model = repeats("yes", "yes")
    results = evaluation.evaluate(model, ("long",), scales=(9, 1), data="anywhere")
    assert results == {"long": {scale: {"all": 1.0, "n_all": 1, "n_left_out": 1} for scale in ("9", "1")}}
    assert [tokens for *_, tokens in model.asked] == [3, 3]  # what there is room for, of the task's four
    said = capsys.readouterr().err
    assert "long: 1 of 2 questions with their answers do not fit into the 60 positions that were trained" in said
    monkeypatch.setitem(TASKS, "long", task(lambda *_: [long], score=lambda *_: 1.0))
    with pytest.raises(ConfigError, match="task 'long': 1 of 1 questions .*; ask at smaller --scales"):
        evaluation.evaluate(model, ("long",), data="anywhere")


def test_a_task_may_say_how_long_answers_are_and_what_was_said_before(monkeypatch):
    history = (("system", "Be brief."), ("user", "<image>\nWhat?"), ("assistant", "A cat."))
    examples = [Example(("a.png",), "Where?", ("here",), "all", history)]
    about = {
        "score": lambda *_: 1.0,
        "max_new_tokens": lambda found, tokenizer: 7 * len(found),
        "PROMPT": "{question}!",
    }
    monkeypatch.setitem(TASKS, "talk", task(lambda *_: examples, **about))
    model = repeats("here")
    evaluation.evaluate(model, "talk", data="anywhere")
    (((picture,), prompt, scale, tokens),) = model.asked
    assert (picture, scale, tokens) == ("a.png", 9, 7)
    assert [turn["role"] for turn in prompt] == ["system", "user", "assistant", "user"]
    assert prompt[1]["content"] == "<image>\nWhat?" and prompt[-1]["content"] == "Where?!"


def test_the_scores_of_kinds_stand_in_lines_of_their_own():
    values = {"exact": 0.5, "choice": 0.25, "n_left_out": 3}
    values |= {"colour/exact": 1.0, "n_colour": 1200, "n_s/exact": 0.0, "n_n_s": 2}
    found = evaluation.table({"own": {"1": values, "9": values | {"exact": 0.75}}}).splitlines()
    assert [line.split() for line in found] == [
        ["own", "tokens", "exact", "choice"],
        ["1", "0.500", "0.250"],
        ["9", "0.750", "0.250"],
        [],
        ["tokens", "kind", "questions", "exact", "choice"],
        *(
            [scale, *kind]
            for scale in "19"
            for kind in (["colour", "1,200", "1.000", "–"], ["n_s", "2", "0.000", "–"])
        ),
    ]
    assert len({len(line) for line in found[:3]}) == len({len(line) for line in found[4:]}) == 1
