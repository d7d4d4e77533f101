"""One writer a folder: a workdir or a prepared folder is written by one process at a time.

The holder's mark is a file in the folder, `writer.json`, which says who writes there and since when. The holder
writes it anew every few seconds, so that a file that stands still belongs to a process that has ended without a word:
killed, out of memory, or on a machine that is gone. Such a file is taken over. On one machine that is known at once,
as the process is not there any more; of another machine's process it takes `PATIENCE` seconds to know.

A file is used, and not a lock of the operating system, because the folder may lie in a bucket or on a disk that
several machines share.
"""

import contextlib
import datetime
import json
import os
import platform
import threading
import time
import uuid

import fsspec
from etils import epath

from lmm_jax import storage

NAME = "writer.json"
BEAT = 10.0  # seconds after which the holder writes its mark anew
PATIENCE = 45.0  # seconds without a new mark after which a holder counts as gone
LOOK = 1.0  # seconds between two looks at another's mark


class Held(OSError):
    """Another process writes to the folder."""

    may_pass = True  # it ends some time


class Hold:
    """A folder that this process may write to, until `release`."""

    def __init__(self, path, mark):
        self._path, self._mark, self._ended = path, mark, threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    def check(self):
        """Raises Held if another process has taken the folder over, as it had seen no sign of life of this one.

        That the mark cannot be read, as a bucket cannot be reached for a moment, is no sign of another.
        """
        other = None
        with contextlib.suppress(Exception):  # each store has kinds of its own
            other = _read(self._path)
        if other is not None and other.get("token") != self._mark["token"]:
            raise Held(
                f"{_folder(self._path)} was taken over by {_who(other)}, which saw no sign of life of this process; "
                "this one stops, so that only one writes"
            )

    def release(self):
        """Takes the mark away."""
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(Exception):  # a mark that stays is taken over from
            other = _read(self._path)
            if other is not None and other.get("token") == self._mark["token"]:
                self._path.unlink()

    def _beat(self):
        while not self._ended.wait(BEAT):
            self._mark["beat"] += 1
            # A disk that is full for a moment, or a bucket that cannot be reached, is no reason to end; the next beat
            # tries again. A mark that is another's is left to `check`.
            with contextlib.suppress(Exception):
                found = _read(self._path)
                if found is not None and found.get("token") == self._mark["token"]:
                    _replace(self._path, self._mark)


@contextlib.contextmanager
def hold(folder, what, note=print):
    """Makes this process the only writer of a folder.

    Args:
      folder: to write to, of this machine or in a bucket; made if it is not there.
      what: command that writes, for whoever else wants to.
      note: called with a line if a holder that is gone is taken over from, or has to be waited for.

    Yields:
      a `Hold`.

    Raises:
      Held: another process writes there; the message says who it is and since when.
      OSError: the folder cannot be written to.
    """
    path = epath.Path(folder) / NAME
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = _mark(what)
    try:
        if not _create(path, mark):
            _take_over(path, mark, note)
    except BaseException:
        if made:
            _remove_if_empty(path.parent)
        raise
    held = Hold(path, mark)
    try:
        yield held
    finally:
        held.release()
        if made:
            _remove_if_empty(path.parent)


def _take_over(path, mark, note):
    """Replaces the mark of a holder that is gone; Held if it is not."""
    seen, since = _read(path), time.monotonic()
    said = False
    while not _is_gone(seen):
        now = _read(path)
        if now is None:  # released
            if _create(path, mark):
                return
            now = _read(path)
        if now is not None and now.get("host") == _host() and not _is_gone(now):
            raise _held(path, now)
        if now != seen and seen is not None:
            raise _held(path, now)
        seen = now
        if time.monotonic() - since > PATIENCE:
            break
        if not said:
            said = True
            note(f"{_folder(path)}: {_who(seen)} may still write there; waiting {PATIENCE:.0f} s for a sign of it")
        time.sleep(LOOK)
    note(f"{_folder(path)}: {_who(seen)} has ended without a word; taking over")
    _replace(path, mark)
    time.sleep(LOOK)  # another may take over at the same time: who wrote last has the folder
    now = _read(path)
    if now is None or now.get("token") != mark["token"]:
        raise _held(path, now)


def _mark(what):
    return {
        "what": what,
        "host": _host(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _host():
    return platform.node()


def _started(process):
    """When a process of this machine started, so that another one with its number is not taken for it.

    Linux says it in ticks since the machine's start. "" where it is not known, and of a process that has ended and is
    kept only until its parent asks for it.
    """
    try:
        with open(f"/proc/{process}/stat") as f:
            state, *fields = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _is_gone(mark):
    """Whether a mark is that of a process of this machine that is not there any more."""
    if mark is None or mark.get("host") != _host() or not isinstance(mark.get("process"), int):
        return False
    process = mark["process"]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False  # it is another user's
    return _started(process) != mark.get("started")


def _held(path, mark):
    return Held(
        f"{_folder(path)} is being written to by {_who(mark)}; wait until it has ended, or choose another folder"
    )


def _who(mark):
    if not mark or "host" not in mark:
        return "a process that left no name"
    return f"`{mark.get('what')}`, process {mark.get('process')} on {mark['host']}, since {mark.get('since')}"


def _folder(path):
    return str(path.parent)


def _read(path):
    """The mark that stands in a file; None if there is no file, {} if it is being written."""
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def _create(path, mark) -> bool:
    """Writes a mark unless there is one; whether it did."""
    text = json.dumps(mark).encode()
    if path.exists():  # not every store knows the condition below
        return False
    try:
        if storage.is_remote(path):
            system, name = fsspec.url_to_fs(str(path))
            system.pipe_file(name, text, mode="create")  # a bucket itself refuses the second of two
        else:
            with open(path, "xb") as f:
                f.write(text)
    except FileExistsError:
        return False
    return True


def _replace(path, mark):
    storage.write_text(path, json.dumps(mark))


def _remove_if_empty(folder):
    if not storage.is_remote(folder):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
