"""Evaluation: every task at every token budget."""

import json

from etils import epath
from tqdm import tqdm

from lmm_jax.config import choose
from lmm_jax.evaluation.tasks import digits, pages
from lmm_jax.generation.model import load

# A task has `examples(folder, limit)`, an iterable of `tasks.Example`, and `score(example, answer)` in 0..1,
# and `MAX_NEW_TOKENS`.
TASKS = {"digits": digits, "pages": pages}


def evaluate(workdir, tasks=("digits",), scales=None, data=None, limit=None):
    """Answers every example of every task at every scale.

    Args:
      workdir: a workdir of `lmm train`, or a model that `lmm.load` returned.
      tasks: names in `TASKS`.
      scales: visual tokens a picture; all trained ones if None.
      data: prepared folder of the tasks; the one the model was trained on if None.
      limit: examples of a kind; all if None.

    Returns:
      `{task: {str(scale): {metric: value}}}`: the mean score of each kind of question, and n_KIND.
    """
    model = load(workdir) if isinstance(workdir, str | epath.PathLike) else workdir
    folder = data or model.program.config.data.path
    results = {}
    for name in tasks:
        task = choose("task", name, TASKS)
        examples = list(task.examples(folder, limit))
        results[name] = {
            str(scale): evaluate_task(model, task, examples, scale, f"{name} at {scale} tokens")
            for scale in scales or model.scales
        }
    return results


def evaluate_task(model, task, examples, scale, title=""):
    """Mean score by kind of question at one scale, and the number of questions as `n_KIND`."""
    found = {}
    kinds = sorted({example.kind for example in examples})
    with tqdm(total=len(examples), desc=title, unit=" questions", disable=None, leave=False) as progress:
        for kind in kinds:
            chosen = [e for e in examples if e.kind == kind]
            answers = model.generate(
                images=[e.images for e in chosen],
                prompt=[e.question for e in chosen],
                scale=scale,
                max_new_tokens=task.MAX_NEW_TOKENS,
            )
            scores = [task.score(e, answer) for e, answer in zip(chosen, answers, strict=True)]
            found |= {kind: sum(scores) / len(scores), f"n_{kind}": len(scores)}
            progress.update(len(chosen))
    return found


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
