"""Compiled programs on disk, so that a command need not compile what it compiled before.

Only commands turn it on. A program that imports the library decides for itself, by `jax_compilation_cache_dir` or the
environment variable JAX_COMPILATION_CACHE_DIR; where one of them names a folder already, it stays that one.

JAX's key of a program holds the program, jaxlib's version, the options of the compiler and the kind and number of
devices. What it need not hold is everything about a CPU: a program that was compiled for one and is loaded on
another, as in a home folder that several machines share, may end in an illegal instruction. So each kind of CPU has a
folder of its own.
"""

import hashlib
import os
import pathlib
import platform
import stat
import sys
import time
import warnings
import zlib

import jax

from lmm_jax import errors, storage

LEAST_SECONDS = 0.1  # a program that is compiled in less is not kept
MOST_BYTES = 4 * 2**30  # of all that is kept for a machine
CHECKED = ".checked"  # a file that is as old as the last look at what the others hold
ZLIB = 0x78  # first byte of what JAX compresses without zstd


def start() -> pathlib.Path | None:
    """Keeps the programs that this process compiles from now on, and takes those that were kept.

    A folder that cannot be used is told in a sentence on stderr, and ends nothing.

    Returns:
      the folder; None where nothing is kept by this: JAX has a folder already, or there are several hosts. Those must
      compile the same programs at the same time (compilers for GPUs share out the work), and do not if one host has
      kept what another has not.
    """
    if jax.config.jax_compilation_cache_dir or jax.distributed.is_initialized():
        return None
    folder = pathlib.Path(storage.cache_folder()) / "compiled" / machine()
    try:
        prepare(folder)
    except OSError as error:
        why = errors.explain(error)[0]
        print(
            f"lmm: compiled programs are not kept: {why} (--no-compile-cache asks for nothing else)", file=sys.stderr
        )
        return None
    # A program that could not be read or written is compiled, as it would be without all this.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def machine() -> str:
    """A name for the kind of CPU that this is: equal where its model and all its features are."""
    told = [platform.machine(), platform.processor()]
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []  # not on Linux
    told += [line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part")]
    return f"{platform.machine()}-{hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"


def prepare(folder):
    """Makes a folder of programs, or tidies the one that is there.

    Raises:
      OSError: it cannot be made or written to, or others may write to it. What lies in it is run, so that they could
        run what they want as this user.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} belongs to another user or can be written to by others (see chmod go-w)")
    checked, now = folder / CHECKED, time.time()
    since = checked.stat().st_mtime if checked.exists() else 0
    checked.touch()
    os.utime(checked, (now, now))
    kept = []
    for file in folder.glob("*-cache"):
        about = file.stat()
        if about.st_mtime >= since and not _is_whole(file):
            file.unlink(missing_ok=True)
        else:
            kept.append((about.st_mtime, about.st_size, file))
    total = sum(size for _, size, _ in kept)
    for _, size, file in sorted(kept, key=lambda item: item[0]):
        if total > MOST_BYTES:
            file.unlink(missing_ok=True)
            total -= size


def _is_whole(file):
    """Whether a program was written to its end: JAX neither uses nor replaces one that was not."""
    data = file.read_bytes()
    try:
        return bool(data) and (data[0] != ZLIB or bool(zlib.decompress(data)))
    except zlib.error:
        return False
