"""Answers that are kept as they come: what is interrupted goes on, and every question is asked once."""

import json
import pathlib
import types

import ml_collections
import numpy as np
import pytest
from PIL import Image

from lmm_jax import evaluation
from lmm_jax.config import ConfigError
from lmm_jax.evaluation import records, summary
from lmm_jax.evaluation.questions import Question, prepare
from lmm_jax.evaluation.run import answer_all, digest
from lmm_jax.evaluation.tasks import TASKS, Example
from lmm_jax.generation.answer import Answer
from lmm_jax.generation.auto import Auto, Way

MISSING = "broken.png"


class Model:
    """Says the question's last word; `dies_after` answers it ends as a killed process would."""

    def __init__(self, dies_after=None, identity="one", refuses=()):
        pictures = {"aspect": "pad", "canvas": (), "tilings": (), "views": 1, "template": "qa", "path": None}
        of_model = {"encoder": "vit", "reduction": "pool"}
        config = ml_collections.ConfigDict({"data": {**pictures, "mixture": ()}, "model": of_model})
        self.program = types.SimpleNamespace(config=config)
        self.tokenizer = types.SimpleNamespace(encode=str.split)
        self.scales, self.length, self.auto, self.task = (1, 9), 60, None, ""
        self.identity, self.asked, self.dies_after, self.refuses = identity, [], dies_after, refuses

    def check_budget(self, scale):
        return scale

    def room(self, images, prompt, scale):
        if MISSING in images:
            raise FileNotFoundError(f"images[0]: no file {MISSING}")
        return 60 - scale

    def request(self, images, prompt, scale, max_new_tokens, again):
        return (prompt, scale)

    def answers(self, requests):
        waiting = list(requests)
        for prompt, scale in reversed(waiting):  # in another order than they were asked in
            if self.dies_after == len(self.asked):
                raise KeyboardInterrupt
            if prompt in self.refuses:
                yield (prompt, scale), ValueError("damaged")
                continue
            self.asked.append((prompt, scale))
            yield (prompt, scale), Answer(prompt.split()[-1], (1,), (-0.5,), "end", 9, scale, scale, -0.25)

    def expect(self, images, prompt):
        return [0.25, 0.75]


@pytest.fixture
def examples(monkeypatch):
    def make(count=10, pictures=(), **rest):
        found = [
            Example(
                (pictures[n],) if n in dict(enumerate(pictures)) else (), f"say {n}", (str(n),), "ab"[n % 2], id=n
            )
            for n in range(count)
        ]
        about = {"FILES": "nothing", "SPLIT": "test", "MAX_NEW_TOKENS": 4, "examples": lambda *_: found}
        about["score"] = lambda example, answer: float(answer in example.answers)
        monkeypatch.setitem(TASKS, "say", types.SimpleNamespace(**about | rest))

    return make


def evaluate(model, out, scales=(1, 9), **rest):
    return evaluation.evaluate_tasks(model, "say", scales, "anywhere", out=out, **rest)


@pytest.mark.parametrize("dies_after", [0, 1, 7, 10, 13, 19])
def test_an_evaluation_that_is_killed_goes_on_and_asks_nothing_twice(examples, tmp_path, dies_after):
    examples()
    whole = evaluate(Model(), tmp_path / "whole")
    first, second = Model(dies_after), Model()
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, tmp_path / "killed")
    found = evaluate(second, tmp_path / "killed")
    assert sorted(first.asked + second.asked) == sorted((f"say {n}", scale) for n in range(10) for scale in (1, 9))
    metrics = {"a": 1.0, "b": 1.0, "n_a": 5, "n_b": 5}
    assert found.results == whole.results == {"say": {"1": metrics, "9": metrics}}
    for name in ("1.jsonl", "9.jsonl"):
        both = [records.read(tmp_path / run / "evaluation/say" / name)[1] for run in ("whole", "killed")]
        assert [r.number for r in both[0]] == list(range(10))
        strip = [[records.to_line(r).partition('"seconds"')[0] for r in of] for of in both]
        assert strip[0] == strip[1]
    assert sorted(p.name for p in (tmp_path / "killed/evaluation/say").iterdir()) == ["1.jsonl", "9.jsonl"]
    third = Model()
    assert evaluate(third, tmp_path / "killed").results == whole.results and not third.asked


def test_a_record_says_what_was_asked_and_how_sure_the_model_was(examples, tmp_path):
    examples(2, PROMPT="Please {question}")
    evaluate(Model(), tmp_path, (9,))
    header, (first, _) = records.read(tmp_path / "evaluation/say/9.jsonl")
    assert (first.id, first.question, first.truths, first.answer, first.score) == (
        0,
        "Please say 0",
        ("0",),
        "0",
        1.0,
    )
    assert (first.logprobs, first.end, first.expected, first.scale) == ((-0.5,), -0.25, (0.25, 0.75), 9)
    about = {
        "task": "say",
        "split": "test",
        "scale": 9,
        "model": "one",
        "template": "qa",
        "prompt": "Please {question}",
    }
    assert about.items() <= header.items()
    assert header["decoding"] == {"greedy": True, "max_new_tokens": 4} and header["questions"] == 2
    assert header["preprocessing"]["reduction"] == "pool" and header["preprocessing"]["aspect"] == "pad"


def test_a_folder_is_the_same_from_wherever_it_is_named(examples, tmp_path, monkeypatch):
    examples()
    monkeypatch.chdir(tmp_path)
    evaluate(Model(), tmp_path)
    again = Model()
    evaluation.evaluate(again, "say", (1, 9), str(tmp_path / "anywhere"), out=tmp_path)
    assert not again.asked


def test_what_was_put_aside_for_a_short_look_is_not_asked_again(examples, tmp_path, capsys):
    examples()
    evaluate(Model(), tmp_path)
    evaluate(Model(), tmp_path, limit=3)
    again = Model()
    evaluate(again, tmp_path)
    assert not again.asked and "are taken up again" in capsys.readouterr().err


def test_answers_that_had_less_room_are_not_those_of_a_run_that_has_more(examples, tmp_path):
    """At the largest scale there is room for two tokens after some questions; alone, the small one leaves four."""
    examples(2)
    model = Model()
    model.room = lambda images, prompt, scale: 11 - scale if prompt == "say 1" else 40
    evaluate(model, tmp_path)
    header, _ = records.read(tmp_path / "evaluation/say/1.jsonl")
    assert header["decoding"]["max_new_tokens"] == 4
    model.asked.clear()
    evaluate(model, tmp_path, (1,))
    assert len(model.asked) == 2


def test_a_scale_and_a_task_that_are_named_twice_are_asked_once(examples):
    examples(2)
    model = Model()
    found = evaluation.evaluate_tasks(model, ("say", "say"), (9, 9), "anywhere")
    assert len(model.asked) == 2 and list(found.results["say"]) == ["9"]
    assert list(evaluation.evaluate(model, "say", 1, "anywhere")["say"]) == ["1"]


def test_pictures_in_memory_are_told_apart_by_what_they_show():
    def of(*images):
        return digest([Question(0, Example(images, "q", ("a",), "k"), "q", 4, 0)])

    black, white = (Image.new("L", (2, 2), value) for value in (0, 255))
    assert of(black) == of(black.copy()) and len({of(black), of(white), of(b"1"), of(b"2"), of("a.png")}) == 5


def test_auto_that_was_fitted_anew_answers_anew(examples, tmp_path):
    """The same way and the same price, and other weights."""
    examples(2)
    model = Model()
    for weight in (0.0, 1.0, 1.0):
        weights = dict.fromkeys([(1, 1), (1, 9), (9, 9)], (weight, 0.0, 0.0, 0.0))
        model.auto = Auto((1, 9), weights, {}, {}, {"cascade": Way(9, True, 0.0)}, "cascade")
        model.check_budget = lambda scale: scale
        model.request = lambda images, prompt, scale, max_new_tokens, again: (prompt, 9)
        evaluate(model, tmp_path, "auto")
    assert len(model.asked) == 4


def test_where_nothing_can_be_answered_that_is_said(examples, tmp_path):
    examples(2)
    with pytest.raises(ConfigError, match="task 'say': none of 2 questions could be answered at all scales"):
        evaluate(Model(refuses=("say 0", "say 1")), tmp_path, skip_bad=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"score": None}, "it scores all at once"),
        ({"examples": lambda *_: [Example((), "say 0", (), "all")]}, "the truth of 1 questions is not in its files"),
        ({}, "task 'say' asks about no picture"),
    ],
)
def test_a_task_that_tells_no_needs_is_refused_before_it_is_asked(examples, tmp_path, task, message):
    examples(**task)
    if task.get("score", True) is None:
        del TASKS["say"].score
    model = Model()
    with pytest.raises(ConfigError, match=message):
        evaluate(model, tmp_path, scored=True)
    assert not model.asked and not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("other", ["identity", "question", "limit"])
def test_answers_of_another_model_or_to_other_questions_are_kept_aside(examples, tmp_path, capsys, other):
    examples()
    evaluate(Model(), tmp_path, (9,))
    if other == "question":
        examples(11)
    model = Model(identity="two" if other == "identity" else "one")
    evaluate(model, tmp_path, (9,), limit=3 if other == "limit" else None)
    assert len(model.asked) == (11 if other == "question" else 10)
    assert "lie in" in capsys.readouterr().err
    assert len(records.read(tmp_path / "evaluation/say/older/9-1.jsonl")[1]) == 10


def test_hosts_share_the_questions_out(examples, tmp_path, monkeypatch):
    """Three hosts, one after the other, as no barrier holds them here: each asks its third, the last finds all."""
    examples()
    model = Model()
    asked = prepare(model, "say", "anywhere", None, None, 9)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    monkeypatch.setattr("lmm_jax.pods.hosts.everywhere", lambda fine: fine)
    monkeypatch.setattr("lmm_jax.pods.hosts.anywhere", np.array)
    monkeypatch.setattr("lmm_jax.pods.hosts.check_same", lambda **_: None)
    opened = [evaluation._open(model, "say", asked, 9, None, tmp_path) for _ in range(3)]
    for host, results in enumerate(opened):
        results._host = host  # skip_bad leaves out what is bad, and not what another host has not answered
        monkeypatch.setattr("jax.process_index", lambda host=host: host)
        if host < 2:
            with pytest.raises(
                ValueError, match="answers of other hosts are not there; --out has to be a folder that"
            ):
                answer_all(model, asked, 9, results, "say", skip_bad=host == 1)
        else:
            answer_all(model, asked, 9, results, "say")
    assert sorted(prompt for prompt, _ in model.asked) == [f"say {n}" for n in range(10)]
    assert sorted(opened[2].done) == list(range(10))


def test_several_hosts_need_a_folder(examples, monkeypatch):
    examples()
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ConfigError, match="several hosts share out what is asked by a folder"):
        evaluate(Model(), None)


def test_a_missing_picture_is_refused_by_name_or_counted(examples, tmp_path, capsys):
    examples(4, ("a.png", MISSING, "c.png"))
    with pytest.raises(
        FileNotFoundError, match=f"say: question 1: .*no file {MISSING}; --skip-bad goes on without it"
    ):
        evaluate(Model(), tmp_path)
    assert not (tmp_path / "evaluation").exists()
    found = evaluate(Model(), tmp_path, skip_bad=True)
    assert found.results["say"]["9"] == {"a": 1.0, "b": 1.0, "n_a": 2, "n_b": 1, "n_unreadable": 1}
    assert f"say: left out: question 1: images[0]: no file {MISSING}" in capsys.readouterr().err
    assert records.read(tmp_path / "evaluation/say/9.jsonl")[0]["missing"] == [
        [1, f"question 1: images[0]: no file {MISSING}"]
    ]
    assert "1 were left out, as their pictures cannot be read**: no scores of the whole set\n  - question 1" in (
        summary.text(Model(), found)
    )


def test_a_picture_that_turns_out_to_be_damaged_is_refused_or_counted_and_loses_no_answer(examples, tmp_path):
    examples(4)
    with pytest.raises(ValueError, match="say at 1 tokens: question 2: damaged; --skip-bad goes on without it"):
        evaluate(Model(refuses=("say 2",)), tmp_path)
    found = evaluate(Model(refuses=("say 2",)), tmp_path, skip_bad=True)
    assert found.results["say"]["1"] == {"a": 1.0, "b": 1.0, "n_a": 1, "n_b": 2, "n_unreadable": 1}
    assert [q.number for q in found.questions("say")] == [0, 1, 3]
    mended = Model()
    assert evaluate(mended, tmp_path).results["say"]["1"]["n_a"] == 2
    assert sorted(mended.asked) == [("say 2", 1), ("say 2", 9)]


def test_what_a_task_finds_wrong_ends_it_before_anything_is_asked(examples, tmp_path, capsys):
    examples(2, check=lambda folder, split: ["2 pictures are missing: x.png, y.png", "not as published: 2 questions"])
    with pytest.raises(
        ConfigError, match=r"task 'say' cannot be asked from anywhere: 2 pictures .*y\.png\. `lmm eval"
    ):
        evaluate(Model(), tmp_path)
    found = evaluate(Model(), tmp_path, skip_bad=True)
    assert "say: not as published: 2 questions" in capsys.readouterr().err
    assert records.read(tmp_path / "evaluation/say/9.jsonl")[0]["remarks"] == ["not as published: 2 questions"]
    assert "- **not as published: 2 questions**" in summary.text(Model(), found)


def test_a_split_without_truths_gives_the_file_for_the_server(examples, tmp_path):
    examples(2, submission=lambda pairs: ("answers.json", json.dumps([a for _, a in pairs]).encode()))
    TASKS["say"].examples = lambda *_: [Example((), f"say {n}", (), "all", id=n) for n in range(2)]
    found = evaluate(Model(), tmp_path, (9,))
    assert found.results == {"say": {"9": {"n_all": 2}}}
    assert [pathlib.Path(path).name for path in found.submissions] == ["9-answers.json"]
    assert json.loads(pathlib.Path(found.submissions[0]).read_text()) == ["0", "1"]
    assert "9-answers.json" in summary.text(Model(), found) and "mean score" not in summary.text(Model(), found)
