"""How conversations and pictures are laid out in a pack."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from lmm_jax.data.pack_layout import PackLayout, PlacedPicture, bank_slots
from lmm_jax.data.segments import DoesNotFit, blank
from lmm_jax.data.views import deepstack_tilings
from lmm_jax.data.visual_layout import VisualLayout
from tests.opened import open_packs

OWN = VisualLayout(size=84, cell=14, canvas=(84, 140), aspect="own")
TILED = VisualLayout(84, 14, (84, 84), "stretch", tuple(deepstack_tilings(4)), stacks="samples")


def layout_of(visual, views, scales):
    return PackLayout(visual, scales, views, rows=1, length=9999, targets=9, template="qa", too_long="refuse")


def test_the_drawn_bank_is_the_one_that_slots_are_counted_in():
    """The drawing of the module's docstring: three grids, at the scales of one and of four tokens."""
    one, four = (np.arange(2), 1, 0, (1, 4), 3), (np.arange(8), 1, 1, (1, 4), 3)  # of the second picture's two grids
    np.testing.assert_array_equal(bank_slots(*one), [1, 2])
    np.testing.assert_array_equal(bank_slots(*four), range(7, 15))
    np.testing.assert_array_equal(bank_slots(np.array([-1]), 0, 0, (1, 4), 3), [15])


def test_pictures_are_placed_one_behind_the_other():
    layout = layout_of(TILED, 15, (36,))
    placed = layout.place([(300, 290), (50, 310), (200, 60)], first_grid=2)
    assert [p.tiling for p in placed] == [(2, 2), (1, 4), (3, 1)]
    assert [(p.first_view, p.first_grid) for p in placed] == [(0, 2), (5, 3), (10, 4)]
    first, second = (layout.slots(p, 36) for p in placed[:2])
    np.testing.assert_array_equal(second, first + 36)


def test_segments_without_a_plan_go_where_they_leave_the_least_room():
    layout = dataclasses.replace(layout_of(TILED, 5, (36,)), rows=2, length=10)
    out = layout.assemble([blank(5), blank(3), blank(7), blank(2)], [])
    assert [np.unique(row[row > 0]).tolist() for row in out["segment"]] == [[1, 2, 4], [3]]


def test_views_of_a_canvas_show_the_picture_at_the_top_left():
    (view,) = layout_of(OWN, 1, (36,)).see(Image.new("RGB", (200, 168), (255, 0, 0)))
    assert view.shape == (84, 140, 3)
    assert (view[:, :100, 0] == 255).all() and not view[:, 100:].any()


def test_a_picture_too_thin_for_a_scale_has_no_slots():
    layout = layout_of(OWN, 1, (36, 4))
    picture = PlacedPicture((300, 84), (), 0, 0)
    assert len(layout.slots(picture, 36)) == 20
    with pytest.raises(ValueError, match=r"300 x 84 pixels, fitted into a canvas of 140 x 84, .*at scale 4;"):
        layout.slots(picture, 4)


def test_bank_slots_are_disjoint_and_complete():
    tokens, grids = (1, 9, 36), 4
    pictures = [(0, 1), (1, 2), (3, 1)]  # first grid, grids
    slots = [bank_slots(np.arange(n * tokens[s]), first, s, tokens, grids) for s in range(3) for first, n in pictures]
    np.testing.assert_array_equal(np.sort(np.concatenate(slots)), np.arange(4 * 46))
    for number in range(3):  # the newline stands behind all of them
        with_newline = bank_slots(np.array([2, -1, 0]), 1, number, tokens, grids)
        assert with_newline[1] == 4 * 46 and with_newline[0] - with_newline[2] == 2


def test_a_conversation_is_cut_at_the_same_turn_at_every_scale(tiny):
    packs = open_packs(tiny("data.too_long=cut"), "train", packs_per_step=8, shuffle=False)
    layout, tokenizer = packs.layout, packs.tokenizer
    turns = [("user", "<image>\ndigit at b2?"), ("assistant", "7"), *[("user", "and?"), ("assistant", "no")] * 40]
    fitting = layout.training_segments(turns[:4], [(24, 24)], tokenizer, layout.scales)
    room = max(len(segment) for segment in fitting)
    cut = dataclasses.replace(layout, length=room).training_segments(turns, [(24, 24)], tokenizer, layout.scales)
    for a, b in zip(cut, fitting, strict=True):
        np.testing.assert_array_equal(a.id, b.id)
        np.testing.assert_array_equal(a.target, b.target)
    with pytest.raises(ValueError, match="raise data.length or set data.too_long=cut"):
        dataclasses.replace(layout, length=room, too_long="refuse").training_segments(
            turns, [(24, 24)], tokenizer, (1,)
        )
    with pytest.raises(ValueError, match="no supervised token"):
        layout.training_segments(turns[:1], [(24, 24)], tokenizer, layout.scales)


def test_canvases_say_what_they_show():
    layout = layout_of(OWN, 3, (36,))
    sizes = [(100, 84), (400, 300)]
    out = layout.assemble([], [(size, np.full((1, 84, 140, 3), 9, np.uint8)) for size in sizes])
    np.testing.assert_array_equal(out["extent"], [[84, 100], [84, 112], [0, 0]])
    assert "gather" not in out and out["pixels"].shape == (3, 84, 140, 3) and not out["pixels"][2].any()


def test_a_picture_that_is_not_shown_keeps_its_place():
    layout, size = layout_of(TILED, 10, (36,)), (300, 290)
    ones = np.ones((5, 84, 84, 3), np.uint8)
    both, second = (layout.assemble([], [(size, first), (size, ones)]) for first in (ones, None))
    assert not second["pixels"][:5].any() and (second["gather"][:, 0] == -1).all()
    np.testing.assert_array_equal(both["gather"][:, 1], second["gather"][:, 1])
    with pytest.raises(DoesNotFit, match=r"15 views of 3 pictures, room for 10; raise data\.views"):
        layout.assemble([], [(size, ones)] * 3)
