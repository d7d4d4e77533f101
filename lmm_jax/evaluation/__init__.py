"""Evaluation: every task at every token budget. Tasks stand in `lmm_jax.evaluation.tasks`."""

import collections.abc
import json

from etils import epath
from tqdm import tqdm

from lmm_jax.config import ConfigError, choose
from lmm_jax.evaluation.tasks import TASKS
from lmm_jax.generation.model import load


def evaluate(workdir, tasks=("digits",), scales=None, data=None, limit=None, split=None):
    """Answers every example of every task at every scale.

    Args:
      workdir: a workdir of `lmm train`, or a model that `lmm.load` returned.
      tasks: names in `tasks.TASKS`.
      scales: visual tokens a picture; all trained ones if None.
      data: folder of the tasks, or a dict {task: folder}. A task that it does not name reads the folder that the
        model was trained on.
      limit: examples of a kind; all if None.
      split: of the folders; each task's own `SPLIT` if None.

    Returns:
      `{task: {str(scale): {metric: value}}}`. The metrics are the mean score of each kind of question, or what the
      task's `score_all` gives; `n_KIND` are the questions of each kind.

    Raises:
      ConfigError: a task that does not exist, or whose folder is not known, or has no examples.
      FileNotFoundError, ValueError: what a task says of a folder that it cannot read.
    """
    if isinstance(data, collections.abc.Mapping) and not data.keys() <= set(tasks):
        unknown = ", ".join(sorted(data.keys() - set(tasks)))
        raise ConfigError(f"--data names a folder for {unknown}; the tasks are {', '.join(tasks)}")
    model = load(workdir) if isinstance(workdir, str | epath.PathLike) else workdir
    # All of them before the first answer, so that a folder that is missing does not end a run of hours.
    examples = {name: load_examples(model, name, data, split, limit) for name in tasks}
    return {
        name: {
            str(scale): evaluate_task(model, TASKS[name], examples[name], scale, f"{name} at {scale} tokens")
            for scale in scales or model.scales
        }
        for name in tasks
    }


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
    trained_on = list(dict.fromkeys([of_run.path] if of_run.path else [str(path) for path, _ in of_run.mixture]))
    if len(trained_on) == 1:
        return trained_on[0]
    known = f"was trained on several: {', '.join(trained_on)}" if trained_on else "names no folder of data"
    raise ConfigError(
        f"task '{name}' reads {task.FILES}, and the model {known}; name one by --data DIR or --data {name}=DIR"
    )


def evaluate_task(model, task, examples, scale, title="") -> dict:
    """Metrics of one task at one scale, and the number of questions of each kind as `n_KIND`; see `evaluate`."""
    pairs = {}
    with tqdm(total=len(examples), desc=title, unit=" questions", disable=None, leave=False) as progress:
        for kind in sorted({example.kind for example in examples}):
            asked = [example for example in examples if example.kind == kind]
            pairs[kind] = list(zip(asked, answer(model, task, asked, scale), strict=True))
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


def answer(model, task, examples, scale) -> list[str]:
    """What a model answers to each example of a task at one scale."""
    prompt = getattr(task, "PROMPT", "{question}")
    return model.generate(
        images=[example.images for example in examples],
        prompt=[prompt.format(question=example.question) for example in examples],
        scale=scale,
        max_new_tokens=task.MAX_NEW_TOKENS,
    )


def save_results(results, path):
    """Writes what `evaluate` returned as JSON."""
    epath.Path(path).write_text(json.dumps(results, indent=1) + "\n")


def table(results) -> str:
    """What `evaluate` returned as a table: a row per scale, a column per metric."""
    lines = []
    for task, by_scale in results.items():
        metrics = [m for m in next(iter(by_scale.values())) if not m.startswith("n_")]
        lines.append("  ".join([f"{task:>8} tokens", *(f"{m:>8}" for m in metrics)]))
        for scale, values in by_scale.items():
            lines.append("  ".join([f"{scale:>15}", *(f"{values[m]:8.3f}" for m in metrics)]))
    return "\n".join(lines)
