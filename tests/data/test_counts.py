"""What records take, against the index by hand and counted record by record."""

import numpy as np
import pytest

from lmm_jax.data.counts import count_records, needs_of
from lmm_jax.data.stream import scales_at
from lmm_jax.data.views import deepstack_tilings
from lmm_jax.data.visual_layout import VisualLayout

INDEX = {
    "turn_offsets": np.array([0, 2, 3, 3, 5]),
    "turn_tokens": np.array([10, 30, 20, 15, 80]),
    "turn_supervised": np.array([3, 9, 5, 2, 40]),
    "turn_images": np.array([1, 2, 0, 1, 1]),
    "image_offsets": np.array([0, 2, 2, 2, 3]),
    "image_sizes": np.array([[30, 20], [20, 30], [30, 20]]),
}


PLAIN = VisualLayout(size=24, cell=4, canvas=(24, 24))


def test_needs_come_from_the_answers_that_fit():
    scales = (1, 9)

    def counted(length, cut):
        counts = count_records(INDEX, PLAIN, scales, length, cut)
        return needs_of(counts, scales, [scales]), counts.usable

    needs, usable = counted(48, cut=True)
    np.testing.assert_array_equal(usable, [True, True, False, True])
    np.testing.assert_array_equal(needs.copies, [[48, 32], [20, 0], [0, 0], [24, 16]])
    np.testing.assert_array_equal(needs.views, [2, 0, 0, 1])
    np.testing.assert_array_equal(needs.targets, [18, 5, 0, 4])
    needs, usable = counted(47, cut=True)
    np.testing.assert_array_equal(needs.copies[0], [19, 11])
    _, usable = counted(47, cut=False)
    np.testing.assert_array_equal(usable, [False, True, False, False])


@pytest.mark.parametrize(
    ("length", "cut", "answers"),
    [(48, True, [2, 1, 0, 1]), (47, True, [1, 1, 0, 1]), (47, False, [0, 1, 0, 0]), (18, True, [0, 0, 0, 0])],
)
def test_answers_that_stay_are_counted(length, cut, answers):
    np.testing.assert_array_equal(count_records(INDEX, PLAIN, (1, 9), length, cut).answers, answers)


def test_needs_hold_for_every_phase_of_a_rotation():
    scales = (1, 4, 9, 36)
    phases = [scales_at(i, scales, 2) for i in range(4)]
    needs = needs_of(count_records(INDEX, PLAIN, scales, 200, cut=False), scales, phases)
    np.testing.assert_array_equal(needs.copies[0], [30 + 2 * 36, 30 + 2 * 4])


def test_a_split_without_answers_or_pictures_is_counted():
    index = {name: np.zeros(0, x.dtype) for name, x in INDEX.items()}
    index |= {
        "turn_offsets": np.zeros(3, int),
        "image_offsets": np.zeros(3, int),
        "image_sizes": np.zeros((0, 2), int),
    }
    counts = count_records(index, PLAIN, (9,), 100, cut=True)
    assert not counts.usable.any() and not counts.positions.any() and counts.positions.shape == (2, 1)


def random_index(rng, records):
    """An index of records with 0 to 4 answers and 0 to 3 pictures each, and the numbers of each answer by record."""
    answers, of_record = rng.integers(0, 5, records), []
    pictures = [rng.integers(5, 200, (n, 2)) for n in rng.integers(0, 4, records)]
    for n, sizes in zip(answers, pictures, strict=True):
        text = np.cumsum(rng.integers(1, 40, n))
        supervised = np.cumsum(rng.integers(1, 9, n))
        of_record.append((text, supervised, np.sort(rng.integers(0, len(sizes) + 1, n)), sizes))
    text, supervised, shown, sizes = (np.concatenate(x).astype(np.int32) for x in zip(*of_record, strict=True))
    index = {"turn_tokens": text, "turn_supervised": supervised, "turn_images": shown, "image_sizes": sizes}
    index["turn_offsets"] = np.cumsum([0, *answers])
    index["image_offsets"] = np.cumsum([0, *map(len, pictures)])
    return index, of_record


CANVAS = VisualLayout(size=84, cell=14, canvas=(84, 140), aspect="own")
TILED = VisualLayout(84, 14, (84, 84), "stretch", tuple(deepstack_tilings(4)), stacks="samples")
UNPADDED = VisualLayout(84, 14, (84, 84), "anyres", ((1, 2), (2, 1), (2, 2)), sequence="unpad", newline=True)


@pytest.mark.parametrize("visual", [CANVAS, TILED, UNPADDED], ids=["canvas", "tiled", "unpadded"])
@pytest.mark.parametrize("cut", [False, True])
def test_counts_are_those_of_each_record_by_itself(visual, cut):
    index, of_record = random_index(np.random.default_rng(0), 200)
    scales, length = (4, 36), 150
    counts = count_records(index, visual, scales, length, cut)
    for record, (text, supervised, shown, sizes) in enumerate(of_record):
        tokens = [visual.tokens(sizes, scale) for scale in scales]
        lengths = [
            [n + of_scale[:pictures].sum() for of_scale in tokens] for n, pictures in zip(text, shown, strict=True)
        ]
        kept = [answer for answer, (_, longest) in enumerate(lengths) if longest <= length]
        usable = bool(kept) and (cut or len(kept) == len(text))
        usable = usable and all(of_scale[: shown[kept[-1]]].all() for of_scale in tokens)
        assert counts.usable[record] == usable
        expected = [0, 0, 0, 0, 0]
        if usable:
            last = kept[-1]
            seen = sizes[: shown[last]]
            expected = [*lengths[last], shown[last], visual.views_of(seen).sum(), supervised[last]]
        found = [counts.pictures[record], counts.views[record], counts.supervised[record]]
        assert [*counts.positions[record], *found] == expected
    assert 20 < counts.usable.sum() < 190


def test_a_picture_too_thin_leaves_its_record_out_only_if_it_is_shown():
    index = {
        "turn_offsets": np.array([0, 2, 3]),
        "turn_tokens": np.array([10, 300, 10]),
        "turn_supervised": np.array([3, 9, 5]),
        "turn_images": np.array([1, 2, 1]),
        "image_offsets": np.array([0, 2, 3]),
        "image_sizes": np.array([[100, 90], [900, 8], [900, 8]]),
    }
    counts = count_records(index, CANVAS, (9,), 100, cut=True)
    np.testing.assert_array_equal(counts.usable, [True, False])  # the first is cut before its thin picture
    np.testing.assert_array_equal(counts.pictures, [1, 0])


def test_text_alone_needs_one_copy():
    counts = count_records(INDEX, PLAIN, (1, 9, 36), 200, cut=False)
    needs = needs_of(counts, (1, 9, 36), [(1, 9, 36)])
    np.testing.assert_array_equal(needs.copies[1], [20, 0, 0])
    assert needs.targets[1] == 5 and needs.targets[0] == 3 * 9
