"""Trials: repeated with other random numbers, written down, and not repeated once they have passed."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import time
import traceback

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
LEDGER = ROOT / ".pytest_cache" / "faults" / "trials.jsonl"
NO_MATTER = ("rows", "table", "trials")  # modules of this folder that say what is proved, and count it
MOST_FAILURES = 5  # of a test, after which its other trials tell nothing new


@functools.cache
def digest(test_file) -> str:
    """Of all that decides what a trial shows: the library, the test's file, and what that names of this folder."""
    files = {ROOT / test_file, ROOT / "tests/faults/conftest.py"}
    waiting = list(files)
    while waiting:
        names = re.findall(r"\btests\.faults\.(\w+)", waiting.pop().read_text())  # imported, or run as a process
        new = {ROOT / f"tests/faults/{name}.py" for name in names if name not in NO_MATTER} - files
        files |= new
        waiting += new
    found = hashlib.sha256()
    for path in sorted({*(ROOT / "lmm_jax").rglob("*.py"), *files}):
        found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def read_ledger() -> list[dict]:
    """Every line that was written; one that a kill cut short is left out."""
    lines = []
    for line in LEDGER.read_text().splitlines() if LEDGER.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def current() -> tuple[dict, dict]:
    """What the ledger says of the code as it is now.

    Returns:
      `{test: {"row", "full", "cases"}}` of the tests that were collected, and `{(test, trial): line}` of the trials
      that ended, the last line of each.
    """
    tests, ended = {}, {}
    for line in read_ledger():
        file = line["test"].split("::")[0]
        if not (ROOT / file).exists() or line["digest"] != digest(file):
            continue
        if "trial" in line:
            ended[line["test"], line["trial"]] = line
        else:
            tests[line["test"]] = line
    return tests, {key: line for key, line in ended.items() if line["test"] in tests}


def write(**line):
    """Adds a line to the ledger."""
    LEDGER.parent.mkdir(parents=True, exist_ok=True)
    with LEDGER.open("a") as f:
        f.write(json.dumps(line) + "\n")


@dataclasses.dataclass(frozen=True)
class Trials:
    """The trials of one test.

    Attributes:
      row: that it proves.
      test: its id, file and name.
      numbers: of the trials to do.
      full: whether this is a run with `--faults`, whose trials are written down.
    """

    row: int
    test: str
    numbers: range
    full: bool

    def random(self, number) -> np.random.Generator:
        """What is random in a trial; the same whenever it is repeated."""
        return np.random.default_rng([self.row, number])

    def each(self, check) -> collections.Counter:
        """Does every trial, fails if one failed.

        Args:
          check: is called with the number of each trial and raises if it fails; it may return the kind of trial that
            it was, such as "inside a save".

        Returns:
          how many passed of each kind, those that passed in an earlier run among them.
        """
        passed, kinds, failures = self._passed(), collections.Counter(), []
        for number in self.numbers:
            if number in passed:
                kinds[passed[number]["kind"]] += 1
                continue
            begin, reason, kind = time.monotonic(), "", None
            try:
                kind = check(number)
            except Exception as error:  # of whatever kind: all trials are counted
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
                failures.append(f"trial {number}: {reason[:1200]}")
            else:
                kinds[kind] += 1
            if self.full:
                about = {"row": self.row, "test": self.test, "trial": number, "passed": not reason, "kind": kind}
                about |= {"reason": reason[:500], "seconds": round(time.monotonic() - begin, 3)}
                write(**about, digest=digest(self.test.split("::")[0]))
            if len(failures) == MOST_FAILURES:
                break
        if failures:
            pytest.fail("\n".join([f"row {self.row}: {len(failures)} trials failed", *failures]), pytrace=False)
        return kinds

    def _passed(self):
        """Lines of the trials that passed in an earlier run of the same code."""
        if not self.full:
            return {}
        ended = current()[1].values()
        return {line["trial"]: line for line in ended if line["test"] == self.test and line["passed"]}
