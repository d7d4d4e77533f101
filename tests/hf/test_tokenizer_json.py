"""A tokenizer of any kind as transformers reads it: the pieces that are added, and kinds that have no converter."""

import types

import pytest

from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.hf.tokenizer_json import added_ids, tokenizer_config, tokenizer_json


def test_added_ids_follow_the_pieces_or_are_those_that_are_there(models):
    plain = SentencePiece(models["LLaMA"])
    n = plain.vocab_size
    assert added_ids(plain) == (n, n + 1, -(-(n + 2) // 64) * 64)
    assert added_ids(SentencePiece(models["LLaMA"], added={"<image>": (2000, False)})) == (2000, 2001, 2048)
    assert added_ids(SentencePiece(models["LLaMA"], added={"<pad>": (2046, False)})) == (2047, 2046, 2048)


def test_a_kind_without_a_converter_is_refused_by_name():
    letters = types.SimpleNamespace(kind="letters", vocab_size=30)
    message = r"kind 'letters' has no converter \(kinds that have one: sentencepiece, huggingface\)"
    for ask in (added_ids, tokenizer_json, lambda tokenizer: tokenizer_config(tokenizer, 2)):
        with pytest.raises(ValueError, match=message):
            ask(letters)
