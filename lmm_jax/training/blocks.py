"""The scanned runs of an encoder's blocks, cut otherwise: between recipes the blocks are the same."""

import itertools
import re

import jax.numpy as jnp

RUN = re.compile(r"(.+)/blocks_(\d+)/(.+)")


def recut(old, new):
    """Flat parameters `old`, the runs of an encoder's blocks cut as in `new`: see `models.vit.ViT.runs`.

    Where levels are wanted, or tiles enter, runs end; between recipes that differ in this the blocks are the same.
    """
    out, runs = {}, {}
    for path, x in old.items():
        cut = RUN.fullmatch(path)
        if cut:
            runs.setdefault((cut[1], cut[3]), []).append((int(cut[2]), x))
        else:
            out[path] = x
    for (encoder, leaf), parts in runs.items():
        whole = jnp.concatenate([x for _, x in sorted(parts, key=lambda part: part[0])])
        starts = sorted(
            int(cut[2]) for path in new if (cut := RUN.fullmatch(path)) and (cut[1], cut[3]) == (encoder, leaf)
        )
        for start, end in itertools.pairwise([*starts, len(whole)]):
            out[f"{encoder}/blocks_{start}/{leaf}"] = whole[start:end]
    return out


def runs_of(path, paths) -> list[str]:
    """The `paths` that hold the same leaf of other runs of the encoder's blocks; empty for what is in no run."""
    cut = RUN.fullmatch(path)
    cuts = {other: RUN.fullmatch(other) for other in paths}
    return [other for other, c in cuts.items() if cut and c and (c[1], c[3]) == (cut[1], cut[3])]
