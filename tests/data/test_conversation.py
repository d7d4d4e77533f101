"""What is supervised follows from how a conversation is built."""

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE, encode
from lmm_jax.data.prepared import Prepared

TURNS = [("user", "<image>\ndigit at b2?"), ("assistant", "7"), ("user", "is there a 3?"), ("assistant", "no")]


@pytest.fixture(scope="module")
def tokenizer(digits_folder):
    return Prepared(digits_folder, "train").tokenizer


def ids_and_mask(turns, tokenizer, template="qa"):
    encoded = encode(turns, tokenizer, template)
    return encoded.ids, encoded.supervised


def test_answers_and_their_ends_are_supervised(tokenizer):
    ids, supervised = ids_and_mask(TURNS, tokenizer)
    t = tokenizer
    assert ids[0] == t.bos and ids[1] == IMAGE
    want = [*t.encode("7"), t.eos, *t.encode("no"), t.eos]
    np.testing.assert_array_equal(ids[supervised], want)
    np.testing.assert_array_equal(ids[~supervised][2:], t.encode("digit at b2?") + t.encode("is there a 3?"))


def test_an_open_turn_is_a_prefix_of_the_whole(tokenizer):
    whole, _ = ids_and_mask(TURNS, tokenizer)
    for n in (1, 3):
        ids, supervised = ids_and_mask(TURNS[:n], tokenizer)
        np.testing.assert_array_equal(ids, whole[: len(ids)])
        assert not supervised[-1]


def test_images_stay_where_they_are(tokenizer):
    ids, _ = ids_and_mask([("user", "digit <image> at <image>"), ("assistant", "7")], tokenizer)
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
