"""A model answers: one prompt or many, at any scale, the same in any batch and after it was saved and loaded."""

import jax
import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax.data.prepared import Prepared, as_pictures
from lmm_jax.generation.model import Model

QUESTIONS = ("read all", "digit at b2?", "how many 7s are there?")


@pytest.fixture(scope="module")
def model(setup, digits_folder):
    """The digits' model with its first values."""
    s = setup(1)
    return Model(s.program, s.state.params, Prepared(digits_folder, "train").tokenizer)


@pytest.fixture(scope="module")
def pictures(digits_folder):
    data = Prepared(digits_folder, "test")
    return [as_pictures(data[row])[0] for row in range(6)]


def test_generate_takes_one_or_many_and_any_scale(model, pictures):
    one = model.generate(images=[pictures[0]], prompt="read all", scale=9, max_new_tokens=5)
    assert isinstance(one, str) and one
    many = model.generate(
        images=[[p] for p in pictures[:3]], prompt=["read all"] * 3, scale=9, max_new_tokens=5, batch_size=2
    )
    assert len(many) == 3 and many[0] == one
    with pytest.raises(ValueError, match=r"16 tokens do not tile a 6×6 grid; valid scales are \[1, 4, 9, 36\]"):
        model.generate(images=[pictures[0]], prompt="read all", scale=16)
    with pytest.raises(ValueError, match="2 <image> tags in the text, 1 pictures"):
        model.generate(images=[pictures[0]], prompt="<image> <image> read all")
    assert isinstance(model.generate(prompt="how many?", max_new_tokens=2), str)  # text alone


def test_answers_do_not_depend_on_their_batch(model, pictures):
    """Prompts of several lengths, with one picture, two or none."""
    asked = [([p], question) for p, question in zip(pictures, QUESTIONS, strict=False)]
    asked += [([pictures[3]], "digit <image> at a1?"), (pictures[4:6], "alike?"), ([], "how many?")]
    images, prompts = map(list, zip(*asked, strict=True))
    together = model.generate_ids(images, prompts, 4, 6)
    assert together == [model.generate_ids([of], [prompt], 4, 6)[0] for of, prompt in asked]
    assert len({tuple(ids) for ids in together}) > 1


def test_the_positions_of_pictures_are_counted_as_they_stand_in_the_prompt(model, pictures):
    for scale in (1, 4, 9, 36):
        batch = model.batch(pictures[:2], "<image> and <image>", scale)
        assert (batch["slot"] >= 0).sum() == model.visual_tokens(pictures[:2], scale) == 2 * scale
    assert model.visual_tokens(pictures[:1]) == 36  # of the largest scale that was trained


def test_what_is_saved_loads_to_the_bit_and_answers_alike(model, pictures, tmp_path):
    model.save(tmp_path / "saved")
    again = lmm.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), jax.device_get(again.params))
    assert again.scales == model.scales == (1, 4, 9, 36) and again.stop == model.stop
    asked = [[p] for p in pictures[:2]], ["read all"] * 2
    assert again.generate_ids(*asked, 9, 5) == model.generate_ids(*asked, 9, 5)
    with pytest.raises(FileNotFoundError, match="neither a workdir"):
        lmm.load(tmp_path / "nothing")
