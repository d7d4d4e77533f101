"""What made-up records take in a pack, for tests of packing and of the stream."""

import numpy as np

from lmm_jax.data.packing import Needs


def single(lengths, pictures=None):
    lengths = np.asarray(lengths)
    pictures = np.zeros_like(lengths) if pictures is None else np.asarray(pictures)
    return Needs(lengths[:, None], pictures, lengths // 4)


def random_needs(n, copies=3, seed=0):
    rng = np.random.default_rng(seed)
    text, pictures = rng.integers(10, 60, n), rng.integers(0, 3, n)
    lengths = text[:, None] + pictures[:, None] * np.array([16, 4, 1])[:copies]
    lengths[pictures == 0, 1:] = 0
    return Needs(lengths, pictures, text // 3 * (lengths > 0).sum(axis=1))
