"""POPE: is there a …? Yes-or-no questions about objects that are, or are not, in a photograph.

Files, as https://github.com/AoiDragon/POPE has them in output/coco, JSON lines in spite of their names:

    coco_pope_random.json         3,000 questions about 500 pictures (2,910 in the version that LLaVA names)
    coco_pope_popular.json        3,000 questions
    coco_pope_adversarial.json    3,000 questions
    val2014/COCO_val2014_*.jpg    500 of COCO's validation pictures of 2014: val2014.zip, 6.6 GB

SHA-256 of val2014.zip (as TFDS has it): fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0
The question files may also lie in coco/ or output/coco/. Splits: "test" is all three, and each may be asked alone.
Licence: MIT; the pictures are under Flickr's terms, COCO's annotations under CC BY 4.0.

Two definitions are reported, of all answers and of each kind (random, popular, adversarial). `llava_*` is LLaVA's
script: "no", "No" or "not" in the first sentence is no, everything else yes. `lmms_*` is lmms-eval's: an answer is
"yes" or "no" and nothing else. They differ as soon as a model answers in sentences. `llava_f1_mean` is the mean F1 of
the three kinds, which papers call POPE. The score of a single answer is LLaVA's.
"""

from lmm_jax.config import choose
from lmm_jax.evaluation import yes_no
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import by_kind

FILES = "a folder with coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json and val2014/"
SPLIT = "test"
METRIC = "POPE as LLaVA's eval_pope.py and as lmms-eval 0.7.3 compute it, both (version 1)"
PROMPT = "{question}\nAnswer the question using a single word or phrase."
MAX_NEW_TOKENS = 128

KINDS = ("random", "popular", "adversarial")
# Of a split: its kinds, and the questions of the published versions (random had 2,910 until 2023, 3,000 since).
SPLITS = {
    "test": (KINDS, (9_000, 8_910)),
    "random": (("random",), (3_000, 2_910)),
    "popular": (("popular",), (3_000,)),
    "adversarial": (("adversarial",), (3_000,)),
}


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, line and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question, kind by kind."""
    kinds, _ = choose("split of POPE", split, SPLITS)
    pictures = str(published.first_of(folder, ("val2014", "coco/val2014", "images/val2014")))
    for kind in kinds:
        name = f"coco_pope_{kind}.json"
        path = published.find(folder, (name, f"coco/{name}", f"output/coco/{name}"))
        for where, item in published.read_lines(path):
            image = published.field(item, "image", str, where)
            yield Example(
                (published.picture(pictures, image, where),),
                published.question(item, "text", where).strip(),
                (published.one_of(item, "label", ("yes", "no"), where),),
                kind,
                id=f"{kind}-{published.field(item, 'question_id', int, where)}",
                group=image,
            )


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, SPLITS[split][1] if split in SPLITS else ())


def score(example, answer) -> float:
    """Whether LLaVA's script takes one answer for the true one."""
    return float(yes_no.llava_label(answer) == example.answers[0])


def score_all(pairs) -> dict:
    """Both definitions, of all answers and of each kind, and the mean F1 of the kinds."""
    found = by_kind(_both, pairs)
    of_kinds = [found[f"{kind}/llava_f1"] for kind in KINDS if f"{kind}/llava_f1" in found]
    return found | {"llava_f1_mean": sum(of_kinds) / len(of_kinds)}


def _both(pairs):
    rates = yes_no.pope([(answer, example.answers[0]) for example, answer in pairs])
    short = {"lmms_eval": "lmms", "llava": "llava"}
    return {f"{short[whose]}_{name}": value for whose, of in rates.items() for name, value in of.items()}
