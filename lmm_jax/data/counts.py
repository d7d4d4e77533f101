"""What the records of a prepared split take, from its index alone.

The index (`lmm_jax.data.prepare.index`) lists the answers of all records one after the other, and their pictures
likewise; offsets say where a record's own begin. Answers that are not trained on are not among them. Everything said
of an answer counts from the start of its record:

    record             0             1      2    3
    turn_offsets       0             2      3    3            5     record 2 has no answer
    answer             0      1      2           3     4
    turn_tokens        10     30     20          15    80           text up to the end of the answer
    turn_images        1      2      0           1     1            pictures up to there

    image_offsets      0             2      2    2            3     records 1 and 2 have no picture
    picture            0      1                  2

So a conversation cut after answer 1 of record 0 takes 30 positions of text and those of pictures 0 and 1; cut after
answer 0, it takes 10 and those of picture 0.
"""

import dataclasses

import numpy as np

from lmm_jax.data.packing import Needs


@dataclasses.dataclass(frozen=True)
class Counts:
    """What each record takes, up to its last answer that fits; 0 of a record that cannot be used.

    Attributes:
      usable: `[n]` bool; the others are too long, have no answer, or a picture without a visual token.
      needed: `[n]` int, positions that a row must have for the record to be usable; `NO_LENGTH` without an answer.
      thin: `[n]` bool, whether a picture is too thin to have a visual token, or has no place on the canvas.
      answers: `[n]` int.
      positions: `[n, scales]` int, of the copy at each scale.
      pictures, views: `[n]` int.
      supervised: `[n]` int, supervised tokens of one copy.
      bucket: `[n]` int, number of the record's canvas among `VisualLayout.buckets`.
    """

    usable: np.ndarray
    needed: np.ndarray
    thin: np.ndarray
    answers: np.ndarray
    positions: np.ndarray
    pictures: np.ndarray
    views: np.ndarray
    supervised: np.ndarray
    bucket: np.ndarray


NO_LENGTH = np.iinfo(np.int64).max  # of a record that no length of a row makes usable


def count_records(index, visual, scales, length, cut) -> Counts:
    """Counts the records of a prepared split; of several canvases each record on its own.

    Args:
      index: arrays of `lmm_jax.data.prepare.index`.
      visual: `VisualLayout` of the pictures.
      scales: all scales of the bank; where a record is cut depends on the largest.
      length: positions of a row.
      cut: whether a conversation that is too long is cut after its last answer that fits.
    """
    records = len(index["turn_offsets"]) - 1
    of_picture = np.repeat(np.arange(records), np.diff(index["image_offsets"]))
    bucket = np.zeros(records, np.int64)
    if len(visual.buckets) > 1:
        bucket = visual.choose_buckets(index["image_sizes"], of_picture, records)
    counted = [_count(index, canvas, scales, length, cut) for canvas in visual.buckets]
    merged = {name: np.stack([found[name] for found in counted])[bucket, np.arange(records)] for name in counted[0]}
    return Counts(**merged, bucket=bucket)


def _count(index, visual, scales, length, cut) -> dict[str, np.ndarray]:
    """What `count_records` returns, of one canvas."""
    # Many pictures have the same size, so that each size is laid out once.
    sizes, size_of_picture = _distinct(index["image_sizes"])
    first_picture = np.repeat(index["image_offsets"][:-1], np.diff(index["turn_offsets"]))  # of each answer's record

    def up_to_answers(of_sizes):
        """Sum `[answers]` over the pictures up to each answer of what pictures of each size have, `[sizes]`."""
        before = np.concatenate([[0], np.cumsum(of_sizes[size_of_picture])])  # of the pictures before each picture
        return before[first_picture + index["turn_images"]] - before[first_picture]

    tokens = [visual.tokens(sizes, scale) for scale in scales]  # of a picture of each size, at each scale
    positions = np.stack([index["turn_tokens"] + up_to_answers(of_scale) for of_scale in tokens], axis=1)
    thin_pictures = up_to_answers((np.stack(tokens) == 0).any(axis=0))

    longest = positions[:, scales.index(max(scales))]
    last = _last_answers(longest <= length, index["turn_offsets"], cut)
    usable = last != NO_ANSWER
    usable[usable] = thin_pictures[last[usable]] == 0
    offsets = index["turn_offsets"]
    answered, needed, thin = np.diff(offsets) > 0, np.full(len(usable), NO_LENGTH), np.zeros(len(usable), bool)
    deciding = (offsets[:-1] if cut else offsets[1:] - 1)[answered]  # the answer that has to fit
    needed[answered], thin[answered] = longest[deciding], thin_pictures[deciding] > 0

    def at_last_answer(of_answers):
        """What an array over answers says of the last one of each record, int64; 0 of a record that is not usable."""
        found = np.zeros((len(usable), *of_answers.shape[1:]), np.int64)
        found[usable] = of_answers[last[usable]]
        return found

    return dict(
        usable=usable,
        needed=needed,
        thin=thin,
        answers=np.where(usable, last - offsets[:-1] + 1, 0),
        positions=at_last_answer(positions),
        pictures=at_last_answer(index["turn_images"]),
        views=at_last_answer(up_to_answers(visual.views_of(sizes))),
        supervised=at_last_answer(index["turn_supervised"]),
    )


NO_ANSWER = -1


def _last_answers(fitting, turn_offsets, cut):
    """The last answer of each record that is kept, `[records]`; `NO_ANSWER` of a record that is left out.

    Args:
      fitting: `[answers]` bool, whether the conversation up to each answer fits.
      turn_offsets: `[records + 1]`, of the index.
      cut: whether a record of which only the first answers fit is used up to there.
    """
    fitting_before = np.concatenate([[0], np.cumsum(fitting)])
    kept = np.diff(fitting_before[turn_offsets])  # lengths grow, so that those that fit are a record's first ones
    complete = kept == np.diff(turn_offsets)
    return np.where((kept > 0) & (cut | complete), turn_offsets[:-1] + kept - 1, NO_ANSWER)


def _distinct(image_sizes):
    """Different sizes `[sizes, 2]` of pictures, and which of them each picture has, `[pictures]`."""
    width, height = image_sizes.T.astype(np.int64)
    both, which = np.unique(width << 32 | height, return_inverse=True)  # one number a size: far faster than pairs
    return np.stack([both >> 32, both & 0xFFFFFFFF], axis=1), which


def needs_of(counts, scales, phases) -> Needs:
    """What each record takes in a pack.

    Args:
      counts: of the records.
      scales: as for `count_records`.
      phases: the sets of scales that train together, see `stream.scales_at`; a record must fit with any of them, so
        that copy number i is as long as the longest of all phases' copies number i.
    """
    shows = counts.pictures > 0
    most_copies = max(map(len, phases))
    copies = np.zeros((len(shows), most_copies), np.int64)
    for phase in phases:
        for number, scale in enumerate(sorted(phase, reverse=True)):
            positions = counts.positions[:, scales.index(scale)]
            if number > 0:  # text alone is the same at every scale and has one copy
                positions = np.where(shows, positions, 0)
            copies[:, number] = np.maximum(copies[:, number], positions)
    return Needs(copies, counts.views, counts.supervised * np.where(shows, most_copies, 1), counts.bucket)
