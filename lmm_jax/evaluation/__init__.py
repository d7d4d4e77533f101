"""Evaluation: every task at every token budget. Tasks stand in `lmm_jax.evaluation.tasks`."""

import collections.abc
import dataclasses
import json
import sys
from typing import Any

from etils import epath
from tqdm import tqdm

from lmm_jax.config import ConfigError, choose
from lmm_jax.data.prepared import data_set, folders_of, trained_data_set
from lmm_jax.evaluation.tasks import TASKS, Example
from lmm_jax.generation.model import load


def evaluate(workdir, tasks=None, scales=None, data=None, limit=None, split=None):
    """Answers every example of every task at every scale.

    Args:
      workdir: a workdir of `lmm train`, or a model that `lmm.load` returned.
      tasks: names in `tasks.TASKS`; if None, see `find_tasks`.
      scales: visual tokens a picture; all trained ones if None.
      data: folder of the tasks, or a dict {task: folder}. A task that it does not name reads the folder that the
        model was trained on.
      limit: examples of a kind; all if None.
      split: of the folders; each task's own `SPLIT` if None.

    Returns:
      `{task: {str(scale): {metric: value}}}`. The metrics are the mean score of each kind of question, or what the
      task's `score_all` gives; `n_KIND` are the questions of each kind. `n_left_out`, if there are any, are questions
      that `ask` leaves out at the largest scale; they are asked at none.

    Raises:
      ConfigError: a task that does not exist, or whose folder is not known, or has no examples that can be asked.
      FileNotFoundError, ValueError: what a task says of a folder that it cannot read, or a scale that is none.
    """
    model = load(workdir) if isinstance(workdir, str | epath.PathLike) else workdir
    tasks = find_tasks(model, data) if tasks is None else (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if isinstance(data, collections.abc.Mapping) and not data.keys() <= set(tasks):
        unknown = ", ".join(sorted(data.keys() - set(tasks)))
        raise ConfigError(f"--data names a folder for {unknown}; the tasks are {', '.join(tasks)}")
    scales = [model.check_scale(scale) for scale in (scales or model.scales)]
    # All of them before the first answer, so that a folder that is missing does not end a run of hours.
    asked = {name: _questions(model, name, load_examples(model, name, data, split, limit), scales) for name in tasks}
    return {
        name: {
            str(scale): evaluate_task(model, TASKS[name], questions, scale, f"{name} at {scale} tokens") | left_out
            for scale in scales
        }
        for name, (questions, left_out) in asked.items()
    }


def _questions(model, name, examples, scales):
    """`ask` at the largest scale, and `{"n_left_out": …}` if that leaves some out, which is said."""
    questions = ask(model, TASKS[name], examples, max(scales))
    left_out = len(examples) - len(questions)
    if not left_out:
        return questions, {}
    of_them = f"{left_out:,} of {len(examples):,} questions with their answers"
    trained = f"the {model.length:,} positions that were trained (data.length)"
    why = f"do not fit into {trained} at {max(scales)} visual tokens"
    if not questions:
        raise ConfigError(f"task '{name}': {of_them} {why}; ask at smaller --scales")
    print(f"{name}: {of_them} {why}, and are left out", file=sys.stderr)
    return questions, {"n_left_out": left_out}


def find_tasks(model, data=None) -> tuple[str, ...]:
    """The tasks to ask where none is named.

    Args:
      model: that `lmm.load` returned.
      data: see `evaluate`. Of a dict the tasks are those that it names a folder for. Otherwise the task is called as
        the data set of the folder, or as that of the folder that the model was trained on; or an export says it.

    Raises:
      ConfigError: none of them says so.
      FileNotFoundError: `data` is no prepared folder.
    """
    if data and isinstance(data, collections.abc.Mapping):
        return tuple(data)
    name = data_set(data) if data else trained_data_set(model.program.config.data) or model.task
    if name in TASKS:
        return (name,)
    why = (
        f"its data are '{name}', which no task is called" if name else "the model does not say what it was trained on"
    )
    known = "; ".join(f"{name} reads {task.FILES}" for name, task in TASKS.items())
    raise ConfigError(f"name a task by --tasks, and its folder by --data DIR, since {why}: {known}")


def load_examples(model, name, data=None, split=None, limit=None) -> list:
    """The examples of the task `name`; arguments and errors as of `evaluate`."""
    task = choose("task", name, TASKS)
    folder = _folder(name, task, data, model.program.config.data)
    examples = list(task.examples(folder, split or task.SPLIT, limit))
    if not examples:
        raise ConfigError(
            f"task '{name}' has no examples in {folder}, split '{split or task.SPLIT}'; it reads {task.FILES}"
        )
    return examples


def _folder(name, task, data, of_run):
    """The folder of a task: the one that `data` names, else that of the run."""
    folder = data.get(name) if isinstance(data, collections.abc.Mapping) else data
    if folder:
        return folder
    trained_on = folders_of(of_run)
    if len(trained_on) == 1:
        return trained_on[0]
    known = f"was trained on several: {', '.join(trained_on)}" if trained_on else "names no folder of data"
    raise ConfigError(
        f"task '{name}' reads {task.FILES}, and the model {known}; name one by --data DIR or --data {name}=DIR"
    )


@dataclasses.dataclass(frozen=True)
class Question:
    """An example as a model is asked it.

    Attributes:
      example: an `Example`.
      prompt: as `Model.generate` takes it.
      max_new_tokens: that its answer may have.
    """

    example: Example
    prompt: Any
    max_new_tokens: int


def ask(model, task, examples, scale) -> list[Question]:
    """The questions of a task that fit into what a model was trained on.

    Args:
      model: that `lmm.load` returned.
      task: module of `tasks.TASKS`.
      examples: its `Example`s.
      scale: visual tokens of a picture, the most that will be asked.

    Returns:
      a `Question` for each example whose prompt leaves room for its shortest true answer. The answer may have as many
      tokens as the task says, or as there is room for.
    """
    form, questions = getattr(task, "PROMPT", "{question}"), []
    depends = hasattr(task, "max_new_tokens")
    most = task.max_new_tokens(examples, model.tokenizer) if depends else task.MAX_NEW_TOKENS
    for example in examples:
        prompt = form.format(question=example.question)
        if example.history:
            turns = (*example.history, ("user", prompt))
            prompt = [{"role": role, "content": text} for role, text in turns]
        room = model.room(example.images, prompt, scale)
        if room >= min(len(model.tokenizer.encode(truth)) for truth in example.answers):
            questions.append(Question(example, prompt, min(most, max(1, room))))
    return questions


def evaluate_task(model, task, questions, scale, title="") -> dict:
    """Metrics of one task at one scale, and the number of questions of each kind as `n_KIND`; see `evaluate`."""
    pairs = {}
    with tqdm(total=len(questions), desc=title, unit=" questions", disable=None, leave=False) as progress:
        for kind in sorted({question.example.kind for question in questions}):
            asked = [question for question in questions if question.example.kind == kind]
            answers = answer(model, asked, scale)
            pairs[kind] = [(question.example, text) for question, text in zip(asked, answers, strict=True)]
            progress.update(len(asked))
    if hasattr(task, "score_all"):
        metrics = task.score_all([pair for of_kind in pairs.values() for pair in of_kind])
        found = {metric: float(value) for metric, value in metrics.items()}
        return found | {f"n_{kind}": len(of_kind) for kind, of_kind in pairs.items()}
    found = {}
    for kind, of_kind in pairs.items():
        scores = [task.score(example, text) for example, text in of_kind]
        found |= {kind: float(sum(scores) / len(scores)), f"n_{kind}": len(scores)}
    return found


def answer(model, questions, scale) -> list[str]:
    """What a model answers to each `Question` at one scale."""
    return model.generate(
        images=[question.example.images for question in questions],
        prompt=[question.prompt for question in questions],
        scale=scale,
        max_new_tokens=[question.max_new_tokens for question in questions],
    )


def save_results(results, path):
    """Writes what `evaluate` returned as JSON, into a folder that is made if it is not there."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def metric_names(values) -> list[str]:
    """The metrics among the values of a task at a scale; the others are numbers of questions."""
    return [name for name in values if "/" in name or not name.startswith("n_")]


def table(results) -> str:
    """What `evaluate` returned as a table: a row per scale, a column per metric.

    Metrics that are called "KIND/METRIC" stand below, a row per scale and kind, with the number of questions.
    """
    lines = []
    for task, by_scale in results.items():
        names = metric_names(next(iter(by_scale.values())))
        metrics = [name for name in names if "/" not in name]
        lines.append("  ".join([f"{task:>8} tokens", *(f"{m:>8}" for m in metrics)]))
        for scale, values in by_scale.items():
            lines.append("  ".join([f"{scale:>15}", *(_cell(values, m, len(m)) for m in metrics)]))
        kinds = list(dict.fromkeys(name.rpartition("/")[0] for name in names if "/" in name))
        if kinds:
            lines += ["", *_table_of_kinds(by_scale, kinds, metrics)]
    return "\n".join(lines)


def _table_of_kinds(by_scale, kinds, metrics):
    width = max(4, *map(len, kinds))
    yield "  ".join([f"{'tokens':>15}", f"{'kind':<{width}}", "questions", *(f"{m:>8}" for m in metrics)])
    for scale, values in by_scale.items():
        for kind in kinds:
            cells = [_cell(values, f"{kind}/{metric}", len(metric)) for metric in metrics]
            yield "  ".join([f"{scale:>15}", f"{kind:<{width}}", f"{values[f'n_{kind}']:>9,}", *cells])


def _cell(values, name, width):
    """A metric right-aligned under its name; a dash where there is none."""
    return f"{values[name]:{max(8, width)}.3f}" if name in values else f"{'–':>{max(8, width)}}"
