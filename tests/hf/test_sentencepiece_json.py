"""A SentencePiece model as tokenizer.json: the ids of any text, and models that it cannot hold."""

import random

import pytest

from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.hf.tokenizer_json import added_ids, tokenizer_json
from tests.hf.conftest import train

TEXTS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "  a",
    "a ",
    "a  b",
    "\n",
    "\na",
    "a\n",
    "\t",
    "a\tb",
    "\r\n",
    "日本語 text",
    "ä ﬁ ½",
]
TEXTS += ["🙂 x 🙂🙂", "e\u0301", "\u3000wide", "\u00a0", "<0x41>", "a▁b", "x\u0000y", "a \n b  "]
BITS = ["a", "b", "ab", "the", " ", "  ", "\n", "é", "日", "=", "-", "7", "ASSISTANT:", "🙂", " cat", "\t"]
REPEATED = ["aaaaaaa", "ababababab", "-" * 9, "=" * 5 + " " * 7]


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_any_text(transformers, models, write, legacy):
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choices(BITS, k=rng.randrange(1, 25))) for _ in range(150)]
    for name, model in models.items():
        for added in ({}, {"<|end|>": (2000, False), "<|user|>": (2001, True)}):
            tokenizer = SentencePiece(model, legacy, added)
            loaded = transformers.AutoTokenizer.from_pretrained(write(tokenizer)[1])
            # Of cuts that score the same, sums in float32 choose another one than sums in float64.
            some = texts if name.startswith("unigram") else texts + REPEATED
            for text, ids in zip(some, loaded(some).input_ids, strict=True):
                assert ids == [tokenizer.bos, *tokenizer.encode(text)], (name, text)
            assert loaded.convert_tokens_to_ids(list(added)) == [i for i, _ in added.values()]
            image, pad, _ = added_ids(tokenizer)
            assert loaded.convert_tokens_to_ids(["<image>", "<pad>"]) == [image, pad]
            assert (loaded.pad_token_id, loaded.eos_token_id) == (pad, tokenizer.eos)
            assert loaded.padding_side == "left" and loaded(["a cat", "a"], padding=True).input_ids[1][0] == pad
            ids = [tokenizer.bos, *tokenizer.encode("the cat  sat"), tokenizer.eos, image, pad]
            assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "word", "vocab_size": 20}, "of type BPE and Unigram"),
        ({"model_type": "bpe", "vocab_size": 80, "treat_whitespace_as_suffix": True}, "▁ before a word"),
    ],
)
def test_models_that_the_format_cannot_hold_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_json(SentencePiece(train(**settings)))
