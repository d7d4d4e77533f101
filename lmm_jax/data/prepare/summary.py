"""What a finished folder holds, in numbers and in words."""

import numpy as np
from etils import epath

from lmm_jax import strict_json
from lmm_jax.data.prepare import index


def summary(out) -> dict:
    """What a finished folder holds, over all splits.

    Returns:
      dict: `rows`, `images`, `splits` (rows and images of each), `refused` (count of each reason), `ignored` (count
      of each key, see `parse.Row`), `tokens` of a row without pictures (mean, median, p95, longest), and `pictures`,
      the number of rows for each number of pictures.
    """
    out = epath.Path(out)
    about = strict_json.read_object(out / "prepared.json")
    tokens, pictures = [], []
    for split in about["splits"]:
        arrays = index.read(out / f"index_{split}.npz")
        tokens.append(arrays["turn_tokens"][arrays["turn_offsets"][1:] - 1])
        pictures.append(np.diff(arrays["image_offsets"]))
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
