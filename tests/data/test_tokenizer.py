"""SentencePiece behind explicit control ids."""

import pickle

import pytest

from lmm_jax.data.tokenizer import Tokenizer, train_tokenizer

LINES = ["digit at b2?", "how many 7s?", "7 1 2 3", "yes", "no"] * 50


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(train_tokenizer(LINES, 60))


def test_round_trip_and_cells_are_one_piece(tokenizer):
    for line in LINES[:5]:
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert [tokenizer.piece(i) for i in tokenizer.encode("digit at b2?")][-1] == "▁b2?"


def test_control_pieces_cannot_come_from_text(tokenizer):
    ids = tokenizer.encode("</s> <s> <image>")
    assert tokenizer.eos not in ids and tokenizer.bos not in ids


def test_pickles_and_keeps_its_fingerprint(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("how many 7s?") == tokenizer.encode("how many 7s?")


def test_padded_ids_decode_to_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("yes"), tokenizer.eos, tokenizer.vocab_size + 5]) == "yes"


def test_a_broken_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")
