"""What is supervised follows from how a conversation is built."""

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE, encode
from lmm_jax.data.prepared import Prepared

TURNS = [("user", "<image>\ndigit at b2?"), ("assistant", "7"), ("user", "is there a 3?"), ("assistant", "no")]


@pytest.fixture(scope="module")
def tokenizer(digits_folder):
    return Prepared(digits_folder, "train").tokenizer


def test_answers_and_their_ends_are_supervised(tokenizer):
    ids, supervised = encode(TURNS, tokenizer, "qa")
    t = tokenizer
    assert ids[0] == t.bos and ids[1] == IMAGE
    want = [*t.encode("7"), t.eos, *t.encode("no"), t.eos]
    np.testing.assert_array_equal(ids[supervised], want)
    np.testing.assert_array_equal(ids[~supervised][2:], t.encode("digit at b2?") + t.encode("is there a 3?"))


def test_an_open_turn_is_a_prefix_of_the_whole(tokenizer):
    whole, _ = encode(TURNS, tokenizer, "qa")
    for n in (1, 3):
        ids, supervised = encode(TURNS[:n], tokenizer, "qa")
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        assert not supervised[-1]


def test_images_stay_where_they_are(tokenizer):
    ids, _ = encode([("user", "digit <image> at <image>"), ("assistant", "7")], tokenizer, "qa")
    t = tokenizer
    want = [t.bos, *t.encode("digit "), IMAGE, *t.encode("at"), IMAGE, *t.encode("7"), t.eos]
    np.testing.assert_array_equal(ids, want)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([("assistant", "7")], "turn 1 has role 'assistant', expected 'user'"),
        ([("user", "a"), ("user", "b")], "turn 2 has role 'user'"),
        ([("user", "a"), ("system", "b")], "turn 2 has role 'system'"),
        ([("user", "a"), ("assistant", "  ")], "turn 2: empty answer"),
    ],
)
def test_bad_turns_are_named(tokenizer, turns, message):
    with pytest.raises(ValueError, match=message):
        encode(turns, tokenizer, "qa")


def test_unknown_template_lists_the_known(tokenizer):
    with pytest.raises(ValueError, match="no template 'vicunia'"):
        encode(TURNS, tokenizer, "vicunia")
