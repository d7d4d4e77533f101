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
import hashlib
import io
import itertools
import json
import math
import os
import sys
import time

import numpy as np
from etils import epath
from tqdm import tqdm

from lmm_jax import families
from lmm_jax.data import digests
from lmm_jax.data.conversation import IMAGE_TAG, check_template, names_key, structural_pieces
from lmm_jax.data.images import open_picture
from lmm_jax.data.prepare.check import check_rows, measure
from lmm_jax.data.prepare.datasets import DATASETS
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepare.layouts import open_rows
from lmm_jax.data.prepare.out import check_finished, check_out, check_space, is_finished, writing
from lmm_jax.data.prepare.refused import Refused
from lmm_jax.data.prepare.splits import SPLITS, TEST, TRAIN, UNUSABLE, VALIDATION, parse_amount
from lmm_jax.data.prepare.summary import summary
from lmm_jax.data.prepare.survey import find_files, flag_of, items_of, most_of, survey_file
from lmm_jax.data.tokenizer import TRAINED, load_tokenizer

QUESTION_PIECES = 128  # of the tokenizer that is trained on the questions of a data set
QUESTIONED = 2_000  # records that it is trained on, the first ones
PIECES = 8_000  # of the one that is trained where none is given
JUDGED = 1_000  # rows after which the share of refused ones counts
LISTED = 100  # keys that are ignored, the most frequent ones
SAY_EVERY = 30.0  # seconds between progress lines where there is no terminal


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
    check_out(out)
    if is_finished(out, made_from):
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

    with writing(out) as held:
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
        given = [f"--{name}" for name, value in amounts.items()] + [flag_of(split) for split in list(paths)[1:]]
        raise ValueError(f"{' and '.join(given)}: either numbers of the rows of --data, or a file for each split")
    files = find_files(paths, images, SPLITS if len(paths) == 1 and not amounts else (TRAIN,))
    out = epath.Path(out)
    given = None if tokenizer is None else _given_tokenizer(tokenizer, template)
    check_out(out)
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
        **names_key(template),
        **({"follow_links": True} if follow_links else {}),
        **amounts,
        **{
            f"{file.split}_data": about | {"images": file.images}
            for file, about in zip(files[1:], abouts[1:], strict=True)
        },
    }
    if is_finished(out, source):
        check_finished(out, template)
        return summary(out)
    surveys = [survey_file(file, amounts) for file in files]
    check_space(out, sum(survey.bytes for survey in surveys))
    tokenizer = given or _train_on_first_rows(files[0], surveys[0], template)
    check_template(tokenizer, template)
    refused, ignored = collections.Counter(), collections.Counter()

    def usable(log):
        for file, survey in zip(files, surveys, strict=True):
            with open_rows(file.path) as f:
                items = ((line, row) for _, line, row in items_of(f, file.path))
                results = check_rows(items, file.images, tokenizer, template, workers, follow_links)
                with contextlib.closing(results):
                    yield from _usable(_watched(results, f, refused), file, survey.splits, log, refused, max_refused)
                ignored.update(f.ignored)

    splits = [split for n, split in enumerate(SPLITS) if any((survey.splits == n).any() for survey in surveys)]
    with writing(out) as held, (out / "refused.jsonl").open("w") as log:
        rows = usable(log)
        with contextlib.closing(rows):
            return _write(out, "conversations", splits, rows, tokenizer, template, source, held, refused, ignored)


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
      file: the `RowsFile`.
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
                f"{max_refused} (--max-refused): {most_of(reasons)}; the first is {first[0]}. Each is listed in "
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
        problem = most_of(reasons) or "it has no rows"
        problem += f"; the first is {first[0]}" if first else ""
        raise ValueError(f"{file.path}: no row can be used: {problem}. Each is listed in {log.name}")
    judge("")


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
    of_split = {split: bytearray() for split in splits}  # 32 bytes a row
    of_rows = collections.Counter()

    def records():
        for split, checked in rows:
            indices[split].add(checked.encoded, checked.sizes)
            of_split[split] += checked.digest
            of_rows.update(checked.ignored)
            yield split, checked.record

    builder = write_records(out / "records", name, splits, records())
    held.check()
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {template}".encode())
    counts = {}
    for split, index in indices.items():
        digest.update(f" {split} ".encode() + of_split[split])
        arrays = index.arrays()
        counts[split] = {"rows": len(arrays["turn_offsets"]) - 1, "images": len(arrays["image_sizes"])}
        if not counts[split]["rows"]:
            raise ValueError(f"{out}: all rows of split '{split}' were refused, see {out / 'refused.jsonl'}")
        with (out / f"index_{split}.npz").open("wb") as f:
            np.savez(f, **arrays)
    read = [out / f"index_{split}.npz" for split in indices]
    read += sorted(path for path in (out / "records" / builder).iterdir())
    about = {
        "source": source,
        "builder": builder,
        "template": template,
        **names_key(template),
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "splits": counts,
        "refused": dict(sorted((refused or {}).items())),
        "ignored": _most_frequent(of_rows + collections.Counter(ignored)),
        digests.FILES: digests.digests(out, read),
    }
    (out / "preparing.json").write_text(json.dumps(digests.sealed(about), indent=1) + "\n")
    (out / "preparing.json").rename(out / "prepared.json")
    return summary(out)


def _most_frequent(ignored):
    """`{key: count}` of the keys that are ignored most, in order of their counts and names."""
    return dict(sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:LISTED])
