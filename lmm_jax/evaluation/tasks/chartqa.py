"""ChartQA: questions about charts, one half written by people, the other by a program.

Files, as https://github.com/vis-nlp/ChartQA has them in "ChartQA Dataset", of which --data may name the whole or the
folder of the split alone:

    test/test_human.json         1,250 questions of people              split "test"
    test/test_augmented.json     1,250 questions of a program
    val/val_human.json, val/val_augmented.json                          split "val"
    train/train_human.json, train/train_augmented.json                  split "train"
    test/png/*.png               the charts; val/ and train/ alike

Licence: GPL-3.0. The score is relaxed accuracy: numbers may be off by 5 %. Kinds are "human" and "augmented". The
question is put as lmms-eval puts it ("… with a single word."). Answers with thousands separators, and a true answer
of zero, are compared as text, as in lmms-eval.
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import metrics
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = "a folder with test_human.json, test_augmented.json and png/, or one that has them in test/"
SPLIT = "test"
METRIC = "relaxed accuracy, 5 %, as lmms-eval 0.7.3 computes it (version 1)"
PROMPT = "{question}\nAnswer the question with a single word."
MAX_NEW_TOKENS = 16

KINDS = ("human", "augmented")
# Questions of a split, all kinds together: what the repository's files hold; nothing is known of "val".
SPLITS = {"test": (2_500,), "val": (), "train": (28_299,)}


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question, those of people first."""
    choose("split of ChartQA", split, SPLITS)
    for kind in KINDS:
        name = f"{split}_{kind}.json"
        path = published.find(folder, (name, f"{split}/{name}", f"ChartQA Dataset/{split}/{name}"))
        charts = str(path.parent / "png")
        for n, item in enumerate(published.read_json(path, list)):
            where = f"{path}: [{n}]"
            if not isinstance(item, dict):
                raise ValueError(f"{where}: expected an object, found {str(item)[:60]}")
            chart = published.field(item, "imgname", str, where)
            yield Example(
                (published.picture(charts, chart, where),),
                published.question(item, "query", where),
                (published.field(item, "label", str, where),),
                kind,
                id=f"{kind}-{n}",
                group=chart,
            )


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, SPLITS.get(split, ()))


def score(example, answer) -> float:
    """Relaxed accuracy of one answer."""
    return metrics.relaxed(answer, example.answers[0])


def score_all(pairs) -> dict:
    """Mean relaxed accuracy, and that of each kind of question."""
    return scored("relaxed", score, pairs)
