"""Single questions about unseen pictures: the turns of a built-in data set's test split, each asked by itself."""

from lmm_jax.data.prepared import Prepared, as_pictures, as_turns
from lmm_jax.evaluation.tasks import Example


def examples(folder, limit=None):
    """The first turn of each kind of the test pictures; `limit` pictures, all if None."""
    data = Prepared(folder, "test")
    for row in range(min(limit or len(data), len(data))):
        record = data[row]
        pictures, turns, seen = tuple(as_pictures(record)), as_turns(record), set()
        for n in range(0, len(turns), 2):
            kind = record["turns"]["kind"][n].decode()
            if kind not in seen:
                seen.add(kind)
                question = turns[n][1].removeprefix("<image>\n")
                yield Example(pictures, question, turns[n + 1][1], kind)


def score(example, answer) -> float:
    """Exact match; for reading, the share of digits that are right at their place."""
    if example.kind != "read":
        return float(answer.strip() == example.answer)
    truth, read = example.answer.split(), answer.split()
    return sum(a == b for a, b in zip(truth, read, strict=False)) / len(truth)
