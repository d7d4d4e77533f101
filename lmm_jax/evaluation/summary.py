"""The summary of an evaluation for whoever reads it: what was asked how, scores with intervals, what was left out."""

import numpy as np

from lmm_jax import storage
from lmm_jax.evaluation.auto import is_fitted_on
from lmm_jax.evaluation.run import header
from lmm_jax.evaluation.statistics import mean_interval
from lmm_jax.evaluation.tables import table
from lmm_jax.generation.model import AUTO


def write_summary(model, found, path):
    """Writes the summary of an `Evaluation` by a `Model` as Markdown, see `text`."""
    storage.write_text(path, text(model, found))


def text(model, found) -> str:
    """The summary of an `Evaluation`, in Markdown."""
    lines = ["# Evaluation", ""]
    for name in found.results:
        lines += [f"## {name}", "", *_about(model, found, name), ""]
        lines += ["```", table({name: found.results[name]}), "```", "", *_intervals(found.runs[name])]
    lines += [f"For the server or the judge: `{path}`" for path in found.submissions]
    return "\n".join(lines).rstrip() + "\n"


def _about(model, found, name):
    """What was asked, and how: a list of what the header of a result file holds."""
    asked = found.asked[name]
    told = header(model, name, asked, max(model.scales), None)
    answered = len(next(iter(found.runs[name].values())))
    yield f"- {answered:,} of {asked.examples:,} questions of the split `{asked.split}` in `{asked.folder}`"
    if asked.left_out:
        yield f"- {asked.left_out:,} do not fit into the model's {model.length:,} positions and were left out"
    unreadable = found.results[name][next(iter(found.results[name]))].get("n_unreadable", 0)
    if unreadable:
        yield f"- **{unreadable:,} were left out, as their pictures cannot be read**: no scores of the whole set"
        yield from (f"  - {why}" for _, why in asked.unreadable[:20])
    yield from (f"- **{remark}**" for remark in asked.remarks)
    yield f"- scored by: {told['metric']}"
    yield f"- asked as: `{told['prompt']}`, in the template `{told['template']}`"
    yield f"- decoded greedily, at most {told['decoding']['max_new_tokens']} tokens"
    yield f"- pictures: {', '.join(f'{key} {value}' for key, value in told['preprocessing'].items())}"
    yield f"- model {told['model'][:16]}, lmm_jax {told['version']}, {told['date']}"
    if AUTO in found.runs[name]:
        auto = model.auto
        yield f"- auto: {auto.use}, fitted on {auto.about.get('questions')} questions of {auto.about.get('split')}"
        if is_fitted_on(auto, name, asked):
            yield "- **auto was fitted on questions of this split**: what it reaches here says nothing about others"


def _intervals(runs):
    """Mean scores with their intervals, where answers have scores of their own."""
    if any(record.score is None for records in runs.values() for record in records):
        return []
    lines = ["| scale | visual tokens | mean score | 95 % interval | seconds a question |", "|---|---|---|---|---|"]
    for scale, records in runs.items():
        pictures = np.array([record.picture for record in records])
        mean, low, high = mean_interval(np.array([record.score for record in records]), pictures)
        tokens = np.mean([record.visual_tokens for record in records])
        seconds = np.mean([record.seconds for record in records])
        lines.append(f"| {scale} | {tokens:,.2f} | {mean:.4f} | {low:.4f}–{high:.4f} | {seconds:.4f} |")
    return [*lines, ""]
