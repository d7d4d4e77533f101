"""GQA: compositional questions about photographs, made from scene graphs.

Files, as https://cs.stanford.edu/people/dorarad/gqa/download.html gives them (questions1.2.zip and images.zip):

    testdev_balanced_questions.json    12,578 questions about 398 pictures     split "testdev"
    val_balanced_questions.json        132,062 questions                       split "val"
    images/*.jpg                       the pictures; images.zip is 20 GB, for all splits

The question files may also lie in questions1.2/. Licence: CC BY 4.0; the pictures are those of Visual Genome. The
score is lmms-eval's: the same text but for case and punctuation (white space counts). GQA's own script gives the same
where a model answers in lower case without punctuation. Kinds are the structural types: choose, compare, logical,
query, verify. GQA's consistency, validity and plausibility are not computed.
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import metrics
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = "a folder with testdev_balanced_questions.json and images/"
SPLIT = "testdev"
METRIC = "exact match but for case and punctuation, as lmms-eval 0.7.3 computes it (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 16

SPLITS = {"testdev": 12_578, "val": 132_062}  # questions, as GQA's download page and lmms-lab/GQA count them


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question."""
    choose("split of GQA", split, SPLITS)
    name = f"{split}_balanced_questions.json"
    path = published.find(folder, (name, f"questions1.2/{name}", f"questions/{name}"))
    pictures = str(published.first_of(folder, ("images",)))
    whole = published.read_json(path, dict)
    for number in whole:
        where = f"{path}: question {number}"
        item = published.field(whole, number, dict, path)
        image = published.field(item, "imageId", str, where)
        types = published.field(item, "types", dict, where)
        yield Example(
            (published.picture(pictures, f"{image}.jpg", where),),
            published.question(item, "question", where),
            (published.field(item, "answer", str, where),),
            published.field(types, "structural", str, f"{where}, field 'types'"),
            id=number,
            group=image,
        )


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, (SPLITS[split],) if split in SPLITS else ())


def score(example, answer) -> float:
    """Whether one answer is the true one, but for case and punctuation."""
    return metrics.same_letters(answer, example.answers[0])


def score_all(pairs) -> dict:
    """Accuracy, and that of each kind of question."""
    return scored("accuracy", score, pairs)
