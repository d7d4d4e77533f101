"""`python -m tests.training.recorded FILE ARGUMENT…` is `lmm ARGUMENT…`, and writes down the records of each step.

The host that BROKEN_HOST names cannot read any; that which SLOW_HOST names reads slowly.
"""

import contextlib
import json
import os
import sys
import time

from lmm_jax import cli
from lmm_jax.data import pipeline
from lmm_jax.data.prepared import Prepared
from lmm_jax.training import loop, run

FILE = sys.argv.pop(1)  # the rest is the same on all hosts


def batches(packs, local, start, stop, **options):
    """Those of the library, each with what it is: step, and numbers of its packs."""
    found = pipeline.batches(packs, local, start, stop, **options)
    with contextlib.closing(found):
        for step, batch in enumerate(found, start=start + 1):
            yield batch | {"faults": _Recorded(batch["faults"], step, local, batch["record_index"].tolist())}


class _Recorded(list):
    """The faults of a batch, which are looked at when the batch is trained on: then it is written down."""

    def __init__(self, faults, step, local, rows):
        super().__init__(faults)
        self.lines = [f"{json.dumps([step, int(p), row])}\n" for p, row in zip(local, rows, strict=True)]


def add(bad_records, bad, faults):
    with open(FILE, "a") as f:
        f.writelines(faults.lines)
    return count(bad_records, bad, faults)


def broken(prepared, row):
    raise OSError(f"row {row} cannot be read")


def slow(prepared, row):
    time.sleep(0.4)
    return read(prepared, row)


run.batches = batches
count, loop.BadRecords.add = loop.BadRecords.add, add
if os.environ.get("BROKEN_HOST") == os.environ.get("JAX_PROCESS_ID", ""):
    Prepared.__getitem__ = broken
if os.environ.get("SLOW_HOST") == os.environ.get("JAX_PROCESS_ID", ""):
    read, Prepared.__getitem__ = Prepared.__getitem__, slow
if __name__ == "__main__":  # not in the readers of the run, which import what it was started with
    sys.exit(cli.main())
