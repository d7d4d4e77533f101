"""TextVQA with OCR tokens: the questions of task `textvqa`, with what Rosetta read in the picture put beside them.

Files: those of `textvqa`, and TextVQA_Rosetta_OCR_v0.2_{val,test,train}.json in the same folder (val: 10 MB, an entry
for each of 3,166 pictures). LLaVA-1.5's published TextVQA numbers are with these tokens, those that lmms-eval gives
by default are without. The tokens are put as lmms-eval puts them: "Reference OCR token: A, B" in a line of their own.
Licence, splits and scores are those of `textvqa`.
"""

import dataclasses

from lmm_jax.evaluation.tasks import published, textvqa

FILES = "a folder with TextVQA_0.5.1_val.json, TextVQA_Rosetta_OCR_v0.2_val.json and train_images/"
SPLIT, METRIC, PROMPT, MAX_NEW_TOKENS = textvqa.SPLIT, textvqa.METRIC, textvqa.PROMPT, textvqa.MAX_NEW_TOKENS

# SHA-256 as it was recorded by one who downloaded it from dl.fbaipublicfiles.com (9,830,753 bytes).
DIGESTS = {"TextVQA_Rosetta_OCR_v0.2_val.json": "5fe60362e43381e10b29bf25cc84bb0cebcabf155a32e7121208b51a5a02715c"}

score, score_all, submission = textvqa.score, textvqa.score_all, textvqa.submission


def examples(folder, split, limit=None):
    """The questions of a split; see the module. Raises ValueError, FileNotFoundError: naming file, item and field."""
    return published.limited(read(folder, split), limit)


def read(folder, split):
    """Yields an `Example` a question, with the tokens of its picture."""
    asked = list(textvqa.read(folder, split))  # whose faults come first
    path = _tokens_file(folder, split)
    tokens = {}
    for where, item in published.entries(published.read_json(path, dict), "data", path):
        image = published.field(item, "image_id", str, where)
        tokens[image] = published.texts(item, "ocr_tokens", where, least=0)
    for example in asked:
        if example.group not in tokens:
            raise ValueError(f"{path} has no OCR tokens of picture {example.group}; it is not of split '{split}'")
        question = f"{example.question}\nReference OCR token: {', '.join(tokens[example.group])}"
        yield dataclasses.replace(example, question=question)


def _tokens_file(folder, split):
    return published.find(folder, (f"TextVQA_Rosetta_OCR_v0.2_{split}.json",))


def check(folder, split) -> list[str]:
    """What is missing, broken or not as published; see `published.check`."""
    return published.check(read, folder, split, textvqa.numbers(split), _digests)


def _digests(folder, split):
    path = _tokens_file(folder, split)
    own = {path: DIGESTS[path.name]} if path.name in DIGESTS else {}
    return textvqa.digests(folder, split) | own
