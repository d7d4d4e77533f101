"""Writing a prepared folder: ArrayRecord through TFDS, without TensorFlow, and the index beside it.

OUT/prepared.json      what it is: builder, template, tokenizer and data fingerprints, rows
OUT/tokenizer.model    the tokenizer that the counts were made with, its settings in tokenizer_config.json
OUT/example.png        a picture of the test split, to ask about
OUT/index_SPLIT.npz    per row, in source order, what planning needs: see `lmm_jax.data.index`
OUT/records/           the TFDS folder
"""

import hashlib
import json
import sys

import numpy as np
from etils import epath
from tqdm import tqdm

from lmm_jax.data.conversation import encode
from lmm_jax.data.images import image_size
from lmm_jax.data.index import Index
from lmm_jax.data.prepared import as_turns
from lmm_jax.data.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = 128  # pieces of the tokenizer that is trained on the digits' questions


def prepare_digits(out, rows=None):
    """Prepares the digits: builder, a tokenizer trained on the questions, index.

    Args:
      out: folder to write; a finished one is left as it is.
      rows: training mosaics, the builder's default if None.

    Returns:
      dict with rows, images and refused, as `lmm prepare --json` prints it.
    """
    import tensorflow_datasets as tfds

    from lmm_jax.data.datasets import digits

    if not sys.stderr.isatty():
        tfds.display_progress_bar(False)  # it prints dozens of lines
    out = epath.Path(out)
    done = out / "prepared.json"
    if done.exists():
        return _summary(json.loads(done.read_text()))
    if out.exists() and any(out.iterdir()):
        written = {"records", "tokenizer.model", "tokenizer_config.json", "example.png"}
        leftovers = written | {f"index_{split}.npz" for split in digits.MOSAICS}
        foreign = sorted(p.name for p in out.iterdir() if p.name not in leftovers)
        if foreign:
            raise FileExistsError(f"{out} holds other files ({', '.join(foreign[:3])}); choose another folder")
        out.rmtree()  # of a run that was interrupted
    out.mkdir(parents=True)
    builder = digits.Digits(data_dir=out / "records", file_format="array_record", train_rows=rows)
    builder.download_and_prepare()
    source = builder.as_data_source("train")
    lines = (turn for i in range(min(len(source), 2000)) for _, turn in as_turns(source[i]))
    tokenizer = Tokenizer(train_tokenizer((line.replace("<image>\n", "") for line in lines), VOCABULARY))
    tokenizer.save(out)
    (out / "example.png").write_bytes(builder.as_data_source("test")[0]["images"][0])
    return write_index(out, builder, tokenizer, "qa")


def write_index(out, builder, tokenizer, template):
    """Counts tokens and measures pictures of every row; writes index and, last of all files, `prepared.json`."""
    splits = {}
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {template}".encode())
    for split in builder.info.splits:
        source = builder.as_data_source(split)
        index = Index()
        for i in tqdm(range(len(source)), desc=f"counting {split}", unit=" rows", disable=None):
            record = source[i]
            turns = as_turns(record)
            index.add(encode(turns, tokenizer, template), [image_size(data) for data in record["images"]])
            digest.update(repr((split, i, record["id"], turns, list(record["images"]))).encode())
        with (out / f"index_{split}.npz").open("wb") as f:
            np.savez(f, **index.arrays())
        splits[split] = {"rows": len(source), "images": len(index.arrays()["image_sizes"])}
    about = {
        "builder": builder.info.full_name,
        "template": template,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": digest.hexdigest(),
        "splits": splits,
        "refused": {},
    }
    (out / "prepared.json").write_text(json.dumps(about, indent=1) + "\n")
    return _summary(about)


def _summary(about):
    splits = about["splits"].values()
    return {
        "rows": sum(s["rows"] for s in splits),
        "images": sum(s["images"] for s in splits),
        "refused": about["refused"],
    }
