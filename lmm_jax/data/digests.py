"""Digests of the files of a prepared folder: written when it is prepared, verified before it is trained on.

`prepared.json` holds the size and the sha256 of each file that a run reads, and a digest of itself. Small files are
verified whenever the folder is opened. Files of records may be hundreds of gigabytes, so that each is verified once
on a machine: a mark in the cache folder says that a file of this path, size and time of change held what it should.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from concurrent import futures

from tqdm import tqdm

from lmm_jax import storage

FILES, OWN = "files", "digest"  # keys of `prepared.json`
HEX = re.compile(r"[0-9a-f]{64}")
PIECE = 1 << 20  # bytes that are read at a time
REMEMBERED = 1 << 24  # bytes of a file from which on a mark is kept: others are read again as soon
READERS = 4  # threads
SAID = 1 << 32  # bytes from which on a line says that they are verified
AGAIN = "copy the folder anew, or prepare it again"


class Damaged(ValueError):
    """A file that is not what was written; `file` says which."""

    def __init__(self, message, file):
        super().__init__(message)
        self.file = file


def digests(folder, files) -> dict:
    """Sizes and digests of files by their path in `folder`, as `verify` wants them."""
    with futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(_sha256, files))
    sizes = [file.stat().length for file in files]
    names = [file.relative_to(folder).as_posix() for file in files]
    return {name: {"bytes": size, "sha256": digest} for name, size, digest in zip(names, sizes, found, strict=True)}


def sealed(about) -> dict:
    """Contents of a `prepared.json` with their own digest."""
    return {**about, OWN: _own(about)}


def fault(about) -> str:
    """What is wrong with the digests in a `prepared.json`; "" if nothing is, or if an earlier version wrote none."""
    if FILES not in about:
        return ""
    files = about[FILES]
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        return f"{FILES} is no table of sizes and digests"
    return "" if about.get(OWN) == _own(about) else "it is not as `lmm prepare` wrote it"


def verify(folder, about, files):
    """Compares files with their digests.

    Args:
      folder: the prepared folder.
      about: contents of its `prepared.json`, which hold digests.
      files: `{path in the folder: file}`.

    Raises:
      Damaged: a file that is not what was written, named.
      ValueError: a file that was not written with the folder, named.
    """
    for name, file in files.items():
        known = about[FILES].get(name)
        if known is None:
            raise ValueError(f"{folder}/{name} was not there when the folder was prepared; {AGAIN}")
        size = file.stat().length
        if size != known["bytes"]:
            raise Damaged(
                f"{folder}/{name} is damaged: it has {size:,} bytes, {known['bytes']:,} were written; {AGAIN}", file
            )
    unknown = {name: file for name, file in files.items() if not _is_remembered(file, about[FILES][name])}
    total = sum(about[FILES][name]["bytes"] for name in unknown)
    if total >= SAID:
        print(f"verifying {folder}, once on this machine: {storage.amount(total)}", file=sys.stderr, flush=True)
    with (
        futures.ThreadPoolExecutor(READERS) as pool,
        tqdm(
            desc="verifying", total=total, unit="B", unit_scale=True, disable=None if total >= SAID else True
        ) as bar,
    ):
        found = pool.map(lambda file: _sha256(file, bar), unknown.values())
        for (name, file), digest in zip(unknown.items(), found, strict=True):
            if digest != about[FILES][name]["sha256"]:
                raise Damaged(f"{folder}/{name} is damaged: it holds other bytes than were written; {AGAIN}", file)
            _remember(file, about[FILES][name])


def _sha256(file, bar=None) -> str:
    found = hashlib.sha256()
    with file.open("rb") as f:
        while piece := f.read(PIECE):
            found.update(piece)
            if bar is not None:
                bar.update(len(piece))
    return found.hexdigest()


def _mark(file, known):
    """The file in the cache folder that says that `file`, as it is now, was verified."""
    stat = os.stat(file)
    key = f"{os.path.realpath(file)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {known['sha256']}"
    return storage.cache_folder() / "verified" / hashlib.sha256(key.encode()).hexdigest()


def _is_remembered(file, known):
    return not storage.is_remote(file) and known["bytes"] >= REMEMBERED and _mark(file, known).exists()


def _remember(file, known):
    if storage.is_remote(file) or known["bytes"] < REMEMBERED:
        return
    mark = _mark(file, known)
    with contextlib.suppress(OSError):  # then it is verified again the next time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text("")


def _own(about) -> str:
    rest = {key: value for key, value in about.items() if key != OWN}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_entry(entry):
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and bool(HEX.fullmatch(entry["sha256"]))
    )
