"""Pictures of a run; matplotlib is the `plots` extra."""

import json
import textwrap

import numpy as np
from etils import epath

from lmm_jax import evaluation
from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.data.images import open_picture
from lmm_jax.evaluation.tasks import TASKS
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
        scales = sorted(by_scale, key=int)
        top = 1.0
        # The scores of each kind beside those of all would be too many lines.
        for kind in [m for m in evaluation.metric_names(by_scale[scales[0]]) if "/" not in m]:
            values = [by_scale[s][kind] for s in scales]
            ax.plot([int(s) for s in scales], values, "o-", label=kind)
            top = max(top, *values)  # a metric of `score_all` may be above 1
        ax.set(title=task, xlabel="visual tokens", ylabel="accuracy", xscale="log", ylim=(0, 1.02 * top))
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
    scales = scales or model.scales
    enough = 2 * count * QUESTIONS
    examples = evaluation.load_examples(model, task, data, split, min(limit or enough, enough))
    of_pictures = {}  # the questions about the same pictures
    for question in evaluation.ask(model, TASKS[task], examples, max(scales)):
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


def draw_effects(results, folder) -> str:
    """Accuracy against visual tokens in the sequence, a panel an effect; returns the path of `effects.png`.

    Args:
      results: `tools.effects.Result`s.
      folder: that exists.
    """
    effects = list(dict.fromkeys(r.effect for r in results))
    figure, axes = _axes(1, len(effects), figsize=(4.6 * len(effects), 3.8), squeeze=False, sharey=True)
    axes[0, 0].set_ylabel("share of digits read right")
    for ax, effect in zip(axes[0], effects, strict=True):
        mine = [r for r in results if r.effect == effect]
        for label in dict.fromkeys(r.label for r in mine):
            points = [r for r in mine if r.label == label]
            x, y = [r.context for r in points], np.array([r.mean for r in points])
            below, above = y - [r.low for r in points], [r.high for r in points] - y
            ax.errorbar(x, y, (np.maximum(below, 0), np.maximum(above, 0)), fmt="o-", capsize=3, label=label)
        ax.set(title=effect, xlabel="visual tokens in the sequence", xscale="log")
        ax.margins(x=0.15)
        ticks = sorted({r.context for r in mine})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return _save(figure, folder, "effects.png", dpi=80)


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
