"""Writing a prepared folder: ArrayRecord through TFDS, without TensorFlow, and the index beside it.

OUT/prepared.json      what it is: source, builder, template, tokenizer and data fingerprints, rows, refused rows
OUT/tokenizer…         the files of the tokenizer that the counts were made with, see `lmm_jax.data.tokenizer`
OUT/index_SPLIT.npz    per row, in source order, what planning needs: see `lmm_jax.data.prepare.index`
OUT/records/           the TFDS folder
OUT/refused.jsonl      rows that were left out: file, line, id, reason, detail
OUT/example.png        of a data set: the first picture of the test split, to ask about

Rows are read twice. The first time says which split each row goes to, how much will be written, and what a tokenizer
is trained on; whatever is wrong with the arguments, the file's layout or the disk is said by then, and nothing is
written. The second time opens the pictures and writes. Until all of it is written, preparing.json stands in the place
of prepared.json, and writer.json says who writes.
"""

import collections
import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import sys
import time

import numpy as np
from etils import epath
from tqdm import tqdm

from lmm_jax import families, lock, storage
from lmm_jax.data.conversation import IMAGE_TAG, check_template, structural_pieces
from lmm_jax.data.images import open_picture
from lmm_jax.data.prepare.check import MAX_BYTES, check_rows, measure
from lmm_jax.data.prepare.datasets import DATASETS
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepare.layouts import open_rows, read_items
from lmm_jax.data.prepare.parse import Refused, file_name, parse_row
from lmm_jax.data.prepare.splits import SPLITS, TEST, TRAIN, UNUSABLE, VALIDATION, Keys, assign, parse_amount
from lmm_jax.data.tokenizer import TRAINED, load_tokenizer, tokenizer_files

QUESTION_PIECES = 128  # of the tokenizer that is trained on the questions of a data set
QUESTIONED = 2_000  # records that it is trained on, the first ones
PIECES = 8_000  # of the one that is trained where none is given
TRAINING_TEXT = 8_000_000  # characters that it is trained on, from the first rows
JUDGED = 1_000  # rows after which the share of refused ones counts
LISTED = 100  # keys that are ignored, the most frequent ones
SAY_EVERY = 30.0  # seconds between progress lines where there is no terminal

# What a run writes, beside the files of a tokenizer and the indices.
WRITTEN = ("records", "example.png", "refused.jsonl", "preparing.json")
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors of a disk without room


def prepare_dataset(name, out, rows=None, source=None):
    """Prepares a data set of `DATASETS`, with a tokenizer trained on its questions.

    Args:
      name: in `DATASETS`.
      out: folder to write; a finished one of the same arguments is left as it is.
      rows: training rows, the data set's `ROWS` if None.
      source: folder that it is made from, for one that does not bring its own.

    Returns:
      dict of counts, as `lmm prepare --json` prints it: see `summary`.

    Raises:
      OSError: an `out` that holds something else, that another process writes to, or that cannot be written.
      ValueError: no data set of that name, or a source that it cannot be made from; the message lists all faults.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set '{name}'; known are {', '.join(DATASETS)}")
    if rows is not None and rows < 1:
        raise ValueError(f"--rows {rows}: expected the number of training rows, 1 or more")
    dataset, out = DATASETS[name], epath.Path(out)
    if faults := dataset.check(source):
        raise ValueError("\n  ".join(faults))
    made_from = {"dataset": name} | ({} if source is None else {"source": os.path.abspath(source)})
    _check_out(out)
    if _is_finished(out, made_from):
        return summary(out)
    counts = dataset.ROWS | ({"train": rows} if rows else {})
    first = itertools.islice(dataset.records(source, "train", counts["train"]), QUESTIONED)
    lines = (turn["text"].replace(f"{IMAGE_TAG}\n", "") for record in first for turn in record["turns"])
    tokenizer = TRAINED.train(lines, QUESTION_PIECES)
    check_template(tokenizer, "qa")

    def checked():
        for split, number in counts.items():
            records = dataset.records(source, split, number)
            for record in tqdm(records, desc=split, total=number, unit=" rows", disable=None):
                try:
                    yield split, measure(record, tokenizer, "qa")
                except ValueError as error:
                    raise ValueError(f"data set {name}, split {split}, record {record['id']}: {error}") from error

    with _writing(out) as held:
        if TEST in counts:
            _write_example(out, dataset.records(source, TEST, 1))
        return _write(out, name, tuple(counts), checked(), tokenizer, "qa", made_from, held)


def _write_example(out, records):
    """Writes the first picture of some records, if they have one, as a PNG: the same bytes if it is one."""
    pictures = [data for record in records for data in record["images"]]
    for data in pictures[:1]:
        if not data.startswith(b"\x89PNG"):
            picture = io.BytesIO()
            open_picture(data).save(picture, "png")
            data = picture.getvalue()
        (out / "example.png").write_bytes(data)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file of rows.

    Attributes:
      flag: that named it.
      path: of it.
      images: folder that its pictures lie in.
      split: that its rows go to.
      may_name: splits that its rows may name for themselves.
    """

    flag: str
    path: str
    images: str
    split: str
    may_name: tuple[str, ...]

    def check_split(self, split, line):
        """ValueError if the file may not name a split, None if it names none."""
        if split is not None and split not in self.may_name:
            raise ValueError(
                f"{self.path}, line {line}: the file has a split '{split}', and {self.flag} can have "
                f"{', '.join(self.may_name)} here; rename it, give each split a file of its own, or leave out "
                "what says something else"
            )

    def about(self) -> dict:
        """What tells that it is the same file."""
        with open(self.path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        return {"data": os.path.basename(self.path), "bytes": os.path.getsize(self.path), "sha256": sha256}


def prepare_rows(
    data,
    images,
    out,
    tokenizer=None,
    template=families.DEFAULT_PROMPT,
    workers=None,
    max_refused=0.05,
    follow_links=False,
    validation=None,
    test=None,
    validation_data=None,
    test_data=None,
):
    """Prepares conversations of a file, or of one for each split; the result does not depend on `workers`.

    Args:
      data: file of rows, see `lmm_jax.data.prepare.layouts` and `lmm_jax.data.prepare.parse`.
      images: folder that pictures lie in, that of each file if None.
      out: folder to write; a finished one of the same arguments is left as it is, an unfinished one starts again.
      tokenizer: its folder or file, as `load_tokenizer` takes it; if None a small one is trained on the first rows.
      template: a name that `conversation.find_template` knows.
      workers: processes that check rows, as many as there are processors if None; 0 checks in this one.
      max_refused: share of a file's rows, rounded up to whole rows, of which more refused ones stop the run; judged
        from the 1,000th row on, and at the end.
      follow_links: whether links among the pictures may lead out of their folder.
      validation, test: rows of `data` that are kept from training, a number or a share: see `splits.assign`.
      validation_data, test_data: files of rows to validate and test with, instead.

    Returns:
      dict of counts, as `lmm prepare --json` prints it: see `summary`.

    Raises:
      OSError: a file that is not there, an `out` that holds something else, that another process writes to, or that
        cannot be written, or a disk without room.
      ValueError: an argument out of range, a template that does not fit the tokenizer, a file of no known layout, too
        many refused rows, or none that can be used.
    """
    if template not in families.prompts():
        raise ValueError(f"--template: no template {template!r}; known are {', '.join(families.prompts())}")
    named = {"--images": images, "--out": out, "--tokenizer": tokenizer, "--data": data}
    named |= {"--validation-data": validation_data, "--test-data": test_data}
    if empty := [flag for flag, path in named.items() if path is not None and not str(path).strip()]:
        raise ValueError(f"{empty[0]} is empty; name a file or folder, or leave {empty[0]} out")
    if not 0 <= max_refused <= 1:
        raise ValueError(f"the share of refused rows (--max-refused) is a number from 0 to 1, not {max_refused}")
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 0:
        raise ValueError(f"--workers: {workers} worker processes; 0 or more can check rows")
    amounts = {VALIDATION: validation, TEST: test}
    amounts = {split: parse_amount(f"--{split}", amount) for split, amount in amounts.items() if amount is not None}
    paths = {TRAIN: data, VALIDATION: validation_data, TEST: test_data}
    paths = {split: path for split, path in paths.items() if path is not None}
    if amounts and len(paths) > 1:
        given = [f"--{name}" for name, value in amounts.items()] + [_flag(split) for split in list(paths)[1:]]
        raise ValueError(f"{' and '.join(given)}: either numbers of the rows of --data, or a file for each split")
    files = _files(paths, images, SPLITS if len(paths) == 1 and not amounts else (TRAIN,))
    out = epath.Path(out)
    given = None if tokenizer is None else _given_tokenizer(tokenizer, template)
    _check_out(out)
    abouts = [file.about() for file in files]
    for n, about in enumerate(abouts):
        same = next(
            (other for other, found in zip(files, abouts[:n], strict=False) if found["sha256"] == about["sha256"]),
            None,
        )
        if same:
            raise ValueError(
                f"{files[n].flag} {files[n].path} holds the same as {same.flag} {same.path}: a score of rows "
                "that are trained on says nothing; name others, or keep some back by --validation and --test"
            )
    source = abouts[0] | {
        "images": files[0].images,
        "tokenizer": given.fingerprint if given else "trained on the first rows",
        "template": template,
        **({"follow_links": True} if follow_links else {}),
        **amounts,
        **{
            f"{file.split}_data": about | {"images": file.images}
            for file, about in zip(files[1:], abouts[1:], strict=True)
        },
    }
    if _is_finished(out, source):
        _check_finished(out, template)
        return summary(out)
    surveys = [_survey(file, amounts) for file in files]
    _check_space(out, sum(survey.bytes for survey in surveys))
    tokenizer = given or _train_on_first_rows(files[0], surveys[0], template)
    check_template(tokenizer, template)
    refused, ignored = collections.Counter(), collections.Counter()

    def usable(log):
        for file, survey in zip(files, surveys, strict=True):
            with open_rows(file.path) as f:
                items = ((line, row) for _, line, row in _items(f, file.path))
                results = check_rows(items, file.images, tokenizer, template, workers, follow_links)
                with contextlib.closing(results):
                    yield from _usable(_watched(results, f, refused), file, survey.splits, log, refused, max_refused)
                ignored.update(f.ignored)

    splits = [split for n, split in enumerate(SPLITS) if any((survey.splits == n).any() for survey in surveys)]
    with _writing(out) as held, (out / "refused.jsonl").open("w") as log:
        rows = usable(log)
        with contextlib.closing(rows):
            return _write(out, "conversations", splits, rows, tokenizer, template, source, held, refused, ignored)


def _flag(split):
    """The argument that names the file of a split."""
    return "--data" if split == TRAIN else f"--{split}-data"


def _files(paths, images, may_name):
    """A `_File` for each split of `paths`; `may_name` are the splits that rows of the first may name.

    Raises:
      OSError: a file that is not there or cannot be read, or no folder of pictures.
    """
    files = []
    for split, path in paths.items():
        flag = _flag(split)
        if os.path.isdir(path):
            raise IsADirectoryError(f"{flag} {path} is a folder; name the file of rows in it")
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(
                f"{flag} {path} is a pipe or a device, which cannot be read twice; write it to a file first"
            )
        if not os.path.isfile(path):
            url = "; download it first" if "://" in str(path) else ""
            link = " (a link that leads nowhere)" if os.path.islink(path) else ""
            raise FileNotFoundError(f"{flag}: no file {path}{link}{url}")
        if not os.access(path, os.R_OK):
            raise PermissionError(f"{flag} {path} cannot be read: permission denied")
        folder = os.path.abspath(images or os.path.dirname(os.path.abspath(path)))
        if not os.path.isdir(folder):
            what = f"{folder} is a file, not the folder of the pictures"
            raise NotADirectoryError(
                f"--images: {what if os.path.exists(folder) else f'no folder of pictures {folder}'}"
            )
        files.append(_File(flag, str(path), folder, split, may_name if split == TRAIN else (split,)))
    return files


def _given_tokenizer(path, template):
    """The tokenizer that `--tokenizer` names, which fits the template."""
    try:
        tokenizer = load_tokenizer(path)
        check_template(tokenizer, template)
    except OSError as error:
        raise OSError(f"--tokenizer: {error}") from error
    except ValueError as error:
        raise ValueError(f"--tokenizer {path}: {error}") from error
    return tokenizer


@dataclasses.dataclass
class _Survey:
    """What is known of a file before anything is written.

    Attributes:
      splits: of each row, see `splits.assign`.
      texts: lines of the first rows, as `(row, lines)`.
      bytes: of what will be stored, about.
    """

    splits: np.ndarray
    texts: list
    bytes: int


def _survey(file, amounts) -> _Survey:
    """Reads all rows of a file, without opening pictures.

    Raises:
      ValueError: none of them can be used, none is left to train on, or the file names splits that it may not.
    """
    keys, splits, texts, size, characters = Keys(file.images), bytearray(), [], 0, 0
    reasons, first = collections.Counter(), ""
    with open_rows(file.path) as f:
        items = tqdm(_items(f, file.path), desc="reading", unit=" rows", disable=None)
        for number, (split, line, given) in enumerate(items, start=1):
            file.check_split(split, line)
            try:
                row = parse_row(given, number)
            except Refused as error:
                keys.add_unusable()
                splits.append(UNUSABLE)
                reasons[error.reason] += 1
                first = first or f"line {line}: {error}"
                continue
            file.check_split(row.split, line)
            if split and row.split and split != row.split:
                raise ValueError(
                    f"{file.path}, line {line}: a row of the list '{split}' has split '{row.split}'; leave one out"
                )
            splits.append(SPLITS.index(split or row.split or file.split))
            if amounts:
                keys.add(row.id, row.images)
            size += sum(len(turn.text) for turn in row.turns) + sum(_size(file.images, image) for image in row.images)
            if characters < TRAINING_TEXT:
                said = [turn.text.replace(IMAGE_TAG, "").splitlines() for turn in row.turns]
                lines = [line for turn in said for line in turn if line.strip()]
                texts.append((number - 1, lines))
                characters += sum(map(len, lines))
    splits = np.array(splits, np.uint8)
    if (splits == UNUSABLE).all():
        problem = f"{_most(reasons)}; the first is {first}" if reasons else "it has none"
        raise ValueError(f"{file.path}: no row can be used: {problem}")
    if not (splits == SPLITS.index(file.split)).any():
        raise ValueError(f"{file.path}: no row is of split '{file.split}', of which there must be some")
    if amounts:
        splits = assign(keys, amounts.get(VALIDATION), amounts.get(TEST), file.path)
        for split, amount in amounts.items():
            found = int((splits == SPLITS.index(split)).sum())
            if isinstance(amount, int) and found < amount:
                print(
                    f"--{split} {amount}: {found} rows, as rows that share a picture stay together", file=sys.stderr
                )
    return _Survey(splits, texts, size)


def _size(folder, image) -> int:
    """Bytes of a picture, 0 if it is not there or too large: why it cannot be used is said later."""
    if isinstance(image, bytes):
        return len(image)
    try:
        size = os.path.getsize(os.path.join(folder, file_name(image)))
    except (OSError, ValueError):
        return 0
    return size if size <= MAX_BYTES else 0


def _is_finished(out, source):
    """Whether `out` was made from `source`; FileExistsError if it was made from something else."""
    path = out / "prepared.json"
    if not path.exists():
        return False
    try:
        other = json.loads(path.read_text()).get("source", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what `lmm prepare` writes ({error}); choose another folder") from error
    differing = [name for name in {**other, **source} if other.get(name) != source.get(name)]
    if differing:
        told = [name for name in differing if name not in ("bytes", "sha256")]
        changes = ", ".join(f"{name} was {other.get(name)}, is {source.get(name)}" for name in told)
        changes = changes or f"what {source.get('data')} holds has changed"
        raise FileExistsError(f"{out} was prepared from something else ({changes}); choose another folder")
    print(f"{out} is finished and left as it is", file=sys.stderr)
    return True


def _check_finished(out, template):
    """ValueError if the tokenizer of a finished folder lacks pieces of its template, as earlier versions allowed."""
    try:
        check_template(load_tokenizer(out), template)
    except ValueError as error:
        raise ValueError(f"{out} was prepared with an earlier version: {error}; prepare into a new folder") from error


def _check_out(out):
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
    there = _nearest(out)
    if not there.is_dir():
        what = "a file, not a folder" if there.exists() else "a link that leads nowhere"
        raise NotADirectoryError(f"--out {out}: {there} is {what}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: nothing can be written to {there}, it is read-only for this user")
    if out.exists():
        _ours(out)
        if (out / lock.NAME).exists():  # whoever waits for a long file to be read would rather know now
            with _holding(out):
                pass


def _nearest(path):
    """`path`, or the nearest of the folders above it that is there."""
    path = storage.absolute(path)
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def _check_space(out, size):
    """OSError if the disk of `out` has less than `size` bytes left, beside those of an unfinished preparation."""
    there = _nearest(out)
    found = sum(p.lstat().st_size for p in pathlib.Path(there).rglob("*")) if out.exists() else 0
    free = shutil.disk_usage(there).free + found
    if size > free:
        raise OSError(
            f"--out {out}: rows and pictures take {_amount(size)}, and {_amount(free)} are free there; make "
            "room, or choose a folder on another disk"
        )


def _amount(size):
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


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
def _writing(out):
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


def _train_on_first_rows(file, survey, template):
    """A tokenizer that is trained on the first rows of a file, of those that are trained on."""
    train = SPLITS.index(TRAIN)
    lines = [line for row, lines in survey.texts if survey.splits[row] == train for line in lines]
    if not lines:
        raise ValueError(f"{file.path}: no row has text to train a tokenizer on; is it of a known layout?")
    try:
        tokenizer = TRAINED.train(lines, PIECES, byte_fallback=True, markers=structural_pieces(template))
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}; name a tokenizer with --tokenizer") from error
    print(f"no --tokenizer: one of {tokenizer.vocab_size:,} pieces is trained on the first rows", file=sys.stderr)
    return tokenizer


def _items(f, path):
    """`(split, line, row)` of each row; what ends them early is an error of the run, with the name of the file."""
    try:
        yield from read_items(f)
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error


def _watched(results, f, refused):
    """`results` with a progress bar on a terminal, lines now and then elsewhere; measured in bytes of `f` read."""
    size, said = max(1, f.size), time.monotonic()
    with tqdm(desc="preparing", total=size, unit="B", unit_scale=True, disable=None) as bar:
        for rows, result in enumerate(results, start=1):
            yield result
            if bar.disable and time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                share = f"{f.position() / size:.0%} of the file"
                print(f"{rows:,} rows, {share}, {refused.total():,} refused", file=sys.stderr, flush=True)
            elif not bar.disable and rows % 32 == 0:
                bar.set_postfix(rows=rows, refused=refused.total(), refresh=False)
                bar.update(f.position() - bar.n)
        bar.update(size - bar.n)


def _usable(results, file, splits, log, refused, max_refused):
    """Yields `(split, Checked)` of what was not refused; counts and logs what was.

    Args:
      results: `(line, Checked or Refused)` of each row.
      file: the `_File`.
      splits: of each row, see `splits.assign`.
      log: file of lines.
      refused: count of each reason over all files.
      max_refused: see `prepare_rows`.
    """
    seen, reasons, first = 0, collections.Counter(), []

    def judge(which):
        if reasons.total() > math.ceil(max_refused * seen - 1e-9):
            raise ValueError(
                f"{file.path}: {reasons.total():,} of {which}{seen:,} rows refused, more than a share of "
                f"{max_refused} (--max-refused): {_most(reasons)}; the first is {first[0]}. Each is listed in "
                f"{log.name}. Mend them, or allow as many with --max-refused "
                f"{math.ceil(100 * reasons.total() / seen) / 100}"
            )

    for line, result in results:
        seen += 1
        if isinstance(result, Refused):
            reasons[result.reason] += 1
            refused[result.reason] += 1
            first += [] if first else [f"line {line}: {result}"[:300]]
            about = {"file": file.path, "line": line, "id": result.id, "reason": result.reason}
            log.write(json.dumps({**about, "detail": result.detail[:300]}) + "\n")
        if seen >= JUDGED:
            judge("the first ")
        if not isinstance(result, Refused):
            if seen > len(splits) or splits[seen - 1] == UNUSABLE:
                raise ValueError(f"{file.path} has changed while it was read; the same command starts again")
            yield SPLITS[splits[seen - 1]], result
    if seen == reasons.total():
        problem = _most(reasons) or "it has no rows"
        problem += f"; the first is {first[0]}" if first else ""
        raise ValueError(f"{file.path}: no row can be used: {problem}. Each is listed in {log.name}")
    judge("")


def _most(reasons):
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))


def _write(out, name, splits, rows, tokenizer, template, source, held, refused=None, ignored=()):
    """Writes the folder's files, last of all `prepared.json`.

    Args:
      out: folder of an unfinished preparation.
      name: of the data set.
      splits: their names, in the order in which they are listed.
      rows: iterable of `(split, Checked)`, read once, in order.
      tokenizer, template: that the rows were checked with.
      source: what the folder is made from.
      held: the `lock.Hold` of the folder.
      refused: count of each reason, filled while `rows` are read.
      ignored: count of each key of a file that is ignored, filled likewise; those of its rows are added.
    """
    from lmm_jax.data.prepare.records import write_records

    tokenizer.save(out)
    indices = {split: Index() for split in splits}
    digests = {split: bytearray() for split in splits}  # 32 bytes a row
    of_rows = collections.Counter()

    def records():
        for split, checked in rows:
            indices[split].add(checked.encoded, checked.sizes)
            digests[split] += checked.digest
            of_rows.update(checked.ignored)
            yield split, checked.record

    builder = write_records(out / "records", name, splits, records())
    held.check()
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {template}".encode())
    counts = {}
    for split, index in indices.items():
        digest.update(f" {split} ".encode() + digests[split])
        arrays = index.arrays()
        counts[split] = {"rows": len(arrays["turn_offsets"]) - 1, "images": len(arrays["image_sizes"])}
        if not counts[split]["rows"]:
            raise ValueError(f"{out}: all rows of split '{split}' were refused, see {out / 'refused.jsonl'}")
        with (out / f"index_{split}.npz").open("wb") as f:
            np.savez(f, **arrays)
    about = {
        "source": source,
        "builder": builder,
        "template": template,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "splits": counts,
        "refused": dict(sorted((refused or {}).items())),
        "ignored": _most_frequent(of_rows + collections.Counter(ignored)),
    }
    (out / "preparing.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "preparing.json").rename(out / "prepared.json")
    return summary(out)


def _most_frequent(ignored):
    """`{key: count}` of the keys that are ignored most, in order of their counts and names."""
    return dict(sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:LISTED])


def summary(out) -> dict:
    """What a finished folder holds, over all splits.

    Returns:
      dict: `rows`, `images`, `splits` (rows and images of each), `refused` (count of each reason), `ignored` (count
      of each key, see `parse.Row`), `tokens` of a row without pictures (mean, median, p95, longest), and `pictures`,
      the number of rows for each number of pictures.
    """
    out = epath.Path(out)
    about = json.loads((out / "prepared.json").read_text())
    tokens, pictures = [], []
    for split in about["splits"]:
        with (out / f"index_{split}.npz").open("rb") as f, np.load(f) as index:
            tokens.append(index["turn_tokens"][index["turn_offsets"][1:] - 1])
            pictures.append(np.diff(index["image_offsets"]))
    tokens, pictures = np.concatenate(tokens), np.concatenate(pictures)
    splits = about["splits"].values()
    return {
        "rows": sum(s["rows"] for s in splits),
        "images": sum(s["images"] for s in splits),
        "splits": about["splits"],
        "refused": about["refused"],
        "ignored": about.get("ignored", {}),  # which folders of earlier versions lack
        "tokens": {
            "mean": round(float(tokens.mean()), 1),
            "median": int(np.median(tokens)),
            "p95": int(np.percentile(tokens, 95)),
            "longest": int(tokens.max()),
        },
        "pictures": {str(n): int(count) for n, count in zip(*np.unique(pictures, return_counts=True), strict=True)},
    }


def _printable(text):
    """A text of any origin for a terminal: what is not printable, such as an escape, is spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def report(out, counts) -> str:
    """A `summary` of folder `out` in words."""
    refused = [f"  {count:,} {reason}" for reason, count in counts["refused"].items()]
    left_out = sum(counts["refused"].values())
    share = f"{left_out:,} of {left_out + counts['rows']:,} rows" if left_out else "none"
    where = [f"  each is listed in {epath.Path(out) / 'refused.jsonl'}"] if refused else []
    ignored = ", ".join(f"{_printable(key[:80])} {count:,}" for key, count in counts["ignored"].items())
    tokens = counts["tokens"]
    pictures = ", ".join(f"{n} in {rows:,} rows" for n, rows in counts["pictures"].items())
    return "\n".join(
        [
            f"{out}: {counts['rows']:,} rows, {counts['images']:,} images",
            *(f"  {split}: {n['rows']:,} rows, {n['images']:,} images" for split, n in counts["splits"].items()),
            f"text tokens a row: mean {tokens['mean']:,}, half have up to {tokens['median']:,}, "
            f"95 % up to {tokens['p95']:,}, longest {tokens['longest']:,}",
            f"pictures a row: {pictures}",
            f"refused: {share}",
            *refused,
            *where,
            *([f"ignored keys: {ignored}"] if ignored else []),
        ]
    )
