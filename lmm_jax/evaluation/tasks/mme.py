"""MME: two yes-or-no questions about each picture, in ten categories of perception and four of cognition.

Files, as the authors of https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (branch Evaluation) send
them, MME_Benchmark_release_version.zip; --data names the folder that holds the categories, or one of those around it:

    artwork/questions_answers_YN/10002.txt, artwork/images/10002.jpg    artwork, celebrity, landmark, posters, scene
    OCR/0001.txt, OCR/0001.jpg                                          the other nine categories

A text holds two lines, each a question, a tab and Yes or No. Both layouts are read of any category. 2,374 questions
about 1,187 pictures. Terms: for academic research, on application to the authors. Split: "test".

The score of a category is accuracy plus accuracy+ in percent, 0 … 200, where accuracy+ is the share of pictures with
both answers right; "perception" and "cognition" are sums over categories, of at most 2,000 and 800. The score of a
single answer is whether it is right. `--limit` rounds up to whole pictures. Pictures of which one question was left
out do not count; "unpaired" says how many questions that are.
"""

import collections

from lmm_jax.config import choose
from lmm_jax.evaluation import yes_no
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example

FILES = "a folder with MME's categories (existence/, count/, …), each with texts and pictures"
SPLIT = "test"
METRIC = "MME's accuracy plus accuracy+, as lmms-eval 0.7.3 computes it (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 16

SPLITS = {"test": 2_374}  # questions, as MME's paper counts them
CATEGORIES = (*yes_no.PERCEPTION, *yes_no.COGNITION)
_ROOTS = ("", "MME_Benchmark", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark")
_ASKS_FOR_YES_OR_NO = " Please answer yes or no."  # which lmms-eval leaves to PROMPT


def examples(folder, split, limit=None):
    """The questions; see the module. Raises ValueError, FileNotFoundError: naming file and line."""
    return published.limited(read(folder, split), limit if limit is None else limit + limit % 2)


def read(folder, split):
    """Yields two `Example`s a picture, category by category."""
    choose("split of MME", split, SPLITS)
    root = _root(folder)
    for category in CATEGORIES:
        if (root / category).is_dir():
            yield from _of_category(root / category, category)


def _root(folder):
    for name in _ROOTS:
        root = published.first_of(folder, (name,))
        if any((root / category).is_dir() for category in CATEGORIES):
            return root
    raise FileNotFoundError(
        f"{folder} has none of MME's categories, such as {CATEGORIES[0]}/; `--describe` says where they are published"
    )


def _of_category(folder, category):
    texts, pictures = folder, folder
    if (folder / "questions_answers_YN").is_dir():
        texts, pictures = folder / "questions_answers_YN", folder / "images"
    files = sorted(path for path in texts.iterdir() if path.suffix == ".txt" and not path.name.startswith("."))
    there = sorted(pictures.iterdir()) if pictures.is_dir() else []
    names = {path.stem: path.name for path in there if path.suffix.lower() in (".jpg", ".jpeg", ".png")}
    for path in files:
        name = names.get(path.stem, f"{path.stem}.jpg")
        asked = _questions(path)
        for question, truth in asked:
            number = f"{category}/{name}"
            yield Example((str(pictures / name),), question, (truth,), category, id=number, group=number)


def _questions(path):
    """The two questions of a text, each with "yes" or "no"."""
    found = []
    for number, line in enumerate(published.read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        question, tab, truth = line.strip().rpartition("\t")
        if not tab or not question.strip():
            raise ValueError(f"{where}: expected a question, a tab and Yes or No, found {line.strip()[:60]!r}")
        truth = published.one_of({"answer": truth}, "answer", ("yes", "no"), where)
        found.append((question.strip().replace(_ASKS_FOR_YES_OR_NO, ""), truth))
    if len(found) != 2:
        raise ValueError(f"{path}: expected two questions, a line each, found {len(found)}")
    return found


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    faults = published.check(read, folder, split, (SPLITS[split],) if split in SPLITS else ())
    try:
        missing = [category for category in CATEGORIES if not (_root(folder) / category).is_dir()]
    except FileNotFoundError:  # which is among the faults
        missing = []
    return faults + ([f"not as published: no category {', '.join(missing)}"] if missing else [])


def score(example, answer) -> float:
    """Whether one answer is right."""
    return float(yes_no.mme_label(answer) == example.answers[0])


def score_all(pairs) -> dict:
    """The sums over categories, and the score of each as "CATEGORY/total"."""
    times = collections.Counter(example.group for example, _ in pairs)
    items = [(e.kind, e.group, score(e, answer)) for e, answer in pairs if times[e.group] == 2]
    scores = yes_no.mme(items)
    of = {"perception": yes_no.PERCEPTION, "cognition": yes_no.COGNITION}
    found = {name: sum(scores.get(category, 0.0) for category in of[name]) for name in of}
    found["total"] = sum(scores.values())
    if len(items) < len(pairs):
        found["unpaired"] = float(len(pairs) - len(items))
    return found | {f"{category}/total": value for category, value in scores.items()}
