"""Questions of a user's own rows: every answered turn, with the true turns before it, scored in several ways."""

import collections

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.data.prepared import Prepared, as_turns, read_about
from lmm_jax.evaluation import metrics
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example
from lmm_jax.evaluation.tasks.means import by_kind, mean

FILES = "a folder that `lmm prepare --data FILE` wrote"
SPLIT = "test"
METRIC = "exact match, containment, ANLS and, of choices, the right letter (version 1)"

SCORES = {"exact": metrics.exact, "contains": metrics.contains, "anls": metrics.anls}
NEVER_MORE = 512  # tokens of an answer


def max_new_tokens(examples, tokenizer) -> int:
    """Tokens of the longest true answer and a quarter more, rounded up to a multiple of 16; at most `NEVER_MORE`.

    A model that does not stop is so found to be wrong soon, and a caption is not cut where a word would be enough.
    """
    longest = max(len(tokenizer.encode(answer)) for example in examples for answer in example.answers)
    return min(NEVER_MORE, -(-5 * longest // 64) * 16)


def examples(folder, split, limit=None):
    """The answered user turns of a split's rows, each asked by itself; `limit` of each kind, all if None.

    What was said before a question in its row, a system turn included, is its history, with the true answers. So a
    question that refers to an earlier one is understood, and no wrong answer spoils the next question. Pictures of
    later turns are left out. An answer that the row takes out of the loss is history alone. The kind is what the row
    says, "all" where it says none.

    Raises:
      FileNotFoundError, ValueError: no prepared folder, or one without the split; the message says how to make it.
    """
    splits = read_about(folder)["splits"]
    if split not in splits:
        raise ValueError(
            f"{folder} has no split '{split}' to ask about, only {', '.join(sorted(splits))}: "
            "`lmm prepare --data FILE --out DIR --test N` keeps N rows for a test, and --split names another split"
        )
    data, found = Prepared(folder, split), collections.Counter()
    for row in range(len(data)):
        record = data[row]
        turns, kinds = as_turns(record), [_name(kind) for kind in record["turns"]["kind"]]
        for n in range(1, len(turns)):
            asked, answered = turns[n - 1 : n + 1]
            kind = kinds[n - 1] or kinds[n] or "all"
            if (asked.role, answered.role) != ("user", "assistant") or not answered.in_loss or found[kind] == limit:
                continue
            found[kind] += 1
            seen = sum(turn.text.count(IMAGE_TAG) for turn in turns[:n] if turn.role == "user")
            history = tuple((turn.role, turn.text) for turn in turns[: n - 1])
            row_id, pictures = record["id"].decode(), tuple(record["images"][:seen])
            yield Example(pictures, asked.text, (answered.text,), kind, history, f"{row_id}:{n - 1}", row_id)


def _name(kind):
    """A row's kind as a part of a metric's name, in which a slash parts it from the score."""
    return kind.decode().replace("/", "-")


def check(folder, split) -> list[str]:
    """What is missing or broken, see `published.first_fault`."""
    return published.first_fault(examples, folder, split)


def score(example, answer) -> float:
    """Of one answer: whether it chooses the right letter if the truth is the letter of a choice, else ANLS."""
    choices = all(map(metrics.is_choice, example.answers))
    return (metrics.choice if choices else metrics.anls)(answer, example.answers)


def score_all(pairs) -> dict:
    """Means of `SCORES`, over all answers and, where rows have kinds, as "KIND/score" over those of each kind.

    "choice" is the share of right letters among the questions whose true answer is the letter of a choice; it is
    there if there are such questions.
    """
    return by_kind(_means, pairs)


def _means(pairs):
    found = {name: _mean(metric, pairs) for name, metric in SCORES.items()}
    choices = [(example, answer) for example, answer in pairs if all(map(metrics.is_choice, example.answers))]
    return found | ({"choice": _mean(metrics.choice, choices)} if choices else {})


def _mean(metric, pairs):
    return mean(lambda example, answer: metric(answer, example.answers), pairs)
