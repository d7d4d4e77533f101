"""Tasks: where questions come from and how an answer is scored.

A task is a module beside this one, and an entry in `TASKS`. It gives

    FILES             what its folder holds, for whoever has to name one: "a folder that … wrote"
    SPLIT             the split of it that is asked about, unless `lmm evaluate --split` names another
    MAX_NEW_TOKENS    an answer has at most so many tokens; or, where that depends on the questions,
    max_new_tokens(examples, tokenizer)
                      a function that says how many, from the `Example`s and a `Tokenizer`
    PROMPT            how a question is put, such as "{question} Answer yes or no."; the question alone if left out
    examples(folder, split, limit)
                      an iterable of `Example`s, at most `limit` of each kind, all if it is None

    METRIC            which score that is, by whose definition, and its version
    check(folder, split)
                      sentences that say what of a folder is missing or broken, before any work; [] if all is there.
                      Those that begin with "not as published:" hinder nobody from asking

at least one of

    score(example, answer)
                      of one answer, 0 … 1; evaluation takes the mean over the examples of each kind
    score_all(pairs)  of all answers at once, for what is no mean over answers: a dict of metrics from a list of
                      (example, answer). A metric's name does not begin with "n_", which is for numbers of questions;
                      "KIND/METRIC" is that of a kind, and stands in a line of its own when it is printed. Where both
                      are there, this is what is printed, and `score` is what answers are compared by

and, where a server or a judge knows the true answers,

    submission(pairs) (file name, bytes) of what it takes, from (example, answer) pairs

The module's docstring is its help page: which files, from where, how large, their licence, the splits, known gaps.

Where no task is named, the one that is called as the data set that a model was trained on is asked.
"""

from lmm_jax.data.prepared import OWN
from lmm_jax.evaluation.tasks import (
    ai2d,
    chartqa,
    digits,
    docvqa,
    gqa,
    mme,
    own,
    pages,
    pope,
    textvqa,
    textvqa_ocr,
    vqav2,
)
from lmm_jax.evaluation.tasks.example import Example

__all__ = ["TASKS", "Example"]

TASKS = {
    "digits": digits,
    "pages": pages,
    OWN: own,
    "textvqa": textvqa,
    "textvqa_ocr": textvqa_ocr,
    "docvqa": docvqa,
    "chartqa": chartqa,
    "pope": pope,
    "gqa": gqa,
    "vqav2": vqav2,
    "mme": mme,
    "ai2d": ai2d,
}
