"""Files of a run and of its data that may lie in a bucket (`gs://…`, extra "gcs"): what `etils.epath` leaves out."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
import threading
import time

import fsspec  # which etils opens buckets with, and so do all that depend on it
from etils import epath
from fsspec.callbacks import Callback
from tqdm import tqdm

from lmm_jax import errors

CACHE = "LMM_CACHE"  # environment variable: folder of copies and of compiled programs, see `cache_folder`
AT_ONCE = 8  # files that are copied at a time
PAUSE = 30.0  # seconds between two writes of a file of lines


def is_remote(path) -> bool:
    """Whether `path` names something in a bucket."""
    return "://" in str(path)


def is_file(path) -> bool:
    """Whether a path is a file: no folder, and no device or pipe, which may have no end; links are followed."""
    path = epath.Path(path)
    return path.exists() and not path.is_dir() if is_remote(path) else os.path.isfile(path)


def absolute(path):
    """`path` as an absolute `epath.Path`; its own `resolve` takes a bucket for a folder of the current one."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def nearest(path):
    """`path`, or the nearest of the folders above it that is there; a link counts even if it leads nowhere."""
    path = absolute(path)
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def check_place(path, flag):
    """Raises an OSError if a folder of this machine cannot be made or written to; `flag` is what named it."""
    there = nearest(path)
    if not there.is_dir():
        what = "a file, not a folder" if there.exists() else "a link that leads nowhere"
        raise NotADirectoryError(f"{flag} {path}: {there} is {what}; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK) or os.statvfs(there).f_flag & os.ST_RDONLY:
        raise PermissionError(f"{flag} {path}: {there} cannot be written to; choose another folder")


def write_text(path, text):
    """Writes a small file whole or not at all: what stood there stays until the new text is on the disk.

    Args:
      path: of the file; its folder is there.
      text: all of it.

    Raises:
      OSError: it cannot be written; the file is as it was.
    """
    path = epath.Path(path)
    if is_remote(path):  # where an object appears when all of it is there
        path.write_text(text)
        return
    part = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    sync_entry(path)


def sync_entry(path):
    """Forces the name of a file or folder to the disk; its content is forced there by `sync`."""
    if not is_remote(path):
        _force(os.path.dirname(os.path.abspath(path)))


def sync(folder):
    """Forces all files of a folder of this machine, and their names, from the system's memory to the disk."""
    if is_remote(folder):
        return
    for root, _, files in os.walk(folder):
        for name in files:
            _force(os.path.join(root, name))
        _force(root)


def _force(path):
    """Of a file, its content; of a folder, the names in it."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def files_of(folder) -> dict[str, int]:
    """Bytes of each file in a folder and the folders in it, by its path there."""
    if is_remote(folder):
        system, root = fsspec.url_to_fs(str(folder))
        return {
            path.removeprefix(f"{root}/"): about["size"] for path, about in system.find(root, detail=True).items()
        }
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def free_bytes(path, of=None) -> int:
    """Bytes that the disk of a folder has left; if its part `of` is named, its files make room for others."""
    held = () if of is None else (file.lstat().st_size for file in pathlib.Path(of).rglob("*") if file.is_file())
    return shutil.disk_usage(nearest(path)).free + sum(held)


def amount(size) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.2f} MiB"


class Lines:
    """A text file that grows by lines.

    A file in a bucket cannot grow, opened to append it is replaced: it is written whole, now and then and on `flush`.
    While a disk is full, or cannot be reached, lines are kept, and written when it can take them again.
    """

    def __init__(self, path):
        self.path, self._written = epath.Path(path), time.monotonic()
        self._waiting = ""  # lines that are not in the file yet
        self._text = None  # what is in the file, where it cannot grow; None before that is known
        self._begun = False  # whether the file is known to end with a whole line, where it can grow

    def add(self, lines):
        """Appends `lines`, without ends."""
        self._waiting += "".join(f"{line}\n" for line in lines)
        if not is_remote(self.path) or time.monotonic() - self._written >= PAUSE:
            self.flush()

    def flush(self):
        """Makes sure that all lines are in the file, unless its disk cannot take them for now."""
        try:
            self.close()
        except Exception as error:  # each store has kinds of its own
            if not errors.may_pass(error):
                raise

    def close(self):
        """Makes sure that all lines are in the file; raises OSError if they cannot be."""
        if self._waiting:
            self._replace() if is_remote(self.path) else self._append()

    def _replace(self):
        self._written = time.monotonic()  # of this try, so that a bucket that is away is not asked with every line
        if self._text is None:
            self._text = self.path.read_text() if self.path.exists() else ""
        text = self._text + self._waiting
        self.path.write_text(text)
        self._text, self._waiting = text, ""

    def _append(self):
        with open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            half = not self._begun and end and not _ends_with_a_line(self.path)  # of a process that was killed
            text = ("\n" * half + self._waiting).encode()
            try:
                if file.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        self._waiting, self._begun = "", True


def _ends_with_a_line(path):
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path) -> list[dict]:
    """The JSON objects of a file of lines; others are passed over, as a process that is killed may leave half a one.

    Raises:
      FileNotFoundError: there is no file.
    """
    rows = []
    for line in epath.Path(path).read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def local_copy(folder, key):
    """A copy on this machine of a folder in a bucket; `folder` itself if it is local.

    ArrayRecord reads files of this machine only. A copy that was interrupted goes on, by whole files; one that is
    complete is used again.

    Args:
      folder: that does not change as long as `key` is the same.
      key: what its content goes by; a text of anybody's, which names nothing here.

    Raises:
      OSError: a file that has another size here than there, or no space.
    """
    if not is_remote(folder):
        return epath.Path(folder)
    # Of a name that no key can choose: compiled programs and copies of models lie in the same cache.
    copy = cache_folder() / f"records-{hashlib.sha256(f'{folder} {key}'.encode()).hexdigest()[:32]}"
    system, root = fsspec.url_to_fs(str(folder))
    found = {path: about["size"] for path, about in system.find(root, detail=True).items()}
    names = {path: path.removeprefix(f"{root}/") for path in found}
    if led_out := [name for name in names.values() if {"", ".", ".."} & set(name.split("/"))]:
        raise OSError(f"{folder} has a file called {led_out[0]!r}, which leads out of it; copy what you need by hand")
    _fetch([(system.unstrip_protocol(path), copy / names[path], size) for path, size in found.items()], folder)
    return copy


def local_files(files) -> list[epath.Path]:
    """Copies on this machine of files in a bucket, of their names; files that are local are given back.

    One that has another size or time there than when it was copied is copied anew.
    """
    places, missing = [], []
    for file in map(epath.Path, files):
        if is_remote(file):
            there = file.stat()
            key = hashlib.sha256(f"{file} {there.length} {there.mtime}".encode()).hexdigest()[:24]
            missing.append((str(file), cache_folder() / key / file.name, there.length))
        places.append(missing[-1][1] if is_remote(file) else file)
    if missing:
        _fetch(missing, os.path.dirname(missing[0][0]))
    return places


def cache_folder() -> epath.Path:
    """Folder of what can be made again: that of LMM_CACHE, else `lmm_jax` in XDG_CACHE_HOME, which is ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return epath.Path(os.environ.get(CACHE) or f"{home}/lmm_jax").expanduser()


def _fetch(files, folder):
    """Copies what is not here yet of `(path there, file here, its size)`, all of `folder`."""
    missing = [(there, here, size) for there, here, size in files if not here.exists() or here.stat().length != size]
    if not missing:
        return
    total = sum(size for *_, size in missing)
    print(f"copying {folder} to {cache_folder()}: {len(missing)} files, {total / 1e9:.2f} GB", flush=True)
    system, _ = fsspec.url_to_fs(str(folder))
    with tqdm(desc="copying", total=total, unit="B", unit_scale=True, disable=None) as bar:
        for first in range(0, len(missing), AT_ONCE):
            _copy(system, missing[first : first + AT_ONCE], bar)


def _copy(system, files, bar):
    """Copies some files side by side; each appears under its name when all of it is here."""
    parts = [here.parent / f"{here.name}.part-{os.getpid()}" for _, here, _ in files]  # others may copy the same
    system.get([there for there, *_ in files], [str(part) for part in parts], callback=_Copying(bar))
    for (there, here, size), part in zip(files, parts, strict=True):
        if part.stat().length != size:
            raise OSError(f"{there} has {size} bytes, its copy {part} {part.stat().length}")
        part.replace(here)


class _Copying(Callback):
    """What fsspec tells of a copy of several files: shows the bytes of all on one bar."""

    def __init__(self, bar):
        super().__init__()
        self._bar = bar

    def branched(self, path_1, path_2, **kwargs):
        """The callback of one of the files."""
        return _CopyingFile(self._bar)


class _CopyingFile(Callback):
    def __init__(self, bar):
        super().__init__()
        self._bar, self._shown = bar, 0

    def call(self, hook_name=None, **kwargs):
        """fsspec calls it whenever `value`, the bytes that are here, has changed."""
        self._bar.update(self.value - self._shown)
        self._shown = self.value
