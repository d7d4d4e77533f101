"""Single questions about unseen pictures: the turns of a built-in data set's conversations, each asked by itself."""

from lmm_jax.data.prepared import Prepared, as_pictures, as_turns
from lmm_jax.evaluation.tasks import published
from lmm_jax.evaluation.tasks.example import Example

METRIC = "exact match; of a reading, the share of digits that are right at their place (version 1)"


def examples(folder, split, limit=None):
    """The first turn of each kind about each picture of a split; `limit` pictures, all if None.

    Raises:
      FileNotFoundError, ValueError: no prepared folder, or it lacks the split; the message names those that it has.
    """
    data = Prepared(folder, split)
    for row in range(len(data) if limit is None else min(limit, len(data))):
        record = data[row]
        pictures, turns, seen = tuple(as_pictures(record)), as_turns(record), set()
        for n in range(0, len(turns), 2):
            kind = record["turns"]["kind"][n].decode()
            if kind not in seen:
                seen.add(kind)
                question = turns[n][1].removeprefix("<image>\n")
                name = record["id"].decode()
                yield Example(pictures, question, (turns[n + 1][1],), kind, id=name, group=name)


def check(folder, split) -> list[str]:
    """What is missing or broken, see `published.first_fault`."""
    return published.first_fault(examples, folder, split)


def score(example, answer) -> float:
    """Exact match; for reading, the share of digits that are right at their place. Of several answers the best."""
    if example.kind != "read":
        return float(answer.strip() in example.answers)
    return max(_share_read(truth.split(), answer.split()) for truth in example.answers)


def _share_read(truth, read):
    return sum(a == b for a, b in zip(truth, read, strict=False)) / len(truth)
