"""What the rows of a prepared split take, from its index alone."""

import dataclasses

import numpy as np

from lmm_jax.data.stream import Needs


@dataclasses.dataclass(frozen=True)
class Counts:
    """What each row takes, up to its last answer that fits; 0 of a row that cannot be used.

    Attributes:
      usable: `[n]` bool; the others are too long, have no answer, or a picture too thin to have a visual token.
      positions: `[n, scales]` int, of the copy at each scale.
      pictures, views: `[n]` int.
      supervised: `[n]` int, supervised tokens of one copy.
    """

    usable: np.ndarray
    positions: np.ndarray
    pictures: np.ndarray
    views: np.ndarray
    supervised: np.ndarray


def count_rows(index, visual, scales, length, cut) -> Counts:
    """Counts the rows of a prepared split.

    Args:
      index: arrays of `lmm_jax.data.prepare.index`.
      visual: `VisualLayout` of the pictures.
      scales: all scales of the bank; where a row is cut depends on the largest.
      length: positions of a row.
      cut: whether a conversation that is too long is cut after its last answer that fits.
    """
    offsets, answers = index["turn_offsets"], np.diff(index["turn_offsets"])
    begin = np.repeat(index["image_offsets"][:-1], answers)  # of each answer: its row's first picture
    end = begin + index["turn_images"]
    width, height = index["image_sizes"].T.astype(np.int64)
    kinds, kind = np.unique(width << 32 | height, return_inverse=True)  # sizes repeat: each is laid out once
    sizes = np.stack([kinds >> 32, kinds & 0xFFFFFFFF], axis=1)

    def shown(of_sizes):
        """Sum over the pictures up to each answer."""
        before = np.concatenate([[0], np.cumsum(of_sizes[kind])])
        return before[end] - before[begin]

    tokens = np.stack([visual.tokens(sizes, scale) for scale in scales], axis=1)
    positions = np.stack([index["turn_tokens"] + shown(of_scale) for of_scale in tokens.T], axis=1)
    fitting = positions[:, scales.index(max(scales))] <= length
    kept = np.concatenate([[0], np.cumsum(fitting)])
    kept = kept[offsets[1:]] - kept[offsets[:-1]]  # answers that fit: lengths grow, so they are the first ones
    usable = (kept > 0) & (cut | (kept == answers))
    last = np.where(usable, offsets[:-1] + kept - 1, len(fitting))

    def of_rows(of_answers):
        """What an array over answers says of each row; the entry past its end says 0."""
        return np.concatenate([of_answers, np.zeros_like(of_answers, shape=(1, *of_answers.shape[1:]))])[last]

    too_thin = of_rows(shown((tokens == 0).any(axis=1).astype(np.int64))) > 0
    last = np.where(too_thin, len(fitting), last)
    return Counts(
        usable=usable & ~too_thin,
        positions=of_rows(positions),
        pictures=of_rows(index["turn_images"]).astype(np.int64),
        views=of_rows(shown(visual.views_of(sizes))),
        supervised=of_rows(index["turn_supervised"]).astype(np.int64),
    )


def needs_of(counts, scales, phases) -> Needs:
    """What each row takes in a pack.

    Args:
      counts: of the rows.
      scales: as for `count_rows`.
      phases: the sets of scales that train together, see `stream.scales_at`; a row must fit with any of them.
    """
    most, shows = max(map(len, phases)), counts.pictures > 0
    copies = np.zeros((len(shows), most), np.int64)
    for phase in phases:
        for n, scale in enumerate(sorted(phase, reverse=True)):
            # Text alone is the same at every scale and has one copy.
            here = np.where(shows | (n == 0), counts.positions[:, scales.index(scale)], 0)
            copies[:, n] = np.maximum(copies[:, n], here)
    return Needs(copies, counts.views, counts.supervised * np.where(shows, most, 1))
