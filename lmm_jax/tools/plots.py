"""Pictures of a run; matplotlib is the `plots` extra."""

import json
import textwrap

import numpy as np
from etils import epath

from lmm_jax import evaluation
from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.data.images import open_picture
from lmm_jax.evaluation.tasks import TASKS
from lmm_jax.generation.model import AUTO
from lmm_jax.training.metrics import read_metrics

QUESTIONS = 6  # about a picture that `draw_answers` has room for


def _axes(rows=1, columns=1, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", **kwargs)


def _save(figure, workdir, name, dpi=150):
    import matplotlib.pyplot as plt

    path = epath.Path(workdir) / name
    with path.open("wb") as f:
        figure.savefig(f, format="png", dpi=dpi)
    plt.close(figure)
    return str(path)


def draw_loss(workdir) -> str:
    """Training and validation loss against steps, one colour a scale; returns the path of `loss.png`."""
    rows = read_metrics(workdir)
    figure, ax = _axes(figsize=(7, 4))
    names = sorted({n for r in rows for n in r if n.startswith("loss/")}, key=lambda n: int(n.split("/")[1]))
    for name in names:
        train = [(r["step"], r[name]) for r in rows if name in r]
        (line,) = ax.plot(*zip(*train, strict=True), label=f"{name.split('/')[1]} tokens", lw=1)
        held_out = [(r["step"], r[f"validation_{name}"]) for r in rows if f"validation_{name}" in r]
        if held_out:
            ax.plot(*zip(*held_out, strict=True), "o", color=line.get_color(), ms=4)
    ax.set(xlabel="step", ylabel="loss (dots: validation)", ylim=(0, None))
    ax.legend()
    return _save(figure, workdir, "loss.png")


def draw_accuracy(results, workdir) -> str:
    """Accuracy against visual tokens, one line a kind of question; returns the path."""
    figure, axes = _axes(1, len(results), figsize=(6 * len(results), 4), squeeze=False)
    for ax, (task, by_scale) in zip(axes[0], results.items(), strict=True):
        scales, top = sorted((scale for scale in by_scale if scale.isdigit()), key=int), 1.0
        chosen = [values for scale, values in by_scale.items() if not scale.isdigit()]  # by the model
        # The scores of each kind beside those of all would be too many lines.
        of_any = next(iter(by_scale.values()))
        for kind in [m for m in evaluation.metric_names(of_any) if "/" not in m and m != "tokens"]:
            values = [by_scale[s][kind] for s in scales]
            (line,) = ax.plot([int(s) for s in scales], values, "o-", label=kind)
            stars = [(of["tokens"], of[kind]) for of in chosen if of["tokens"] > 0]
            ax.plot(*zip(*stars, strict=True), "*", color=line.get_color(), ms=11) if stars else None
            top = max([top, *values, *(y for _, y in stars)])  # a metric of `score_all` may be above 1
        told = "visual tokens (stars: chosen by the model, mean)" if chosen else "visual tokens"
        ax.set(title=task, xlabel=told, ylabel="accuracy", xscale="log", ylim=(0, 1.02 * top))
        ax.set_xticks([int(s) for s in scales], scales)
        ax.grid(alpha=0.3)
        ax.legend()
    return _save(figure, workdir, "accuracy_vs_tokens.png")


def draw_answers(model, data, workdir, task="digits", count=5, split=None, scales=None, limit=None) -> str:
    """Unseen pictures with questions about them, the answer at each budget, and the truth; returns the path.

    Args:
      model: that `lmm.load` returned.
      data, split: see `evaluation.evaluate`.
      workdir: folder of `answers.png`.
      task: name in `evaluation.tasks.TASKS`.
      count: pictures, with `QUESTIONS` questions each; those that `evaluation.ask` leaves out are not drawn.
      scales: visual tokens of a picture; all trained ones if None.
      limit: questions of a kind that were evaluated, of which these are some; all if None.
    """
    scales = [scale for scale in scales or () if scale != AUTO] or model.scales
    enough = 2 * count * QUESTIONS
    examples = evaluation.load_examples(model, task, data, split, min(limit or enough, enough))
    of_pictures = {}  # the questions about the same pictures
    for question in evaluation.ask(model, TASKS[task], examples, max(scales), skip_bad=True)[0]:
        of_pictures.setdefault(tuple(map(id, question.example.images)), []).append(question)
    shown = [questions[:QUESTIONS] for questions in of_pictures.values()][:count]
    asked = [question for questions in shown for question in questions]
    answers = zip(*(evaluation.answer(model, asked, scale) for scale in scales), strict=True)
    figure, axes = _axes(1, max(1, len(shown)), figsize=(3.2 * max(1, len(shown)), 5.4), squeeze=False)
    for ax, questions in zip(axes[0], shown, strict=False):
        for picture in questions[0].example.images[:1]:
            ax.imshow(np.asarray(open_picture(picture)), interpolation="nearest")
        ax.set_axis_off()
        lines = []
        for question, said in zip(questions, answers, strict=False):
            truths = question.example.answers
            lines.append(_short(question.example.question.replace(IMAGE_TAG, "")))
            lines.append(f"   truth      {_short(' or '.join(truths))}")
            for scale, text in zip(scales, said, strict=True):
                lines.append(f" {'+' if text.strip() in truths else '-'} {scale:>3} tokens {_short(text)}")
        ax.text(0, -0.04, "\n".join(lines), transform=ax.transAxes, va="top", family="monospace", fontsize=6)
    return _save(figure, workdir, "answers.png")


def _short(text):
    """A text in a line of the picture; matplotlib would read what stands between two dollars as a formula."""
    return textwrap.shorten(text, 30, placeholder=" …").replace("$", r"\$")


def draw_effects(results, folder, beside=None) -> str:
    """Accuracy against visual tokens in the sequence, a panel an effect; returns the path of `effects.png`.

    A small dot is one seed, a little right of the mean; where the values of seeds are not known, only their range is
    drawn. The mean is a large dot, and a hollow one where the seeds disagree.

    Args:
      results: `tools.effects.Result`s.
      folder: that exists.
      beside: `{effect: (effect, label)}` of what stands in the panel of another effect too, to compare with.
    """
    effects, beside = list(dict.fromkeys(r.effect for r in results)), beside or {}
    columns = min(3, len(effects))
    rows = -(-len(effects) // columns)
    figure, axes = _axes(rows, columns, figsize=(4.6 * columns, 3.8 * rows), squeeze=False, sharey=True)
    for ax in axes.flat[len(effects) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("share that is right")
    for ax, effect in zip(axes.flat, effects, strict=False):
        mine = [r for r in results if r.effect == effect]
        compared = [r for r in results if (r.effect, r.label) == beside.get(effect)]
        for of, label in dict.fromkeys((r.effect, r.label) for r in compared + mine):
            points = [r for r in compared + mine if (r.effect, r.label) == (of, label)]
            _draw_row(ax, points, label if of == effect else f"{of}: {label}", of != effect)
        ax.set(title=effect, xlabel="visual tokens in the sequence", xscale="log")
        ax.margins(x=0.15)
        ticks = sorted({r.tokens for r in compared + mine if r.tokens == round(r.tokens)})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, framealpha=0.6)
    figure.supxlabel("small dots: seeds; bars: lowest to highest; hollow: the seeds disagree", fontsize=8)
    return _save(figure, folder, "effects.png", dpi=80)


def _draw_row(ax, points, label, compared):
    """One line of `draw_effects`, of `tools.effects.Result`s: means, ranges, seeds; grey and dashed if `compared`."""
    x, y = [r.tokens for r in points], np.array([r.mean for r in points])
    ranges = np.maximum([y - [r.low for r in points], [r.high for r in points] - y], 0)  # the mean is rounded
    style = {"color": "grey", "ls": "--"} if compared else {"ls": "-"}
    line, *_ = ax.errorbar(x, y, ranges, capsize=3, label=label, lw=1, **style)
    colour = line.get_color()
    for r in points:
        ax.plot(r.tokens, r.mean, "o", color=colour, mfc="white" if r.disagree else colour, ms=7, zorder=3)
        ax.plot([r.tokens * 1.09] * len(r.values), r.values, "o", color=colour, ms=3, alpha=0.7)


def draw_growth(folder) -> str:
    """Step time against visual tokens and pixels, as `bench.growth` left it in `growth.json`; with lines."""
    points = json.loads((epath.Path(folder) / "growth.json").read_text())
    figure, axes = _axes(1, 2, figsize=(10, 4))
    for series in dict.fromkeys(p["series"] for p in points):
        x, y = np.array([(p["x"], p["seconds"]) for p in points if p["series"] == series]).T
        encoder, _, unit = series.rpartition(", ")
        ax = axes[int(unit == "pixels")]
        (dots,) = ax.plot(x, y, "o", label=encoder or "measured")
        line = np.polynomial.Polynomial.fit(x, y, 1)
        ax.plot(x, line(x), "--", color=dots.get_color(), lw=1)
        ax.set(xlabel=f"{unit} of a picture", ylabel="seconds of a training step", xlim=(0, None), ylim=(0, None))
        ax.legend()
        ax.grid(alpha=0.3)
    return _save(figure, folder, "growth.png")
