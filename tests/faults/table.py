"""`python -m tests.faults.table` prints what the trials of `--faults` showed so far of the code as it is now."""

import collections

from tests.faults.rows import ROWS
from tests.faults.trials import current


def table() -> str:
    """A line for each row: what is promised, trials, how many were planned, passed, and seconds."""
    tests, ended = current()
    planned, done, passed, seconds = (collections.Counter() for _ in range(4))
    for line in tests.values():
        planned[line["row"]] += line["full"] * line["cases"]
    for line in ended.values():
        done[line["row"]] += tests[line["test"]]["cases"]
        passed[line["row"]] += tests[line["test"]]["cases"] if line["passed"] else 0
        seconds[line["row"]] += line["seconds"]
    lines = [("row", "fault", "promise", "trials", "of", "passed", "seconds")]
    for number, (fault, promise) in ROWS.items():
        counts = (done[number], planned[number], passed[number], round(seconds[number]))
        lines.append((number, fault, promise, *(counts if planned[number] else ("no test", "", "", ""))))
    total = (sum(found.values()) for found in (done, planned, passed))
    lines.append(("", "", "all", *total, round(sum(seconds.values()))))
    lines = [list(map(str, line)) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(line):
        cells = zip(line, widths, range(len(widths)), strict=True)
        return "  ".join(cell.ljust(width) if i in (1, 2) else cell.rjust(width) for cell, width, i in cells)

    failed = [line for line in ended.values() if not line["passed"]]
    reasons = [f"{line['test']} trial {line['trial']}: {line['reason'].splitlines()[0][:200]}" for line in failed]
    return "\n".join([*map(aligned, lines), *reasons])


if __name__ == "__main__":
    print(table())
