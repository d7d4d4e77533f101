"""What a router reads of the questions of a pack, and which answer belongs to which."""

import dataclasses

import numpy as np
import pytest

from lmm_jax.data.conversation import Turn
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.questions import pad_questions, read_questions
from lmm_jax.data.visual_layout import VisualLayout
from tests.opened import open_packs
from tests.release.recipes import TOKENIZER

PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
WHOLE = VisualLayout(24, 4, (24, 24))
TILES = VisualLayout(24, 4, (24, 24), "anyres", PINPOINTS, sequence="unpad", newline=True)
SCALES = (1, 4, 36)
ROUTER = ("model.router.width=8", "model.router.heads=2", "model.router.tokens=8")

SEVERAL = (
    [  # a question before any picture, two pictures, a second answer, one that is not trained on, a third picture
        Turn("user", "hello there"),
        Turn("assistant", "ask me"),
        Turn("user", "<image>\n<image>\nwhich is larger?"),
        Turn("assistant", "the left"),
        Turn("user", "why?"),
        Turn("assistant", "unseen", in_loss=False),
        Turn("user", "and <image> now?"),
        Turn("assistant", "the third"),
    ],
    [(24, 24), (50, 20), (24, 70)],
)
TEXT = ([Turn("user", "what is a cat?"), Turn("assistant", "an animal")], [])
ONE = ([Turn("user", "<image>\nwhat is it?"), Turn("assistant", "a dog")], [(80, 30)])


def text_of(ids):
    return TOKENIZER.decode(ids[ids >= 0].tolist())


def assembled(visual, records, count=8, tokens=32):
    """One pack of records as the pipeline lays them out; its layout, arrays, and the records' first grids."""
    layout = PackLayout(visual, SCALES, 40, rows=1, length=9999, targets=400, template="qa", too_long="refuse")
    layout = dataclasses.replace(layout, questions=count, question_length=tokens)
    segments, questions, pictures, grid = [], [], [], 0
    for turns, sizes in records:
        segments += layout.training_segments(turns, sizes, TOKENIZER, SCALES, grid, len(questions))
        questions += layout.training_questions(turns, sizes, TOKENIZER, grid) if sizes else []
        pictures += [(size, None) for size in sizes]
        grid += sum(visual.grids_of_tiling(visual.tiling(*size)) for size in sizes)
    return layout, layout.assemble(segments, pictures, None, questions)


def test_a_question_is_what_the_user_said_last_without_tags_and_its_pictures_those_before():
    found = read_questions(SEVERAL[0], TOKENIZER, "qa", 32)
    assert [text_of(q.ids) for q in found] == ["hello there", "which is larger?", "why?", "and now?"]
    assert [q.pictures for q in found] == [0, 2, 2, 3]
    assert [q.trained for q in found] == [True, True, False, True]


def test_the_last_question_may_wait_for_its_answer_and_a_system_turn_is_none():
    turns = [("system", "be brief"), ("human", "<image>\nwhat is it?")]
    (found,) = read_questions(turns, TOKENIZER, "vicuna_v1", 32)
    assert text_of(found.ids) == "what is it?" and found.pictures == 1 and not found.trained


def test_long_questions_are_cut_and_captions_ask_nothing():
    whole = read_questions(ONE[0], TOKENIZER, "qa", 32)[0].ids
    (cut,) = read_questions(ONE[0], TOKENIZER, "qa", 2)
    np.testing.assert_array_equal(cut.ids, whole[:2])
    (caption,) = read_questions(ONE[0], TOKENIZER, "plain", 32)
    assert len(caption.ids) == 0 and caption.pictures == 1
    np.testing.assert_array_equal(pad_questions([cut.ids, caption.ids], 3, 3)[1:], np.full((2, 3), -1))


@pytest.mark.parametrize("visual", [WHOLE, TILES], ids=["whole", "tiles"])
def test_every_target_knows_its_question_and_every_question_its_pictures(visual):
    """Several conversations, pictures and answers, a text, and answers that are not trained on, in one pack."""
    layout, out = assembled(visual, [SEVERAL, TEXT, ONE])
    texts = ["hello there", "which is larger?", "and now?", "what is it?"]
    assert [text_of(ids) for ids in out["question"]] == texts + [""] * 4

    answers = {n: set() for n in range(-1, 8)}  # of each question the text at each scale
    for scale in range(len(SCALES)):
        of_scale = (out["group"] >> scale & 1).astype(bool)
        for n in range(-1, 8):
            answers[n].add(TOKENIZER.decode(out["target"][of_scale & (out["answer"] == n)].tolist()).strip())
    assert (
        out["target"][out["group"] > 0][out["answer"][out["group"] > 0] == -1] == TOKENIZER.eos
    ).sum() == 4 * 3 + 1
    assert answers == {
        -1: {"an animal"},
        **dict(enumerate([{"ask me"}, {"the left"}, {"the third"}, {"a dog"}])),
        **{n: {""} for n in range(4, 8)},
    }

    counts = [visual.grids_of_tiling(visual.tiling(*size)) for size in SEVERAL[1] + ONE[1]]
    before = np.cumsum([0, *counts])
    grids = out["question_grids"]
    assert grids.shape == (8, layout.grids)
    for row, (first, end) in zip(grids, [(0, 0), (0, 2), (0, 3), (3, 4)], strict=False):
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(before[first], before[end]))
    assert not grids[4:].any()


def test_questions_beyond_the_room_are_left_out_and_move_nothing():
    _, whole = assembled(WHOLE, [SEVERAL, ONE])
    _, less = assembled(WHOLE, [SEVERAL, ONE], count=2)
    for name in ("question", "question_grids"):
        np.testing.assert_array_equal(less[name], whole[name][:2])
    np.testing.assert_array_equal(less["answer"], np.where(whole["answer"] < 2, whole["answer"], -1))
    for name in whole.keys() - {"question", "question_grids", "answer"}:
        np.testing.assert_array_equal(less[name], whole[name])


def test_a_router_adds_three_arrays_and_leaves_the_others_as_they_are(tiny):
    plain, routed = (open_packs(tiny(*more), "train", 8, shuffle=True) for more in ((), ROUTER))
    assert routed.layout.questions == 6  # a mosaic has at most so many
    assert routed.layout.bytes == plain.layout.bytes + 4 * (6 * (8 + 1) + 40)
    for position in (0, 9, 70):
        a, b = plain[position], routed[position]
        assert b.keys() - a.keys() == {"question", "question_grids", "answer"}
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
        used = b["group"] > 0
        ends = b["target"] == routed.tokenizer.eos
        assert (b["answer"][used & ~ends] >= 0).all() and (b["answer"][~used | ends] == -1).all()
        asked = (b["question"] >= 0).any(axis=1)
        assert asked.sum() == b["answer"].max() + 1 and (b["question_grids"][:, 0] == asked).all()


def test_a_broken_record_has_no_questions(tiny, monkeypatch):
    packs = open_packs(tiny(*ROUTER), "train", 8, shuffle=True)
    (_, record), read = packs.members(0)[0], type(packs.data[0]).__getitem__

    def broken(self, n):
        if n == record:
            raise OSError("unreadable")
        return read(self, n)

    monkeypatch.setattr(type(packs.data[0]), "__getitem__", broken)
    out = packs[0]
    assert out["bad"].tolist() == [True]
    assert (out["question"] == -1).all() and not out["question_grids"].any() and (out["answer"] == -1).all()
