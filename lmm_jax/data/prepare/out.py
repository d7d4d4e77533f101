"""The folder that a preparation writes to: whose it is, whether it can be written, and what a full disk says."""

import contextlib
import errno
import os
import sys

from lmm_jax import lock, storage, strict_json
from lmm_jax.data.conversation import check_template
from lmm_jax.data.tokenizer import load_tokenizer, tokenizer_files

# What a run writes, beside the files of a tokenizer and the indices.
WRITTEN = ("records", "example.png", "refused.jsonl", "preparing.json")
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk without room


def is_finished(out, source):
    """Whether `out` was made from `source`; FileExistsError if it was made from something else."""
    path = out / "prepared.json"
    if not path.exists():
        return False
    try:
        other = strict_json.read_object(path).get("source", {})
        if not isinstance(other, dict):
            raise ValueError(f"source is {strict_json.shown(other)}")
    except ValueError as error:
        raise ValueError(f"{path} is not what `lmm prepare` writes ({error}); choose another folder") from error
    differing = [name for name in {**other, **source} if other.get(name) != source.get(name)]
    if differing:
        told = [name for name in differing if name not in ("bytes", "sha256")]
        changes = ", ".join(f"{name} was {other.get(name)}, is {source.get(name)}" for name in told)
        changes = changes or f"what {source.get('data')} holds has changed"
        raise FileExistsError(f"{out} was prepared from something else ({changes}); choose another folder")
    print(f"{out} is finished and left as it is", file=sys.stderr)
    return True


def check_finished(out, template):
    """ValueError if the tokenizer of a finished folder lacks pieces of its template, as earlier versions allowed."""
    try:
        check_template(load_tokenizer(out), template)
    except ValueError as error:
        raise ValueError(f"{out} was prepared with an earlier version: {error}; prepare into a new folder") from error


def check_out(out):
    """Makes sure that `out` can be written, without writing.

    Raises:
      ValueError: a bucket.
      OSError: it holds something that is not ours, another process writes to it, or nothing can be written there.
    """
    if storage.is_remote(out):
        raise ValueError(
            f"--out {out}: records are written to a disk; prepare there, then copy the folder to the bucket"
        )
    if (out / "prepared.json").exists():  # finished: nothing will be written
        return
    storage.check_place(out, "--out")
    if out.exists():
        _ours(out)
        if (out / lock.NAME).exists():  # whoever waits for a long file to be read would rather know now
            with _holding(out):
                pass


def check_space(out, size):
    """OSError if the disk of `out` has less than `size` bytes left, beside those of an unfinished preparation."""
    free = storage.free_bytes(out, of=out)
    if size > free:
        raise OSError(
            f"--out {out}: rows and pictures take {storage.amount(size)}, and {storage.amount(free)} are free there; "
            "make room, or choose a folder on another disk"
        )


def _ours(out):
    """What a run of ours left in `out`, which it did not finish; FileExistsError if there is anything else."""
    mark = out / "preparing.json"
    found = sorted(p for p in out.iterdir() if p.name != lock.NAME and not p.name.startswith(f".{lock.NAME}."))
    names = {*WRITTEN, *tokenizer_files()}
    ours = [p for p in found if mark.exists() and (p.name in names or p.match("index_*.npz"))]
    foreign = [p.name for p in found if p not in ours]
    if foreign:
        raise FileExistsError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another folder")
    return ours


def _holding(out):
    return lock.hold(out, "lmm prepare", note=lambda line: print(line, file=sys.stderr))


@contextlib.contextmanager
def writing(out):
    """Holds `out` for this process, empty but for the mark of an unfinished folder: only what is ours is deleted.

    Yields:
      the `lock.Hold`.

    Raises:
      OSError: another process writes there, or it cannot be written; the message says what to do.
    """
    with _named_disk(out), _holding(out) as held:
        if (out / "prepared.json").exists():
            raise FileExistsError(f"{out} was finished by another process meanwhile; the same command finds it so")
        mark = out / "preparing.json"
        ours = _ours(out)
        mark.write_text("{}\n")
        for path in ours:
            if path.is_dir():
                path.rmtree()
            elif path != mark:
                path.unlink()
        yield held


@contextlib.contextmanager
def _named_disk(out):
    """Errors of the disk as a sentence, in whatever form a library raises them: ArrayRecord's are RuntimeErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        full = [os.strerror(n) for n in FULL if n == number or os.strerror(n) in str(error)]
        if full:
            raise OSError(
                f"--out {out}: {full[0]}. The folder is unfinished; make room and give the same command again, which "
                f"starts anew, or delete {out} and choose a folder on another disk"
            ) from error
        if isinstance(error, OSError) and number is not None:
            raise OSError(f"{error.filename or out}: {error.strerror}") from error
        raise
