"""AI2D: questions with four choices about diagrams of schoolbooks.

Files: ai2d-all.zip (991 MB, http://ai2-website.s3.amazonaws.com/data/ai2d-all.zip), and beside its folders the list
https://s3-us-east-2.amazonaws.com/prior-datasets/ai2d_test_ids.csv of the pictures that are the test set:

    questions/*.json      an object of questions for each picture
    images/*.png          the diagrams
    annotations/*.json    where texts stand in a diagram
    ai2d_test_ids.csv     numbers of the test pictures, one a line

SHA-256 of the archive (as TFDS has it): 1a6b77eebb8b7dbdf76a0ba6ca76c2f97ce8f81d8ee33b06593aa722e54c4786

Splits: "test" (3,088 questions), "train" (the others). Licence: for research that is not commercial (license.txt of
the archive). The score is lmms-eval's: the letter before a full stop, or the whole answer, is the true letter but for
case and punctuation.

Some questions ask for a letter that stands in the diagram. The archive's diagrams have texts there, and the
annotations say which letter replaces which. So these questions, of kind "letters", are asked about a diagram with
letters drawn over all texts; the others, of kind "text", about the diagram as it is. Known gap: every evaluation
draws letters in a font of its own, so that numbers of this kind are not comparable to the last digit. Where there
is a folder abc_images/, as InternVL's and others' copies of AI2D have it, its drawings are taken instead.
"""

import dataclasses
import io
import re

from PIL import ImageDraw, ImageFont

from lmm_jax.config import choose
from lmm_jax.data.images import open_picture
from lmm_jax.evaluation import metrics
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import scored

FILES = "a folder with questions/, images/, annotations/ and ai2d_test_ids.csv"
SPLIT = "test"
METRIC = "the right letter, as lmms-eval 0.7.3 reads it (version 1)"
PROMPT = "{question}\nAnswer with the option's letter from the given choices directly."
MAX_NEW_TOKENS = 16

SPLITS = {"test": (3_088,), "train": ()}  # questions, as lmms-lab/ai2d counts them
LETTERS, TEXT = "letters", "text"
_LETTER = re.compile(r"\s*([A-Z])\.")


def examples(folder, split, limit=None):
    """The questions; see the module. Raises ValueError, FileNotFoundError: naming file, question and field."""
    drawn = {}  # PNG by picture, shared by its questions
    for example in published.limited(read(folder, split), limit):
        (path,) = example.images
        bare = path.endswith(f"/images/{example.group}")
        if example.kind == LETTERS and bare and not published.missing_pictures([example]):
            if path not in drawn:
                annotation = published.find(_root(folder), (f"annotations/{example.group}.json",))
                drawn[path] = _draw_letters(path, annotation)
            example = dataclasses.replace(example, images=(drawn[path],))
        yield example


def read(folder, split):
    """Yields an `Example` a question, whose picture is the path of the diagram as it lies there."""
    choose("split of AI2D", split, SPLITS)
    root = _root(folder)
    listed = published.find(folder, ("ai2d_test_ids.csv", "ai2d/ai2d_test_ids.csv"))
    tests = {line.strip() for line in published.read_text(listed).splitlines()} - {""}
    files = [path for path in (root / "questions").iterdir() if path.name.endswith(".json")]
    for path in sorted(files, key=lambda path: (len(path.name), path.name)):
        if path.name.startswith(".") or (path.name.partition(".")[0] in tests) != (split == "test"):
            continue
        whole = published.read_json(path, dict)
        image = published.field(whole, "imageName", str, path)
        asked = published.field(whole, "questions", dict, path)
        for text in asked:
            yield _question(text, published.field(asked, text, dict, path), f"{path}: {text[:60]!r}", root, image)


def _root(folder):
    return published.find(folder, ("questions", "ai2d/questions")).parent


def _question(text, item, where, root, image):
    published.question({"question": text}, "question", where)
    choices = published.texts(item, "answerTexts", where)
    right = published.field(item, "correctAnswer", int, where)
    if not 0 <= right < len(choices) <= 26:
        raise ValueError(f"{where}, field 'correctAnswer': {right} is none of {len(choices)} answers, 0 the first")
    letters = [chr(ord("A") + n) for n in range(len(choices))]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    kind = LETTERS if item.get("abcLabel") is True else TEXT
    drawn = kind == LETTERS and (root / "abc_images").is_dir()
    return Example(
        (published.picture(str(root / ("abc_images" if drawn else "images")), image, where),),
        f"{text}\n{listed}",
        (letters[right],),
        kind,
        id=published.field(item, "questionId", str, where),
        group=image,
    )


def _draw_letters(path, annotation) -> bytes:
    """PNG of a diagram with white boxes over its texts, in each the letter that stands for it."""
    picture = open_picture(path).copy()
    draw = ImageDraw.Draw(picture)
    whole = published.read_json(annotation, dict)
    texts = published.field(whole, "text", dict, annotation)
    for name in texts:
        where = f"{annotation}: text {name[:60]!r}"
        item = published.field(texts, name, dict, f"{annotation}, field 'text'")
        if not item.get("replacementText"):
            continue  # a text that no letter stands for
        letter = published.field(item, "replacementText", str, where)
        left, top, right, bottom = _box(published.field(item, "rectangle", list, where), picture.size, where)
        draw.rectangle((left, top, right, bottom), fill="white")
        font = ImageFont.load_default(size=max(6, min(bottom - top, 1.5 * (right - left) / len(letter))))
        draw.text(((left + right) / 2, (top + bottom) / 2), letter, fill="black", font=font, anchor="mm")
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _box(corners, size, where):
    """(left, top, right, bottom) of two corners, inside a picture of this size."""
    try:
        (left, right), (top, bottom) = (sorted(map(int, along)) for along in zip(*corners, strict=True))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}, field 'rectangle': expected two corners, found {str(corners)[:60]}") from None
    width, height = size
    return max(0, left), max(0, top), min(width, max(0, right)), min(height, max(0, bottom))


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, SPLITS.get(split, ()))


def score(example, answer) -> float:
    """Whether one answer chooses the right letter."""
    found = _LETTER.match(answer)
    return metrics.same_letters(found[1] if found else answer, example.answers[0])


def score_all(pairs) -> dict:
    """Accuracy, and that of each kind of question."""
    return scored("accuracy", score, pairs)
