"""Which rows are kept from training: a function of what each is of, with all rows of a picture on one side."""

import itertools
import random

import numpy as np
import pytest

from lmm_jax.data.prepare.splits import SPLITS, UNUSABLE, Keys, assign, parse_amount


def assigned(rows, **amounts):
    """`{id: split}` of `(id, pictures)` pairs, or of None for a row that cannot be read."""
    keys = Keys("pictures")
    for row in rows:
        keys.add(*row) if row else keys.add_unusable()
    found = assign(keys, **amounts)
    assert [n == UNUSABLE for n in found] == [row is None for row in rows]
    return {row[0]: SPLITS[n] for row, n in zip(rows, found, strict=True) if row}


def count(found, split):
    return list(found.values()).count(split)


def single(number):
    """Rows of a picture each, and every fifth of none."""
    return [(f"row-{n}", [f"{n}.jpg"] if n % 5 else []) for n in range(number)]


def test_a_number_is_met_exactly_where_rows_stand_alone():
    found = assigned(single(1000), validation=50, test=20)
    assert [count(found, split) for split in SPLITS] == [930, 50, 20]
    pictured = {n % 5 > 0 for n in range(1000) if found[f"row-{n}"] == "test"}
    assert pictured == {True, False}  # text alone is tested too


def test_a_share_is_about_that_share():
    found = assigned(single(20_000), validation=0.1, test=0.05)
    assert abs(count(found, "validation") / 20_000 - 0.1) < 0.01 and abs(count(found, "test") / 20_000 - 0.05) < 0.01


@pytest.mark.parametrize("amounts", [{"validation": 40, "test": 30}, {"validation": 0.1, "test": 0.2}])
def test_order_and_other_rows_do_not_matter(amounts):
    rows = single(400)
    found = assigned(rows, **amounts)
    mixed = [*rows, *[None] * 30]  # rows that are refused
    random.Random(0).shuffle(mixed)
    assert assigned(mixed, **amounts) == found


def test_a_share_keeps_each_row_on_its_side_where_rows_come_and_go():
    found = assigned(single(900), validation=0.1, test=0.1)
    fewer = assigned(single(900)[::3], validation=0.1, test=0.1)
    assert all(found[id] == split for id, split in fewer.items()) and count(fewer, "test") > 10


def test_rows_of_a_number_stay_where_others_are_taken_away():
    found = assigned(single(900), test=60)
    fewer = assigned(single(900)[::2], test=60)
    assert all(fewer[id] == "test" for id in fewer if found[id] == "test")


def test_test_rows_do_not_depend_on_validation_rows():
    def tested(**amounts):
        return {id for id, split in assigned(single(500), **amounts).items() if split == "test"}

    assert tested(test=30) == tested(test=30, validation=200) == tested(test=30, validation=0.3)
    assert tested(test=0.1) == tested(test=0.1, validation=0.4)
    assert tested(test=10) < tested(test=30)


@pytest.mark.parametrize("amounts", [{"validation": 60, "test": 60}, {"validation": 0.2, "test": 0.2}])
def test_rows_of_a_picture_lie_on_one_side(amounts):
    rng = random.Random(1)
    rows = []
    for n in range(150):  # stories of one to four pictures, which rows show in pairs
        pictures = [f"story{n}/{k}.jpg" for k in range(rng.randrange(1, 5))]
        shown = [[a, b] for a, b in itertools.pairwise(pictures)] or [pictures]
        rows += [(f"{n}/{k}", images) for k, images in enumerate(shown * rng.randrange(1, 3))]
    rng.shuffle(rows)
    found = assigned(rows, **amounts)
    for n in range(150):
        assert len({split for id, split in found.items() if id.split("/")[0] == str(n)}) == 1
    assert min(count(found, split) for split in SPLITS) > 20


def test_a_long_chain_of_rows_is_one_group():
    rows = [(str(n), [f"{n}.jpg", f"{n + 1}.jpg"]) for n in range(20_000)]
    random.Random(2).shuffle(rows)
    keys = Keys(".")
    for row in rows:
        keys.add(*row)
    groups, places = keys.groups()
    assert len(places) == 1 and not groups.any()


def test_a_picture_is_the_same_under_any_spelling_of_its_name(tmp_path):
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "z.jpg").symlink_to(tmp_path / "a/b.jpg")
    keys = Keys(tmp_path)
    for name in (
        "a/b.jpg",
        "./a//b.jpg",
        "c/../a/b.jpg",
        str(tmp_path / "a/b.jpg"),
        f"file://{tmp_path}/a/b.jpg",
        f"FILE://localhost{tmp_path}/a/%62.jpg",
        "link/b.jpg",
        "z.jpg",
        f"../{tmp_path.name}/a/b.jpg",
        b"bytes",
        b"bytes",
        b"others",
    ):
        keys.add("x", [name])
    groups, _ = keys.groups()
    assert len(set(groups[:9])) == 1 and groups[9] == groups[10] and len(set(groups)) == 3


def test_a_folder_that_moved_splits_alike(tmp_path):
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        keys = Keys(folder)
        for n in range(100):
            keys.add("x", [str(folder / f"{n}.jpg") if n % 2 else f"{n}.jpg"])
        found.append(assign(keys, test=30).tolist())
    assert found[0] == found[1]


def test_the_rows_of_a_placeholder_are_trained_on():
    rows = [(f"blank-{n}", ["blank.png"]) for n in range(300)] + single(700)
    for share in np.linspace(0.01, 0.2, 20):
        found = assigned(rows, validation=float(share), test=float(share))
        assert found["blank-0"] == "train" and count(found, "test") <= 3 * share * 1000


def test_a_share_of_few_rows_is_one_picture_at_least():
    rows = [(f"{n}/{k}", [f"{n}.jpg"]) for n in range(12) for k in range(5)]
    found = assigned(rows, validation=0.001, test=0.001)
    assert [count(found, split) for split in SPLITS] == [50, 5, 5]


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"validation": 60}, "--validation 60: no row of the file is left to train on, which has 60 that"),
        ({"test": 30, "validation": 30}, "--test 30 --validation 30: no row"),
        ({"test": 0.5, "validation": 0.5}, "--test 0.5 --validation 0.5: no row"),
        ({"test": 50, "validation": 0.5}, "--test 50 --validation 0.5: no row"),
        ({"test": 3}, "--test 3: .* smallest group of these in the file has 5 rows; ask for that many"),
        ({"validation": 4}, "--validation 4: .* the smallest group"),
    ],
)
def test_what_cannot_be_met_is_said(amounts, message):
    rows = [(f"{n}/{k}", [f"{n}.jpg"]) for n in range(12) for k in range(5)]
    with pytest.raises(ValueError, match=message):
        assigned([*rows, None, None], **amounts)


def test_one_picture_cannot_be_split():
    with pytest.raises(ValueError, match="smallest group of these in the file has 5 rows"):
        assigned([(str(n), ["a.jpg"]) for n in range(5)], test=2)
    with pytest.raises(ValueError, match="no row of the file is left to train on, as rows that share a pict"):
        assigned([(str(n), ["a.jpg"]) for n in range(5)], test=0.5)


def test_nothing_to_split_is_told_by_whoever_reads_rows():
    assert assigned([None, None], test=5) == {} and assigned([], test=5) == {}


@pytest.mark.parametrize(
    ("text", "amount"),
    [("500", 500), (500, 500), ("1", 1), ("0.05", 0.05), (".5", 0.5), (0.25, 0.25), ("1e-3", 0.001), (1e-05, 1e-05)],
)
def test_amounts(text, amount):
    found = parse_amount("--test", text)
    assert found == amount and type(found) is type(amount)


BAD = ("0", "-3", "1.5", "abc", "", "nan", "inf", "0.0", "1.0", "5%", "1,000", "1_000", "1e3", "0x10", "٣", True, -1)


@pytest.mark.parametrize("text", BAD)
def test_other_amounts_are_refused(text):
    with pytest.raises(ValueError, match=r"--test .*: expected a number of rows, such as 500, or a share"):
        parse_amount("--test", text)
