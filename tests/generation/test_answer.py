"""An answer with what is known about it."""

import dataclasses

import pytest

from lmm_jax.generation.answer import REASONS, Answer


@pytest.mark.parametrize("reason", REASONS)
def test_an_answer_does_not_change_and_is_equal_to_its_like(reason):
    answer = Answer("yes", (7, 8), (-0.5, -0.25), reason, 12, 9, 9)
    assert answer == Answer("yes", (7, 8), (-0.5, -0.25), reason, 12, 9, 9)
    assert hash(answer) == hash(dataclasses.replace(answer)) != hash(dataclasses.replace(answer, text="no"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        answer.text = "no"


def test_each_id_has_a_logprob_and_each_end_a_reason():
    with pytest.raises(ValueError, match="2 ids have 1 logprobs; each has one"):
        Answer("yes", (7, 8), (-0.5,), "end", 12, 9, 9)
    with pytest.raises(ValueError, match="reason 'eos' is none of end, stop, length"):
        Answer("yes", (), (), "eos", 12, 9, 9)
