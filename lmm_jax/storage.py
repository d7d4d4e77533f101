"""Files of a run and of its data that may lie in a bucket (`gs://…`, extra "gcs"): what `etils.epath` leaves out."""

import hashlib
import os
import shutil
import time
from concurrent import futures

from etils import epath
from tqdm import tqdm

CACHE = "LMM_CACHE"  # environment variable: folder of copies, ~/.cache/lmm_jax if it is not set
AT_ONCE, PIECE = 8, 2**24  # files that are copied at a time, bytes of each
PAUSE = 30.0  # seconds between two writes of a file of lines


def is_remote(path) -> bool:
    """Whether `path` names something in a bucket."""
    return "://" in str(path)


def absolute(path):
    """`path` as an absolute `epath.Path`; its own `resolve` takes a bucket for a folder of the current one."""
    return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


class Lines:
    """A text file that grows by lines.

    A file in a bucket cannot grow, opened to append it is replaced: it is written whole, now and then and on `flush`.
    """

    def __init__(self, path):
        self.path, self._all, self._written = epath.Path(path), None, time.monotonic()

    def add(self, lines):
        """Appends `lines`, without ends."""
        text = "".join(f"{line}\n" for line in lines)
        if not is_remote(self.path):
            with self.path.open("a") as f:
                f.write(text)
            return
        if self._all is None:
            self._all = [self.path.read_text()] if self.path.exists() else []
        self._all.append(text)
        if time.monotonic() - self._written >= PAUSE:
            self.flush()

    def flush(self):
        """Makes sure that all lines are in the file."""
        if self._all:
            self._all = ["".join(self._all)]
            self.path.write_text(self._all[0])
            self._written = time.monotonic()


def local_copy(folder, key):
    """A copy on this machine of a folder in a bucket; `folder` itself if it is local.

    ArrayRecord reads files of this machine only. A copy that was interrupted goes on, by whole files; one that is
    complete is used again.

    Args:
      folder: that does not change as long as `key` is the same.
      key: name of the copy in the cache.

    Raises:
      OSError: a file that has another size here than there, or no space.
    """
    if not is_remote(folder):
        return epath.Path(folder)
    copy = _cache() / key
    _fetch([(path, copy / name, path.stat()) for name, path in _files(epath.Path(folder))], folder)
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
            missing.append((file, _cache() / key / file.name, there))
        places.append(missing[-1][1] if is_remote(file) else file)
    _fetch(missing, missing[0][0].parent if missing else "")
    return places


def _cache():
    return epath.Path(os.environ.get(CACHE) or "~/.cache/lmm_jax").expanduser()


def _fetch(files, folder):
    """Copies what is not here yet of `(file there, file here, its stat there)`, all of `folder`."""
    sizes = [(there, here, stat.length) for there, here, stat in files]
    missing = [(there, here, size) for there, here, size in sizes if not here.exists() or here.stat().length != size]
    if not missing:
        return
    total = sum(size for *_, size in missing)
    print(f"copying {folder} to {_cache()}: {len(missing)} files, {total / 1e9:.2f} GB", flush=True)
    with (
        tqdm(desc="copying", total=total, unit="B", unit_scale=True, disable=None) as bar,
        futures.ThreadPoolExecutor(AT_ONCE) as pool,
    ):
        for size in pool.map(_copy, missing):
            bar.update(size)


def _files(folder, name=""):
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files(path, f"{name}{path.name}/")
        else:
            yield f"{name}{path.name}", path


def _copy(file):
    there, here, size = file
    here.parent.mkdir(parents=True, exist_ok=True)
    part = here.parent / f"{here.name}.part-{os.getpid()}"  # another process may copy the same
    with there.open("rb") as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, PIECE)
    if part.stat().length != size:
        raise OSError(f"{there} has {size} bytes, its copy {part} {part.stat().length}")
    part.replace(here)
    return size
