"""TextVQA: questions about text in photographs, asked without OCR tokens (task `textvqa_ocr` gives them).

Files, as https://textvqa.org/dataset/ publishes them, all in one folder:

    TextVQA_0.5.1_val.json      5,000 questions about 3,166 pictures, 3 MB      split "val"
    TextVQA_0.5.1_test.json     5,734 questions; answers are secret             split "test"
    TextVQA_0.5.1_train.json    34,602 questions                                split "train"
    train_images/               pictures of train and val: train_val_images.zip, 7.1 GB
    test_images/                pictures of test: test_images.zip
    TextVQA_Rosetta_OCR_v0.2_{val,test,train}.json     OCR tokens, val 10 MB; for `textvqa_ocr` alone

Licence: CC BY 4.0; the photographs are Open Images' (CC BY 2.0). Scores are those of lmms-eval and LLaVA's evaluator,
the mean over ten people of soft accuracy. The question is put as lmms-eval puts it, with its first letter in upper
and the others in lower case. For the server the answers are spelled as they are compared.
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import vqa_text
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = "a folder with TextVQA_0.5.1_val.json and train_images/"
SPLIT = "val"
METRIC = "VQA soft accuracy with EvalAI's normalisation, as lmms-eval 0.7.3 and LLaVA compute it (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 128

# Of a split: questions that are published, and the folders that its pictures may lie in.
SPLITS = {
    "val": (5_000, ("train_images", "train_val_images/train_images")),
    "test": (5_734, ("test_images",)),
    "train": (34_602, ("train_images", "train_val_images/train_images")),
}
# SHA-256 as several who downloaded the file from dl.fbaipublicfiles.com recorded it.
DIGESTS = {"TextVQA_0.5.1_val.json": "4ceb5aadc1a41719d0a3e4dfdf06838bcfee1db569a9a65ee67d31c99893081d"}


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question."""
    _, folders = choose("split of TextVQA", split, SPLITS)
    pictures = str(published.first_of(folder, folders))
    for where, item in _items(folder, split):
        image = published.field(item, "image_id", str, where)
        asked = published.question(item, "question", where).capitalize()
        truths = () if split == "test" else published.texts(item, "answers", where)
        path = published.picture(pictures, f"{image}.jpg", where)
        number = published.field(item, "question_id", int, where)
        yield Example((path,), asked, truths, "all", id=number, group=image)


def _items(folder, split):
    path = questions_file(folder, split)
    return published.entries(published.read_json(path, dict), "data", path)


def questions_file(folder, split):
    """Path of the questions of a split."""
    return published.find(folder, (f"TextVQA_0.5.1_{split}.json",))


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, numbers(split), digests)


def numbers(split) -> tuple[int, ...]:
    """How many questions a split has, as far as that is known."""
    return (SPLITS[split][0],) if split in SPLITS else ()


def digests(folder, split) -> dict:
    """SHA-256 of the published files of a split, as far as they are known."""
    path = questions_file(folder, split)
    return {path: DIGESTS[path.name]} if path.name in DIGESTS else {}


def score(example, answer) -> float:
    """Soft accuracy of one answer."""
    return vqa_text.textvqa_accuracy(answer, example.answers)


def score_all(pairs) -> dict:
    """Mean soft accuracy."""
    return scored("accuracy", score, pairs)


def submission(pairs) -> tuple[str, bytes]:
    """The file for EvalAI's server."""
    return published.answers_by_id("textvqa_submission.json", vqa_text.textvqa_form, pairs)
