"""Tasks: where questions come from and how an answer is scored.

A task is a module beside this one, and an entry in `TASKS`. It gives

    FILES             what its folder holds, for whoever has to name one: "a folder that … wrote"
    SPLIT             the split of it that is asked about, unless `lmm evaluate --split` names another
    MAX_NEW_TOKENS    an answer has at most so many
    PROMPT            how a question is put, such as "{question} Answer yes or no."; the question alone if left out
    examples(folder, split, limit)
                      an iterable of `Example`s, at most `limit` of each kind, all if it is None

and one of

    score(example, answer)
                      of one answer, 0 … 1; evaluation takes the mean over the examples of each kind
    score_all(pairs)  of all answers at once, for what is no mean over answers: a dict of metrics from a list of
                      (example, answer). A metric's name does not begin with "n_", which is for numbers of questions
"""

from lmm_jax.evaluation.tasks import digits, pages
from lmm_jax.evaluation.tasks.example import Example

__all__ = ["TASKS", "Example"]

TASKS = {"digits": digits, "pages": pages}
