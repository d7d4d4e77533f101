"""Writing a prepared folder: ArrayRecord through TFDS, without TensorFlow, and the index beside it.

OUT/prepared.json      what it is: source, builder, template, tokenizer and data fingerprints, rows, refused rows
OUT/tokenizer…         the files of the tokenizer that the counts were made with, see `lmm_jax.data.tokenizer`
OUT/index_SPLIT.npz    per row, in source order, what planning needs: see `lmm_jax.data.prepare.index`
OUT/records/           the TFDS folder
OUT/refused.jsonl      rows that were left out: file, line, id, reason, detail
OUT/example.png        of a data set: the first picture of the test split, to ask about

Until all of it is written, preparing.json stands in the place of prepared.json.
"""

import collections
import contextlib
import hashlib
import io
import itertools
import json
import os
import sys
import time

import numpy as np
from etils import epath
from tqdm import tqdm

from lmm_jax import families, storage
from lmm_jax.data.conversation import IMAGE_TAG, find_template
from lmm_jax.data.images import open_picture
from lmm_jax.data.prepare.check import check_rows, measure
from lmm_jax.data.prepare.datasets import DATASETS
from lmm_jax.data.prepare.index import Index
from lmm_jax.data.prepare.parse import Refused, open_rows, parse_row, read_items
from lmm_jax.data.tokenizer import TRAINED, load_tokenizer, tokenizer_files

QUESTION_PIECES = 128  # of the tokenizer that is trained on the questions of a data set
QUESTIONED = 2_000  # records that it is trained on, the first ones
PIECES = 8_000  # of the one that is trained where none is given
TRAINING_TEXT = 8_000_000  # characters that it is trained on, from the first rows
JUDGED = 1_000  # rows after which the share of refused ones counts
SAY_EVERY = 30.0  # seconds between progress lines where there is no terminal

# What a run writes, beside the files of a tokenizer and the indices.
WRITTEN = ("records", "example.png", "refused.jsonl", "preparing.json")


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
      FileExistsError: an `out` that holds something else.
      ValueError: no data set of that name, or a source that it cannot be made from; the message lists all faults.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set '{name}'; known are {', '.join(DATASETS)}")
    dataset, out = DATASETS[name], epath.Path(out)
    if faults := dataset.check(source):
        raise ValueError("\n  ".join(faults))
    made_from = {"dataset": name} | ({} if source is None else {"source": os.path.abspath(source)})
    if _is_finished(out, made_from):
        return summary(out)
    _begin(out)
    counts = dataset.ROWS | ({"train": rows} if rows else {})
    first = itertools.islice(dataset.records(source, "train", counts["train"]), QUESTIONED)
    lines = (turn["text"].replace(f"{IMAGE_TAG}\n", "") for record in first for turn in record["turns"])
    tokenizer = TRAINED.train(lines, QUESTION_PIECES)
    if "test" in counts:
        _write_example(out, dataset.records(source, "test", 1))

    def checked(split):
        records = dataset.records(source, split, counts[split])
        for record in tqdm(records, desc=split, total=counts[split], unit=" rows", disable=None):
            try:
                yield measure(record, tokenizer, "qa")
            except ValueError as error:
                raise ValueError(f"data set {name}, split {split}, record {record['id']}: {error}") from error

    return _write(out, name, {split: checked(split) for split in counts}, tokenizer, "qa", made_from)


def _write_example(out, records):
    """Writes the first picture of some records, if they have one, as a PNG: the same bytes if it is one."""
    pictures = [data for record in records for data in record["images"]]
    for data in pictures[:1]:
        if not data.startswith(b"\x89PNG"):
            picture = io.BytesIO()
            open_picture(data).save(picture, "png")
            data = picture.getvalue()
        (out / "example.png").write_bytes(data)


def prepare_rows(data, images, out, tokenizer=None, template=families.DEFAULT_PROMPT, workers=None, max_refused=0.05):
    """Prepares conversations of a JSON or JSONL file, as split `train`; the result does not depend on `workers`.

    Args:
      data: file of rows, see `lmm_jax.data.prepare.parse`.
      images: folder that pictures lie in, that of `data` if None.
      out: folder to write; a finished one of the same arguments is left as it is, an unfinished one starts again.
      tokenizer: its folder or file, as `load_tokenizer` takes it; if None a small one is trained on the first rows.
      template: a name that `conversation.find_template` knows.
      workers: processes that check rows, as many as there are processors if None; 0 checks in this one.
      max_refused: share of refused rows that stops the run, from the 1,000th row on.

    Returns:
      dict of counts, as `lmm prepare --json` prints it: see `summary`.

    Raises:
      OSError: a file that is not there, or an `out` that holds something else.
      ValueError: an argument out of range, an array that breaks off, too many refused rows, or none that can be used.
    """
    find_template(template)
    if not 0 <= max_refused <= 1:
        raise ValueError(f"the share of refused rows is a number from 0 to 1, not {max_refused}")
    workers = (os.cpu_count() or 1) if workers is None else workers
    if workers < 0:
        raise ValueError(f"{workers} worker processes")
    out, images = epath.Path(out), os.path.abspath(images or os.path.dirname(os.path.abspath(data)))
    if not os.path.isfile(data):
        raise FileNotFoundError(f"no file {data}")
    if not os.path.isdir(images):
        raise NotADirectoryError(f"no folder of pictures {images}")
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    with open(data, "rb") as f:
        sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    source = {
        "data": os.path.basename(data),
        "bytes": os.path.getsize(data),
        "sha256": sha256,
        "images": images,
        "tokenizer": given.fingerprint if given else "trained on the first rows",
        "template": template,
    }
    if _is_finished(out, source):
        return summary(out)
    _begin(out)
    refused = collections.Counter()
    with contextlib.ExitStack() as stack:
        f = stack.enter_context(open_rows(data))
        log = stack.enter_context((out / "refused.jsonl").open("w"))
        items = _named_errors(read_items(f), data)
        tokenizer = given or _train_on_first_rows(data)
        results = stack.enter_context(contextlib.closing(check_rows(items, images, tokenizer, template, workers)))
        usable = _usable(_watched(results, f, refused), data, log, refused, max_refused)
        return _write(out, "conversations", {"train": usable}, tokenizer, template, source, refused)


def _is_finished(out, source):
    """Whether `out` was made from `source`; FileExistsError if it was made from something else."""
    path = out / "prepared.json"
    if not path.exists():
        return False
    other = json.loads(path.read_text()).get("source", {})
    differing = [name for name in {**other, **source} if other.get(name) != source.get(name)]
    if differing:
        changes = ", ".join(f"{name} was {other.get(name)}, is {source.get(name)}" for name in differing)
        raise FileExistsError(f"{out} was prepared from something else ({changes}); choose another folder")
    print(f"{out} is finished and left as it is", file=sys.stderr)
    return True


def _begin(out):
    """Makes `out` empty but for the mark of an unfinished folder; only what a run of ours wrote is deleted."""
    if storage.is_remote(out):
        raise ValueError(f"{out}: records are written to a disk; prepare there, then copy the folder to the bucket")
    mark = out / "preparing.json"
    found = sorted(out.iterdir()) if out.exists() else []
    names = {*WRITTEN, *tokenizer_files()}
    ours = [p for p in found if mark.exists() and (p.name in names or p.match("index_*.npz"))]
    foreign = [p.name for p in found if p not in ours]
    if foreign:
        raise FileExistsError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    mark.write_text("{}\n")
    for path in ours:
        if path.is_dir():
            path.rmtree()
        elif path != mark:
            path.unlink()


def _train_on_first_rows(data):
    lines, size = [], 0
    with open_rows(data) as f:
        for number, (_, text) in enumerate(_named_errors(read_items(f), data), start=1):
            with contextlib.suppress(Refused):
                turns = parse_row(text, number).turns
                new = [line for _, text in turns for line in text.replace(IMAGE_TAG, "").splitlines() if line.strip()]
                lines += new
                size += sum(map(len, new))
            if size >= TRAINING_TEXT:
                break
    if not lines:
        raise ValueError(f"{data}: no row has text to train a tokenizer on; is it of a known layout?")
    tokenizer = TRAINED.train(lines, PIECES, byte_fallback=True)
    print(f"no --tokenizer: one of {tokenizer.vocab_size:,} pieces is trained on the first rows", file=sys.stderr)
    return tokenizer


def _named_errors(items, data):
    """`items`; what ends them early is an error of the run, with the name of the file."""
    try:
        yield from items
    except Refused as error:
        raise ValueError(f"{data}: {error}") from error


def _watched(results, f, refused):
    """`results` with a progress bar on a terminal, lines now and then elsewhere; measured in bytes of `f` read."""
    size, said = max(1, os.fstat(f.fileno()).st_size), time.monotonic()
    with tqdm(desc="preparing", total=size, unit="B", unit_scale=True, disable=None) as bar:
        for rows, result in enumerate(results, start=1):
            yield result
            if bar.disable and time.monotonic() - said >= SAY_EVERY:
                said = time.monotonic()
                share = f"{f.buffer.tell() / size:.0%} of the file"
                print(f"{rows:,} rows, {share}, {refused.total():,} refused", file=sys.stderr, flush=True)
            elif not bar.disable and rows % 32 == 0:
                bar.set_postfix(rows=rows, refused=refused.total(), refresh=False)
                bar.update(f.buffer.tell() - bar.n)
        bar.update(size - bar.n)


def _usable(results, data, log, refused, max_refused):
    """Yields what was not refused; counts and logs what was."""
    seen, total = 0, 0
    for seen, (line, result) in enumerate(results, start=1):
        if isinstance(result, Refused):
            total += 1
            refused[result.reason] += 1
            about = {"file": str(data), "line": line, "id": result.id, "reason": result.reason}
            log.write(json.dumps({**about, "detail": result.detail[:300]}) + "\n")
        if seen >= JUDGED and total > max_refused * seen:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common(3))
            raise ValueError(
                f"{data}: {total:,} of the first {seen:,} rows refused, more than a share of {max_refused} "
                f"(--max-refused): {reasons}; each is listed in {log.name}"
            )
        if not isinstance(result, Refused):
            yield result
    if seen == total:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common(3)) or "it has no rows"
        raise ValueError(f"{data}: no row can be used: {reasons}; each is listed in {log.name}")


def _write(out, name, splits, tokenizer, template, source, refused=None):
    """Writes the folder's files, last of all `prepared.json`.

    Args:
      out: folder of an unfinished preparation.
      name: of the data set.
      splits: `{split: iterable of Checked}`, read once, in order.
      tokenizer, template: that the rows were checked with.
      source: what the folder is made from.
      refused: count of each reason, filled while `splits` are read.
    """
    from lmm_jax.data.prepare.records import write_records

    tokenizer.save(out)
    indices = {split: Index() for split in splits}
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {template}".encode())

    def records(split):
        digest.update(f" {split} ".encode())
        for checked in splits[split]:
            indices[split].add(checked.encoded, checked.sizes)
            digest.update(checked.digest)
            yield checked.record

    builder = write_records(out / "records", name, {split: records(split) for split in splits})
    counts = {}
    for split, index in indices.items():
        arrays = index.arrays()
        with (out / f"index_{split}.npz").open("wb") as f:
            np.savez(f, **arrays)
        counts[split] = {"rows": len(arrays["turn_offsets"]) - 1, "images": len(arrays["image_sizes"])}
    about = {
        "source": source,
        "builder": builder,
        "template": template,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "splits": counts,
        "refused": dict(sorted((refused or {}).items())),
    }
    (out / "preparing.json").write_text(json.dumps(about, indent=1) + "\n")
    (out / "preparing.json").rename(out / "prepared.json")
    return summary(out)


def summary(out) -> dict:
    """What a finished folder holds, over all splits.

    Returns:
      dict: `rows`, `images`, `refused` (count of each reason), `tokens` of a row without pictures (mean, median, p95,
      longest), and `pictures`, the number of rows for each number of pictures.
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
        "refused": about["refused"],
        "tokens": {
            "mean": round(float(tokens.mean()), 1),
            "median": int(np.median(tokens)),
            "p95": int(np.percentile(tokens, 95)),
            "longest": int(tokens.max()),
        },
        "pictures": {str(n): int(count) for n, count in zip(*np.unique(pictures, return_counts=True), strict=True)},
    }


def report(out, counts) -> str:
    """A `summary` of folder `out` in words."""
    refused = [f"  {count:,} {reason}" for reason, count in counts["refused"].items()]
    where = [f"  each is listed in {epath.Path(out) / 'refused.jsonl'}"] if refused else []
    tokens = counts["tokens"]
    pictures = ", ".join(f"{n}: {rows:,}" for n, rows in counts["pictures"].items())
    return "\n".join(
        [
            f"{out}: {counts['rows']:,} rows, {counts['images']:,} images",
            f"text tokens a row: mean {tokens['mean']:,}, half have up to {tokens['median']:,}, "
            f"95 % up to {tokens['p95']:,}, longest {tokens['longest']:,}",
            f"rows by number of pictures: {pictures}",
            f"refused: {sum(counts['refused'].values()) or 'none'}",
            *refused,
            *where,
        ]
    )
