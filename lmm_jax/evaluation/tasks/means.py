"""Means over answers, in all and of each kind of question."""


def mean(score, pairs) -> float:
    """Mean of `score(example, answer)` over (example, answer) pairs."""
    return sum(score(example, answer) for example, answer in pairs) / len(pairs)


def by_kind(measure, pairs) -> dict:
    """Metrics of all pairs and, where questions have kinds, as "KIND/metric" those of the pairs of each kind.

    Args:
      measure: function from (example, answer) pairs to a dict of metrics.
      pairs: of which there is at least one.
    """
    kinds, found = sorted({example.kind for example, _ in pairs}), measure(pairs)
    for kind in kinds if kinds != ["all"] else ():
        of_kind = measure([pair for pair in pairs if pair[0].kind == kind])
        found |= {f"{kind}/{name}": value for name, value in of_kind.items()}
    return found


def scored(metric, score, pairs) -> dict:
    """`by_kind` of one mean score; {} of questions whose answers only a server knows."""
    known = [(example, answer) for example, answer in pairs if example.answers]
    return by_kind(lambda some: {metric: mean(score, some)}, known) if known else {}
