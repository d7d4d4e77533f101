"""What an evaluation gave, as a table to read."""


def metric_names(values) -> list[str]:
    """The metrics among the values of a task at a scale; the others are numbers of questions."""
    return [name for name in values if "/" in name or not name.startswith("n_")]


def table(results) -> str:
    """What `evaluate` returned as a table: a row per scale, a column per metric.

    Metrics that are called "KIND/METRIC" stand below, a row per scale and kind, with the number of questions.
    """
    lines = []
    for task, by_scale in results.items():
        names = list(dict.fromkeys(name for values in by_scale.values() for name in metric_names(values)))
        metrics = [name for name in names if "/" not in name]
        lines.append("  ".join([f"{task:>8} tokens", *(f"{m:>8}" for m in metrics)]))
        for scale, values in by_scale.items():
            lines.append("  ".join([f"{scale:>15}", *(_cell(values, m, len(m)) for m in metrics)]))
        kinds = list(dict.fromkeys(name.rpartition("/")[0] for name in names if "/" in name))
        if kinds:
            lines += ["", *_table_of_kinds(by_scale, kinds, metrics)]
    return "\n".join(lines)


def _table_of_kinds(by_scale, kinds, metrics):
    width = max(4, *map(len, kinds))
    yield "  ".join([f"{'tokens':>15}", f"{'kind':<{width}}", "questions", *(f"{m:>8}" for m in metrics)])
    for scale, values in by_scale.items():
        for kind in kinds:
            cells = [_cell(values, f"{kind}/{metric}", len(metric)) for metric in metrics]
            yield "  ".join([f"{scale:>15}", f"{kind:<{width}}", f"{values[f'n_{kind}']:>9,}", *cells])


def _cell(values, name, width):
    """A metric right-aligned under its name; a dash where there is none."""
    return f"{values[name]:{max(8, width)}.3f}" if name in values else f"{'–':>{max(8, width)}}"
