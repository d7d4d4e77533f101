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

and one of

    score(example, answer)
                      of one answer, 0 … 1; evaluation takes the mean over the examples of each kind
    score_all(pairs)  of all answers at once, for what is no mean over answers: a dict of metrics from a list of
                      (example, answer). A metric's name does not begin with "n_", which is for numbers of questions;
                      "KIND/METRIC" is that of a kind, and stands in a line of its own when it is printed

Where no task is named, the one that is called as the data set that a model was trained on is asked.
"""

from lmm_jax.data.prepared import OWN
from lmm_jax.evaluation.tasks import digits, own, pages
from lmm_jax.evaluation.tasks.example import Example

__all__ = ["TASKS", "Example"]

TASKS = {"digits": digits, "pages": pages, OWN: own}
