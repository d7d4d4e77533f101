"""DocVQA (single pages): questions about scanned documents of industry.

Files, as https://rrc.cvc.uab.es/?ch=17 (Downloads, Task 1) gives them after registration, unpacked into one folder:

    val_v1.0_withQT.json      5,349 questions about 1,286 pages, with their types      split "val"
    val_v1.0.json             the same without types, of the older val.tar.gz          split "val"
    test_v1.0.json            5,188 questions about 1,287 pages; answers are secret    split "test"
    train_v1.0_withQT.json    39,463 questions about 10,194 pages                      split "train"
    documents/*.png           the pages; of spdocvqa_images.zip the folder is called spdocvqa_images/

The question files may also lie in spdocvqa_qas/, or each with its documents/ in a folder of its split, as the
archives have them. Terms of use: those of the registration; the pages are from the UCSF Industry Documents Library.
The score is ANLS. Kinds are the question's types; of several the kind is all of them, joined by "+". Without types
there are no kinds.
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import metrics
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = "a folder with val_v1.0_withQT.json and documents/"
SPLIT = "val"
METRIC = "ANLS with threshold 0.5, as lmms-eval 0.7.3 computes it (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 32

SPLITS = {"val": 5_349, "test": 5_188, "train": 39_463}  # questions; the paper's table 1 (arXiv:2007.00398)


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question."""
    choose("split of DocVQA", split, SPLITS)
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")[split == "test" :]
    rooms = ("", "spdocvqa_qas/", f"{split}/")
    path = published.find(folder, [f"{room}{name}" for room in rooms for name in names])
    places = ("documents", "spdocvqa_images", "spdocvqa_images/documents", f"{split}/documents")
    pictures = published.first_of(folder, places)
    if (pictures / "documents").is_dir():
        pictures = pictures / "documents"
    for where, item in published.entries(published.read_json(path, dict), "data", path):
        name = published.field(item, "image", str, where).rpartition("/")[2]
        yield Example(
            (published.picture(str(pictures), name, where),),
            published.question(item, "question", where),
            () if split == "test" else published.texts(item, "answers", where),
            _kind(item, where),
            id=published.field(item, "questionId", int, where),
            group=name,
        )


def _kind(item, where):
    if "question_types" not in item:
        return "all"
    types = published.texts(item, "question_types", where, least=0)
    return "+".join(sorted({name.replace("/", "-") for name in types})) or "none"


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, (SPLITS[split],) if split in SPLITS else ())


def score(example, answer) -> float:
    """ANLS of one answer."""
    return metrics.anls(answer, example.answers)


def score_all(pairs) -> dict:
    """Mean ANLS, and that of each kind of question."""
    return scored("anls", score, pairs)


def submission(pairs) -> tuple[str, bytes]:
    """The file for the server of the Robust Reading Competition, Task 1."""
    rows = [{"questionId": example.id, "answer": answer} for example, answer in pairs]
    return "docvqa_submission.json", published.as_json(rows)
