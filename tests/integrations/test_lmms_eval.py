"""lmms-eval itself asks a model, offline: it runs with --eval, where lmms_eval is installed."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

from lmm_jax.evaluation import evaluate
from lmm_jax.evaluation.tasks import digits
from lmm_jax.generation.model import load

ROOT = pathlib.Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
SCALES = (9, 36)
ROWS = 8  # pictures, of five questions each

DATA = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
doc_to_visual: !function utils.pictures
doc_to_target: answer
"""
GENERATED = """
task: digits
output_type: generate_until
doc_to_text: question
process_results: !function utils.score
generation_kwargs:
  max_new_tokens: 12
  temperature: 0
  do_sample: false
"""
ROUNDS = """
task: digits_rounds
output_type: generate_until_multi_round
doc_to_text: !function utils.rounds
process_results: !function utils.of_rounds
generation_kwargs:
  max_new_tokens: 12
"""
CHOICES = """
task: digits_choices
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["yes", "no"]
"""
UTILS = """
from PIL import Image

from lmm_jax.evaluation.tasks import Example, digits


def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def score(doc, results):
    example = Example((), doc["question"], (doc["answer"],), doc["kind"])
    return {doc["kind"]: digits.score(example, results[0])}


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, [*previous_output, "over"], None
    return pictures(doc), "read all", False, previous_output, None


def of_rounds(doc, results):
    return {"rounds": float(len(results[0]))}
"""


def metrics(*names):
    of_each = "  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"
    return "metric_list:\n" + "".join(of_each.format(name) for name in names)


@pytest.fixture(scope="module")
def asked(tmp_path_factory, digits_folder, tiny):
    """A folder with the harness's files and the workdir of a run; the examples in the order of the questions."""
    pytest.importorskip("lmms_eval", reason="lmms_eval is not installed: pip install 'lmm_jax[eval]'")
    import lmm_jax as lmm

    folder = tmp_path_factory.mktemp("harness")
    lmm.train(tiny("train.steps=400"), folder / "run")
    examples, lines = list(digits.examples(digits_folder, "test", ROWS)), []
    for number, example in enumerate(examples):
        path = folder / f"{number}.png"
        example.images[0].save(path)
        line = {"question": example.question, "answer": example.answers[0], "kind": example.kind}
        lines.append(json.dumps({"images": [str(path)], **line}))
    exists = [line for line in lines if json.loads(line)["kind"] == "exists"]
    kinds = sorted({example.kind for example in examples})
    for name, of_task, metric, of_file in (
        ("digits", GENERATED, metrics(*kinds), lines),
        ("rounds", ROUNDS, metrics("rounds"), exists),
        ("choices", CHOICES, metrics("acc", "exact_match"), exists),
    ):
        questions = folder / f"{name}.jsonl"
        questions.write_text("\n".join(of_file))
        (folder / f"{name}.yaml").write_text(of_task + DATA.format(questions=questions) + metric)
    (folder / "utils.py").write_text(UTILS)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        patch.setenv("HF_HOME", str(folder / "hf"))
        yield folder, examples


@pytest.fixture(scope="module")
def model(asked):
    """The model of the run, which every evaluation shares, so that its programs are compiled once."""
    from lmm_jax.integrations import lmms_eval

    folder, _ = asked
    found = load(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lmms_eval, "load", lambda path: found)
        yield found


@pytest.fixture(scope="module")
def run(asked, model):
    """`run(task, model_args, **arguments)`: the results of one evaluation, by `simple_evaluate`."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    folder, _ = asked

    def evaluated(task, args="scale=9", **arguments):
        return simple_evaluate(
            model="lmm_jax",
            model_args=f"pretrained={folder / 'run'},{args}",
            tasks=[task],
            task_manager=TaskManager(include_path=str(folder), model_name="lmm_jax"),
            batch_size=1,
            log_samples=True,
            bootstrap_iters=0,
            **arguments,
        )

    return evaluated


def scores(results, task):
    """`{metric: value}` without the names of filters."""
    return {
        name.removesuffix(",none"): value
        for name, value in results["results"][task].items()
        if name.endswith(",none") and "stderr" not in name
    }


def answers(results, task):
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


@pytest.mark.parametrize("force_simple", [False, True], ids=["chat", "simple"])
def test_scores_answers_and_visual_tokens_are_those_of_lmm_evaluate(asked, run, model, digits_folder, force_simple):
    _, examples = asked
    ours = evaluate(model, ("digits",), SCALES, digits_folder, limit=ROWS)["digits"]
    for scale in SCALES:
        results = run("digits", f"scale={scale}", force_simple=force_simple)
        expected = {name: value for name, value in ours[str(scale)].items() if not name.startswith("n_")}
        assert scores(results, "digits") == pytest.approx(expected, abs=1e-12)
        said = model.generate(
            [example.images for example in examples],
            [example.question for example in examples],
            scale=scale,
            max_new_tokens=12,
        )
        assert answers(results, "digits") == [text.strip() for text in said]
        assert len(set(said)) > 5  # the run learned to say different things
        counted = [sample["token_counts"][0] for sample in results["samples"]["digits"]]
        assert {count["visual_tokens"] for count in counted} == {scale}
        assert all(count["input_tokens"] > scale for count in counted)
        assert results["throughput"]["avg_visual_tokens"] == scale


def test_of_choices_the_one_that_the_model_thinks_more_likely_is_taken(asked, run, model):
    _, examples = asked
    results = run("digits_choices", force_simple=True)
    right, greedy, choices = [], [], ["yes", "no"]
    exists = [example for example in examples if example.kind == "exists"]
    samples = sorted(results["samples"]["digits_choices"], key=lambda sample: sample["doc_id"])
    for example, sample in zip(exists, samples, strict=True):
        logprobs = model.score(example.images, example.question, choices, 9)
        losses = [loss for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx([-logprob / 2 for logprob in logprobs], abs=1e-5)  # a word and the end
        right.append(choices[logprobs.index(max(logprobs))] == example.answers[0])
        said = model.generate(example.images, example.question, scale=9, max_new_tokens=2)
        greedy.append(said == example.answers[0])
        assert [count["visual_tokens"] for count in sample["token_counts"]] == [9, 9]
    found = scores(results, "digits_choices")
    assert found["acc"] == pytest.approx(sum(right) / len(right))
    assert found["exact_match"] == pytest.approx(sum(greedy) / len(greedy))


def test_rounds_are_the_same_in_both_forms_and_what_the_model_says(asked, run, model):
    _, examples = asked
    simple = run("digits_rounds", force_simple=True)
    assert answers(simple, "digits_rounds") == answers(run("digits_rounds"), "digits_rounds")
    exists = [example for example in examples if example.kind == "exists"]
    for example, said in zip(exists, answers(simple, "digits_rounds"), strict=True):
        asked_in_turn = [example.question, "read all"]
        texts = model.generate([example.images] * 2, asked_in_turn, scale=9, max_new_tokens=12)
        assert said == [*(text.strip() for text in texts), "over"]
    assert {sample["token_counts"][0]["visual_tokens"] for sample in simple["samples"]["digits_rounds"]} == {18}


@pytest.mark.parametrize("task", ["digits", "digits_rounds", "digits_choices"])
def test_the_harness_may_keep_answers_and_take_them_again(run, tmp_path, task):
    first, again = (run(task, force_simple=True, use_cache=str(tmp_path)) for _ in range(2))
    assert scores(first, task) == scores(again, task)
    assert answers(first, task) == answers(again, task)


def test_until_ends_an_answer_and_draws_differ(run):
    whole = answers(run("digits"), "digits")
    cut = answers(run("digits", gen_kwargs="until=e"), "digits")
    assert cut == [text.split("e")[0].strip() for text in whole]
    assert cut != whole
    drawn = [
        answers(run("digits", f"scale=9,seed={seed}", gen_kwargs="temperature=2,do_sample=True"), "digits")
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def instance(kind, *args):
    from lmms_eval.api.instance import Instance

    metadata = {"task": "digits", "doc_id": 0, "repeats": 1}
    return Instance(request_type=kind, arguments=(*args, 0, "digits", "test"), idx=0, metadata=metadata)


def test_several_pictures_stand_where_the_text_says_in_both_forms(asked, model):
    from lmm_jax.integrations.lmms_eval import ChatModel, SimpleModel

    folder, examples = asked
    pictures = [examples[0].images[0], examples[5].images[0]]
    text = "in <image> and <image> read all"
    parts = [*({"type": "image", "url": picture} for picture in pictures), {"type": "text", "text": text}]
    simple, chat = (of_class(str(folder / "run"), scale=9, max_length=60) for of_class in (SimpleModel, ChatModel))
    simple.task_dict = chat.task_dict = {"digits": {"test": [None]}}
    options = {"max_new_tokens": 12}
    expected = model.generate(pictures, text, scale=9, max_new_tokens=12)
    (first,) = simple.generate_until([instance("generate_until", text, options, lambda _: pictures)])
    message = [{"role": "user", "content": parts}]
    (second,) = chat.generate_until([instance("generate_until", text, lambda _: message, options)])
    assert first.text == second.text == expected
    assert first.token_counts.to_dict() == second.token_counts.to_dict()
    assert first.token_counts.visual_tokens == 18


def test_the_command_prints_the_harness_s_table(asked):
    """Through the entry point, which the harness would leave out with a warning if anything were wrong."""
    folder, _ = asked
    command = [sys.executable, "-m", "lmms_eval", "--model", "lmm_jax", "--include_path", folder, "--tasks", "digits"]
    command += ["--model_args", f"pretrained={folder / 'run'},scale=9", "--batch_size", "1", "--limit", "4"]
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True, check=True
    )
    assert "|digits|none" in done.stdout
    assert "avg_visual_tokens" in done.stdout
    assert "entry-point" not in done.stdout + done.stderr


def test_a_fault_is_not_an_empty_answer(asked, run):
    folder, _ = asked
    picture = folder / "0.png"
    whole = picture.read_bytes()
    with contextlib.ExitStack() as stack:
        stack.callback(picture.write_bytes, whole)
        picture.write_bytes(b"no picture")
        with pytest.raises(OSError, match="task 'digits', document 0 of split 'test': cannot identify"):
            run("digits")
        results = run("digits", "scale=9,skip_bad=True")
        assert answers(results, "digits")[0] == ""
        assert "" not in answers(results, "digits")[1:]
