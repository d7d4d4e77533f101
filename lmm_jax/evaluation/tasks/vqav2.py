"""VQA v2: open questions about COCO's photographs, each answered by ten people.

Files, as https://visualqa.org/download.html publishes them, all in one folder:

    v2_OpenEnded_mscoco_val2014_questions.json          214,354 questions           split "val"
    v2_mscoco_val2014_annotations.json                  their 2,143,540 answers
    val2014/COCO_val2014_*.jpg                          40,504 pictures: val2014.zip, 6.6 GB
    v2_OpenEnded_mscoco_test-dev2015_questions.json     107,394 questions           split "test-dev"
    v2_OpenEnded_mscoco_test2015_questions.json         447,793 questions           split "test"
    test2015/COCO_test2015_*.jpg                        81,434 pictures: test2015.zip, 13 GB

SHA-256 of the archives (as TFDS has it):

    val2014.zip     fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
    test2015.zip    1a2aa896b81140a850a78fa8bff07d455698d2abf364ff05721763458a8101ca

Licence: CC BY 4.0 (visualqa.org/terms.html); the pictures are under Flickr's terms. The score of "val" is soft
accuracy over ten people; kinds are "yes-no", "number" and "other". The answers of the test splits are secret. The
submission spells answers as they are compared, since the server does so only where people disagree. It holds the
questions that were asked: where the server wants all of test2015 (LLaVA fills in empty answers for those that are not
in test-dev), ask split "test".
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import vqa_text
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = (
    "a folder with v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/, or "
    "v2_OpenEnded_mscoco_test-dev2015_questions.json and test2015/"
)
SPLIT = "val"
METRIC = "VQA soft accuracy, as lmms-eval 0.7.3 computes it (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 16

# Of a split: what its files are called after, its pictures, and its questions (visualqa.org/download.html).
SPLITS = {
    "val": ("val2014", "val2014", 214_354),
    "test-dev": ("test-dev2015", "test2015", 107_394),
    "test": ("test2015", "test2015", 447_793),
}


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question."""
    name, images, _ = choose("split of VQA v2", split, SPLITS)
    path = published.find(folder, (f"v2_OpenEnded_mscoco_{name}_questions.json",))
    answered = _answers(published.find(folder, (f"v2_mscoco_{name}_annotations.json",))) if split == "val" else None
    pictures = str(published.first_of(folder, (images, f"images/{images}", f"coco/{images}")))
    for where, item in published.entries(published.read_json(path, dict), "questions", path):
        number = published.field(item, "question_id", int, where)
        image = published.field(item, "image_id", int, where)
        if answered is not None and number not in answered:
            raise ValueError(f"{where}: question {number} has no answers in v2_mscoco_{name}_annotations.json")
        truths, kind = answered[number] if answered is not None else ((), "all")
        file = f"COCO_{images}_{image:012d}.jpg"
        asked = published.question(item, "question", where)
        yield Example((f"{pictures}/{file}",), asked, truths, kind, id=number, group=file)


def _answers(path):
    """{question: (answers of people, kind)}."""
    found = {}
    for where, item in published.entries(published.read_json(path, dict), "annotations", path):
        number = published.field(item, "question_id", int, where)
        kind = published.field(item, "answer_type", str, where).replace("/", "-")
        people = published.entries(item, "answers", where)
        truths = tuple(published.field(person, "answer", str, whose) for whose, person in people)
        if not truths:
            raise ValueError(f"{where}, field 'answers': the list is empty")
        found[number] = truths, kind
    return found


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, (SPLITS[split][2],) if split in SPLITS else ())


def score(example, answer) -> float:
    """Soft accuracy of one answer."""
    return vqa_text.vqav2_accuracy(answer, example.answers)


def score_all(pairs) -> dict:
    """Mean soft accuracy, and that of each kind of question; {} of a test split."""
    return scored("accuracy", score, pairs)


def submission(pairs) -> tuple[str, bytes]:
    """The file for EvalAI's server."""
    return published.answers_by_id("vqav2_submission.json", vqa_text.vqav2_form, pairs)
