"""Evaluation: every task at every token budget. Tasks stand in `lmm_jax.evaluation.tasks`."""

import collections.abc
import contextlib
import dataclasses
import json
import sys

import jax
from etils import epath

from lmm_jax import lock, storage
from lmm_jax.config import ConfigError
from lmm_jax.evaluation import records
from lmm_jax.evaluation.questions import Asked, Question, ask, find_tasks, load_examples, prepare
from lmm_jax.evaluation.records import Record, Results
from lmm_jax.evaluation.run import answer_all, header
from lmm_jax.evaluation.tables import metric_names, table
from lmm_jax.evaluation.tasks import TASKS
from lmm_jax.generation.model import AUTO, load
from lmm_jax.pods import hosts

__all__ = [
    "TASKS",
    "Evaluation",
    "Question",
    "answer",
    "ask",
    "evaluate",
    "evaluate_tasks",
    "find_tasks",
    "load_examples",
    "metric_names",
    "save_results",
    "table",
]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model answered to the questions of some tasks, and what that is worth.

    Attributes:
      results: `{task: {str(scale): {metric: value}}}`, see `evaluate`.
      asked: `{task: Asked}`.
      runs: `{task: {str(scale): Records}}`, for all scales of the same questions in the same order.
      submissions: paths of the files for a server or a judge.
    """

    results: dict[str, dict[str, dict[str, float]]]
    asked: dict[str, Asked]
    runs: dict[str, dict[str, list[Record]]]
    submissions: list[str]

    def questions(self, task) -> list[Question]:
        """Those of a task that every run answered, in the order of `runs`."""
        by_number = {question.number: question for question in self.asked[task].questions}
        return [by_number[record.number] for record in next(iter(self.runs[task].values()))]


def evaluate(workdir, tasks=None, scales=None, data=None, limit=None, split=None, *, out=None, skip_bad=False):
    """Answers every example of every task at every scale.

    Args:
      workdir: a workdir of `lmm train`, or a model that `lmm.load` returned.
      tasks: names in `tasks.TASKS`; if None, see `find_tasks`.
      scales: visual tokens a picture, or "auto" for a model that chooses; one or several, all trained ones if None.
      data: folder of the tasks, or a dict {task: folder}. A task that it does not name reads the folder that the
        model was trained on.
      limit: examples of a kind; all if None.
      split: of the folders; each task's own `SPLIT` if None.
      out: folder that every answer is written to, see `evaluation.records`: what it holds is not asked again, so that
        the same call continues what was interrupted. None keeps the answers in memory. Several hosts need one that
        they share.
      skip_bad: leave out questions whose pictures are missing or damaged, which are named, instead of refusing them.

    Returns:
      `{task: {str(scale): {metric: value}}}`. The metrics are the mean score of each kind of question, or what the
      task's `score_all` gives; `n_KIND` are the questions of each kind, and `tokens` the mean visual tokens of a
      question where the model chose. `n_left_out`, if there are any, are questions that do not fit at the largest
      scale; they are asked at none. `n_unreadable` are those that `skip_bad` left out.

    Raises:
      ConfigError: a task that does not exist, or whose folder is not known, or has no examples that can be asked, or
        none of which could be answered.
      FileNotFoundError, ValueError: what a task says of a folder that it cannot read, or a scale that is none.
    """
    return evaluate_tasks(workdir, tasks, scales, data, limit, split, out=out, skip_bad=skip_bad).results


def evaluate_tasks(
    workdir, tasks=None, scales=None, data=None, limit=None, split=None, *, out=None, skip_bad=False, scored=False
) -> Evaluation:
    """As `evaluate`, and gives the single answers, too.

    Args:
      workdir, tasks, scales, data, limit, split, out, skip_bad: see `evaluate`.
      scored: whether each answer has to have a score of its own; a task that gives none is then refused with a
        ConfigError before anything is asked.
    """
    model = load(workdir) if isinstance(workdir, str | epath.PathLike) else workdir
    tasks = find_tasks(model, data) if tasks is None else (tasks,) if isinstance(tasks, str) else tasks
    tasks = tuple(dict.fromkeys(tasks))
    if isinstance(data, collections.abc.Mapping) and not data.keys() <= set(tasks):
        unknown = ", ".join(sorted(data.keys() - set(tasks)))
        raise ConfigError(f"--data names a folder for {unknown}; the tasks are {', '.join(tasks)}")
    if out is None and jax.process_count() > 1:
        raise ConfigError("several hosts share out what is asked by a folder that all of them see: name it by out")
    scales = (scales,) if isinstance(scales, str | int) else scales or model.scales
    scales = list(dict.fromkeys(model.check_budget(scale) for scale in scales))
    most = max(max(model.auto.scales) if scale == AUTO else scale for scale in scales)
    # All of them before the first answer, so that a folder that is missing does not end a run of hours.
    asked = {name: prepare(model, name, data, split, limit, most, skip_bad) for name in tasks}
    for name in tasks if scored else ():
        check_scored(name, asked[name])
    found = Evaluation({}, asked, {}, [])
    with _hold(out):
        for name in tasks:
            results, bad = {}, set()
            for scale in scales:
                results[str(scale)] = _open(model, name, asked[name], scale, limit, out)
                title = f"{name} at {scale}{'' if scale == AUTO else ' tokens'}"
                bad |= answer_all(model, asked[name], scale, results[str(scale)], title, skip_bad)
            _score(found, name, results, bad, out)
    return found


def _hold(out):
    """Keeps other evaluations from writing to the same folder."""
    if out is None or jax.process_index() > 0:
        return contextlib.nullcontext()
    folder = epath.Path(out) / records.FOLDER
    return lock.hold(folder, "lmm evaluate", note=lambda line: print(line, file=sys.stderr))


def _open(model, name, asked, scale, limit, out):
    """The `Results` of a task at a scale; those of another run, which are in the way, are moved aside.

    Raises:
      ValueError: the hosts ask unlike models or questions, so that one would take the other's results for foreign.
    """
    if out is None:
        return Results(None, str(scale), {})
    folder, told = records.folder(out, name), header(model, name, asked, scale, limit)
    hosts.check_same(**{key: value for key, value in told.items() if key not in records.FREE})
    if jax.process_index() == 0:
        moved, back = records.make_room(folder, str(scale), told)
        said = [f"answers of another model or to other questions lie in {path} now" for path in moved]
        said += [f"the answers that lay in {path} are taken up again" for path in back]
        for line in said:
            print(f"{name} at {scale}: {line}", file=sys.stderr)
    hosts.everywhere(True)  # none reads while the first still moves files
    return Results(folder, str(scale), told, jax.process_index())


def check_scored(name, asked):
    """Raises ConfigError if answers to an `Asked` of the task `name` have no scores of their own, or no pictures."""
    unknown = sum(not question.example.answers for question in asked.questions)
    if unknown or not hasattr(asked.task, "score"):
        why = f"the truth of {unknown:,} questions is not in its files" if unknown else "it scores all at once"
        raise ConfigError(
            f"task '{name}', split '{asked.split}', has no score of each answer, which tells what a question needs: "
            f"{why}; name another --split, or another of --tasks"
        )
    if not any(question.example.images for question in asked.questions):
        raise ConfigError(
            f"task '{name}' asks about no picture, so that there is no number of visual tokens to choose"
        )


def _score(found, name, results, bad, out):
    """Puts metrics and records of a task into an `Evaluation`."""
    asked = found.asked[name]
    answered = set.intersection(*(set(one.done) for one in results.values()))
    questions = [question for question in asked.questions if question.number in answered]
    if not questions:
        raise ConfigError(f"task '{name}': none of {asked.examples:,} questions could be answered at all scales")
    found.runs[name] = {scale: [one.done[q.number] for q in questions] for scale, one in results.items()}
    about = {"n_left_out": asked.left_out} if asked.left_out else {}
    unreadable = len(asked.unreadable) + len(bad)
    about |= {"n_unreadable": unreadable} if unreadable else {}
    found.results[name] = {}
    for scale, of_scale in found.runs[name].items():
        tokens = {}
        if scale == AUTO:
            tokens = {"tokens": sum(record.visual_tokens for record in of_scale) / len(of_scale)}
        pairs = [(question.example, record.answer) for question, record in zip(questions, of_scale, strict=True)]
        found.results[name][scale] = score(asked.task, pairs) | tokens | about
        if out is not None and hasattr(asked.task, "submission") and jax.process_index() == 0:
            file, content = asked.task.submission(pairs)
            path = records.folder(out, name) / f"{scale}-{file}"
            path.write_bytes(content)
            found.submissions.append(str(path))


def score(task, pairs) -> dict:
    """Metrics of a task, and the number of questions of each kind as `n_KIND`; see `evaluate`.

    Args:
      task: module of `tasks.TASKS`.
      pairs: `(example, answer)`. Examples whose true answer only a server knows are counted and not scored.
    """
    kinds = {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in sorted({e.kind for e, _ in pairs})}
    counts = {f"n_{kind}": len(of_kind) for kind, of_kind in kinds.items()}
    if any(not example.answers for example, _ in pairs):
        return counts
    if hasattr(task, "score_all"):
        in_order = [pair for of_kind in kinds.values() for pair in of_kind]
        return {metric: float(value) for metric, value in task.score_all(in_order).items()} | counts
    found = {}
    for kind, of_kind in kinds.items():
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
    storage.write_text(path, json.dumps(results, indent=1) + "\n")
