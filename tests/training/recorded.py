"""`python -m tests.training.recorded FILE ARGUMENT…` is `lmm ARGUMENT…`, and writes down the records of each step.

The host that BROKEN_HOST names cannot read any.
"""

import json
import os
import sys

from lmm_jax import cli
from lmm_jax.data import pipeline
from lmm_jax.data.prepared import Prepared
from lmm_jax.training import loop

FILE = sys.argv.pop(1)  # the rest is the same on all hosts


def batches(packs, local, start, stop, **options):
    for step, batch in enumerate(pipeline.batches(packs, local, start, stop, **options), start=start + 1):
        rows = batch["record_index"].tolist()
        with open(FILE, "a") as f:
            f.writelines(f"{json.dumps([step, int(p), row])}\n" for p, row in zip(local, rows, strict=True))
        yield batch


def broken(prepared, row):
    raise OSError(f"row {row} cannot be read")


loop.batches = batches
if os.environ.get("BROKEN_HOST") == os.environ.get("JAX_PROCESS_ID", ""):
    Prepared.__getitem__ = broken
sys.exit(cli.main())
