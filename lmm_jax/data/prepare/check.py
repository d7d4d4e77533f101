"""Checking rows in worker processes: every picture is opened, every conversation encoded, the order is kept."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import queue
import signal
import stat
import unicodedata
import urllib.parse

from lmm_jax.data.conversation import IMAGE_TAG, Encoded, Turn, encode
from lmm_jax.data.images import image_size, open_picture
from lmm_jax.data.prepare.parse import parse_row
from lmm_jax.data.prepare.picture_names import file_name, safe_path
from lmm_jax.data.prepare.refused import Refused

ENDINGS = (".jpg", ".jpeg", ".png")
ROWS = 16  # that a worker checks at a time; their pictures are in memory
MAX_BYTES = 1 << 28  # of a picture's file
SUFFIXES = 8  # of a path, which are looked for where it leads nowhere

PAGES = (b"<!doctype html", b"<html")  # what a web page begins with
# Words in an error's message, and the reason that is counted.
CONVERSATION_REASONS = {
    "unknown role": "unknown role",
    "expected '": "roles out of turn",
    "empty answer": "empty answer",
    "without turns": "no conversation",
    "template '": "does not fit the template",
}
PICTURE_REASONS = {
    "megapixels": "picture too large",
    "decompression bomb": "picture too large",  # in Pillow's words
    "truncated": "truncated picture",
}


@dataclasses.dataclass(frozen=True)
class Checked:
    """A row that can be used.

    Attributes:
      record: what is stored: id, images (encoded bytes), turns (role, text, kind, and in_loss where it is false).
      encoded: its conversation.
      sizes: `(width, height)` of each picture.
      digest: sha256 of the record.
      ignored: keys of the row that are ignored, see `parse.Row`.
    """

    record: dict
    encoded: Encoded
    sizes: list[tuple[int, int]]
    digest: bytes
    ignored: tuple[str, ...] = ()


def measure(record, tokenizer, template) -> Checked:
    """Encodes a record and measures its pictures, by their headers.

    Raises:
      ValueError: see `conversation.encode` and `images.image_size`.
    """
    turns = [Turn(turn["role"], turn["text"], turn.get("in_loss", True)) for turn in record["turns"]]
    lengths = [len(data) for data in record["images"]]
    digest = hashlib.sha256(json.dumps([record["id"], record["turns"], lengths]).encode())
    for data in record["images"]:
        digest.update(data)
    sizes = [image_size(data) for data in record["images"]]
    return Checked(record, encode(turns, tokenizer, template), sizes, digest.digest())


def check_row(row, number, folder, tokenizer, template, follow_links=False) -> Checked:
    """Reads, checks and encodes one row.

    Args:
      row: JSON of the row, or the dict that it is in a Parquet file.
      number: of the row in its file.
      folder: that the names of pictures are relative to, and may not leave.
      tokenizer: a `Tokenizer`.
      template: a name that `conversation.find_template` knows.
      follow_links: whether links inside the folder may lead out of it.

    Raises:
      Refused: a row that cannot be used.
    """
    row = parse_row(row, number)
    try:
        images = [_read_picture(n, image, folder, follow_links) for n, image in enumerate(row.images, start=1)]
        turns = list(map(_stored, row.turns, row.kinds))
        checked = measure({"id": row.id, "images": images, "turns": turns}, tokenizer, template)
        tags = sum(turn.text.count(IMAGE_TAG) for turn in row.turns)
        if not tags == checked.encoded.images == len(images):
            found = f"{tags} <image> tags, {checked.encoded.images} of them in what a user says"
            needed = "a user's text has one <image> for each picture"
            raise Refused("tags do not match pictures", f"{found}, {len(images)} pictures; {needed}")
        if not checked.encoded.supervised.any():
            answers = any(turn.role == "assistant" for turn in row.turns)
            raise Refused("nothing supervised", "all answers are out of the loss" if answers else "no answer")
    except Refused as error:
        raise Refused(error.reason, error.detail, row.id) from error
    except ValueError as error:
        raise Refused(_reason(error, CONVERSATION_REASONS, "unusable conversation"), str(error), row.id) from error
    return dataclasses.replace(checked, ignored=row.ignored)


def _stored(turn, kind):
    """A turn as it is stored; what is not said is as `records` completes it."""
    stored = {"role": turn.role, "text": turn.text, "kind": kind}
    return stored if turn.in_loss else stored | {"in_loss": False}


def _read_picture(number, image, folder, follow_links):
    """Bytes of the picture of a row, which opens; `image` is the name of its file, or the bytes."""
    held = isinstance(image, bytes)
    name = f"picture {number} of the row" if held else image
    data = image if held else _read_file(folder, image, follow_links)
    if len(data) > MAX_BYTES:
        raise Refused("picture too large", f"{name}: {len(data):,} bytes, at most {MAX_BYTES:,}")
    if not data:
        raise Refused("empty picture file", name)
    try:
        open_picture(data)
    except ValueError as error:
        reason = _reason(error, PICTURE_REASONS, "unreadable picture")
        is_lfs, is_page = data.startswith(b"version https://git-lfs"), data[:200].lstrip().lower().startswith(PAGES)
        said = "a pointer of Git LFS; fetch the file itself with `git lfs pull`" if is_lfs else error
        said = "a web page, not the picture; download that by its direct link" if is_page else said
        raise Refused(reason, f"{_brief(name)}: {said}") from error
    return data


def _read_file(folder, name, follow_links):
    """Bytes of a file that is not too large."""
    try:
        path = safe_path(folder, name, follow_links)
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for ever
            what = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
            raise Refused("unreadable picture", f"{name}: {what}, not a file")
        if info.st_size > MAX_BYTES:
            raise Refused("picture too large", f"{name}: {info.st_size:,} bytes, at most {MAX_BYTES:,}")
        with open(path, "rb") as f:
            return f.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused("missing picture", f"{_brief(name)} is not in {folder}{_hint(folder, name)}") from error
    except OSError as error:
        raise Refused("unreadable picture", f"{_brief(name)}: {error.strerror}") from error


def _brief(name):
    """A name of which the middle is left out if it is long."""
    return name if len(name) <= 120 else f"{name[:60]}…{name[-60:]}"


def _hint(folder, name):
    """How a picture seems to be called that is not there by its name; goes on a sentence."""
    name = file_name(name)
    above = os.path.dirname(folder)
    with contextlib.suppress(Refused, OSError):
        if os.path.isfile(safe_path(above, name)):
            return f", but in {above}; see --images"
    stem, ending = os.path.splitext(name)
    folders = name.replace("\\", "/").split("/")[-SUFFIXES:]
    spellings = [
        *(name.strip(), urllib.parse.unquote(name), *("/".join(folders[n:]) for n in range(len(folders)))),
        *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")),
        *(name.lower(), stem + ending.lower(), stem + ending.upper(), *(stem + x for x in ENDINGS)),
    ]
    for other in spellings:
        with contextlib.suppress(Refused, OSError):
            if other != name and os.path.isfile(safe_path(folder, other)):
                same = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
                what = "the same name in another form of Unicode" if same else _brief(os.path.normpath(other))
                return f"; there is {what}"
    with contextlib.suppress(Refused, OSError):
        if os.path.islink(os.path.join(folder, name)):
            return "; it is a link that leads nowhere"
    return "; folders in a name are parted by /" if "\\" in name else ""


def _reason(error, reasons, other):
    return next((reason for words, reason in reasons.items() if words in str(error).lower()), other)


def check_rows(items, folder, tokenizer, template, workers, follow_links=False):
    """Checks rows in order, a bounded number of them at a time.

    Args:
      items: iterable of `(line, row)`.
      folder, tokenizer, template, follow_links: see `check_row`.
      workers: processes; 0 checks in this one.

    Yields:
      `(line, Checked or Refused)` for each item.

    Raises:
      ChildProcessError: a worker was killed.
    """
    numbered = ((number, line, row) for number, (line, row) in enumerate(items, start=1))
    chunks = iter(lambda: list(itertools.islice(numbered, ROWS)), [])
    given = (folder, tokenizer, template, follow_links)
    if workers == 0:
        for chunk in chunks:
            yield from _check_chunk(chunk, *given)
        return
    pending = collections.deque()
    with _workers(workers, given) as ask:
        for chunk in chunks:
            pending.append(ask(chunk))
            if len(pending) > 2 * workers:  # a pool's map would read the whole file ahead
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


@contextlib.contextmanager
def _workers(count, given):
    """`ask(chunk)`, the future of a chunk's results, by `count` processes.

    Each has a pipe of its own: a process that is killed while it writes into one that is shared, as those of
    `ProcessPoolExecutor` do, keeps the lock of it, and the others wait for ever.
    """
    spawn = multiprocessing.get_context("spawn")
    idle, pipes, processes = queue.SimpleQueue(), [], []

    def ask(chunk):
        pipe = idle.get()
        try:
            pipe.send(chunk)
            return pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildProcessError(
                f"a worker process died at line {chunk[0][1]} or soon after: killed, out of memory, or by the error "
                "above? The same command starts again"
            ) from error
        finally:
            idle.put(pipe)

    threads = concurrent.futures.ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            pipes.append(ours)
            idle.put(ours)
            process = spawn.Process(target=_work, args=(theirs, *given), daemon=True)
            # A Ctrl-C reaches all processes of a terminal: those that start yet would say where, each in 30 lines.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            processes.append(process)
            theirs.close()  # so that the end of the process ends the pipe
        yield functools.partial(threads.submit, ask)
    finally:
        threads.shutdown(cancel_futures=True)
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _work(pipe, *given):
    """Checks chunks until the parent closes its end of `pipe`, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_check_chunk(pipe.recv(), *given))


def _check_chunk(chunk, *given):
    results = []
    for number, line, row in chunk:
        try:
            result = check_row(row, number, *given)
        except Refused as error:
            result = Refused(error.reason, error.detail, error.id)  # without traceback and cause
        results.append((line, result))
    return results
