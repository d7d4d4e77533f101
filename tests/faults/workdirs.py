"""What lies in the workdir of a run, seen from outside while it runs and after it was killed."""

import contextlib
import os
import re

from lmm_jax.training.checkpoint import DELETED
from lmm_jax.training.metrics import read_metrics
from lmm_jax.training.saved import saved_steps


def saved(workdir) -> list[int]:
    """Steps that are saved, newest first, as the library sees it."""
    return saved_steps(workdir)


def folders(workdir) -> list[int]:
    """Steps that have a folder, newest first, whatever is in it."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else ()
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def being_saved(workdir) -> bool:
    """Whether the folder of a step is being written."""
    with contextlib.suppress(FileNotFoundError):
        return any("tmp" in name for name in os.listdir(workdir / "checkpoints"))
    return False


def being_deleted(workdir) -> bool:
    """Whether the folder of a step is being deleted."""
    with contextlib.suppress(FileNotFoundError):
        return any(name.endswith(DELETED) for name in os.listdir(workdir / "checkpoints"))
    return False


def taken(workdir) -> int:
    """The last step of which metrics were written, 0 if none."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return max((row["step"] for row in read_metrics(workdir) if "loss" in row), default=0)
    return 0


def begun_at(said) -> int | None:
    """The step that a command said it goes on from."""
    found = re.search(r"from step (\d+) of", said)
    return found and int(found[1])
