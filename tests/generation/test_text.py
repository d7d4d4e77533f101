"""Text as it comes: the same as decoding everything at once, for every tokenizer, split and stop text."""

import io
import random

import pytest
import sentencepiece as spm

from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece, train_tokenizer
from lmm_jax.generation.text import TextStream
from tests.data.tokenizer.test_tokenizer import Characters

WORDS = ["a", "b", "ab", "aab", " ", "  ", "\n", "cat", "é", "✓", "😀", "日本", "STOP", "\ufffd", ".", "▁"]
LINES = ["a cat ab aab", "STOP the cat.", "ab ab b a", "é ✓ a", "cat  cat"] * 20


class ByteLevel(Characters):
    """Pieces are bytes, and runs of bytes that need not end where a character does."""

    def __init__(self):
        texts = ["cat", " cat", " a", "ab", "✓✓", "é", " é", "😀", "日本", "STOP", "\n\n", ".\n", "aé"]
        runs = {text.encode()[a:b] for text in texts for a in range(9) for b in range(a + 2, 10)}
        self.pieces = [b"", b"", *(bytes([n]) for n in range(256)), *sorted(run for run in runs if len(run) > 1)]
        self.bos, self.eos, self.vocab_size = 0, 1, len(self.pieces)

    def encode(self, text, prefix=True):
        left, ids = text.encode(), []
        while left:
            ids.append(max((i for i in range(2, self.vocab_size) if left.startswith(self.pieces[i])), key=self._len))
            left = left[len(self.pieces[ids[-1]]) :]
        return ids

    def _len(self, i):
        return len(self.pieces[i])

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids if 0 <= i < self.vocab_size).decode(errors="replace")


def llama_like(**settings):
    """A SentencePiece model that keeps spaces and has markers, as that of LLaMA and Yi."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
        **settings,
    )
    return SentencePiece(out.getvalue(), added={"<|end|>": (400, True)})


@pytest.fixture(scope="module")
def tokenizers(pytestconfig):
    golden = pytestconfig.getoption("--golden")
    return {
        "ours": SentencePiece(train_tokenizer(LINES, 60)),
        "ours with bytes": SentencePiece(train_tokenizer(LINES, 400, byte_fallback=True)),
        "llama-like": llama_like(),
        "without dummy prefix": llama_like(add_dummy_prefix=False),
        "published": load_tokenizer(golden / "m3"),
        "characters": Characters("abcdefghijklmnopqrstuvwxyzSTOP0123 .\né✓日本"),
        "byte-level": ByteLevel(),
    }


KINDS = ("ours", "ours with bytes", "llama-like", "without dummy prefix", "published", "characters", "byte-level")


def random_ids(tokenizer, rng, words):
    """Ids of a random text, of random pieces, or of both mixed, control and padded ids among them."""
    ids = tokenizer.encode("".join(rng.choice(WORDS) for _ in range(words)))
    share = rng.choice([0, 0, 0.1, 1])
    return [rng.randrange(-1, tokenizer.vocab_size + 2) if rng.random() < share else i for i in ids]


def random_stops(text, rng):
    """Up to four stop texts: parts of a text, parts and neighbours of one another, and others."""
    stops = []
    for _ in range(rng.randrange(5)):
        at, size = rng.randrange(len(text) + 1), rng.randrange(1, 6)
        one = rng.choice([text[at : at + size], rng.choice(WORDS) + rng.choice(WORDS), *stops])
        stops.append(rng.choice([one, one, one[1:], one[:-1], one + "b", "a" + one]))
    return tuple(stop for stop in stops if stop)


def chunks(ids, rng, largest):
    """`ids` in order, in lists of random lengths, empty ones too."""
    at = 0
    while at < len(ids):
        size = rng.randrange(0, largest + 1)
        yield ids[at : at + size]
        at += size


def cut(text, stops):
    """A text up to the earliest stop text."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


def check(tokenizer, ids, stops, parts):
    """Streams `parts` of `ids`, and compares with the whole text at every step."""
    stream, shown, taken = TextStream(tokenizer, stops), "", []
    whole = tokenizer.decode(ids)
    text = cut(whole, stops)
    longest = max(map(len, stops), default=1)
    for part in parts:
        piece = stream.add(part)
        assert not (stream.ended and len(shown) == len(text)) or not piece
        shown, taken = shown + piece, taken + part
        assert text.startswith(shown)
        if not stream.ended:  # nothing is held back for longer than it must be
            known = tokenizer.decode(taken).rstrip("\ufffd")
            assert len(shown) >= len(known) - longest + 1 and stream.count == len(taken)
    assert (shown + stream.finish(), stream.finish()) == (text, "")
    if stream.ended:
        assert stream.add(ids) == ""
        count = stream.count
        assert len(text) < len(whole) and tokenizer.decode(ids[:count]).startswith(text)
        assert not any(tokenizer.decode(ids[:n]).startswith(text) for n in range(count))
    return stream, text, whole


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole_text_cut_at_the_earliest_stop_text(tokenizers, kind):
    tokenizer, rng, ends = tokenizers[kind], random.Random(kind), 0
    for _ in range(150):
        ids = random_ids(tokenizer, rng, rng.choice([1, 5, 20]))
        stops = random_stops(tokenizer.decode(ids), rng)
        for largest in (1, 2, 7, len(ids) + 1):
            stream = TextStream(tokenizer, stops)
            check(tokenizer, ids, stops, chunks(ids, rng, largest))
            text = "".join([*(stream.add(part) for part in chunks(ids, rng, largest)), stream.finish()])
            whole = tokenizer.decode(ids)
            assert text == cut(whole, stops) and stream.ended == any(stop in whole for stop in stops)
            assert stream.ended or stream.count == len(ids)
            ends += stream.ended
    assert 60 < ends < 540  # of 600: both happen


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_answer_is_the_same_text_and_costs_in_proportion_to_its_length(tokenizers, kind):
    tokenizer, rng = tokenizers[kind], random.Random(kind)
    decoded = 0

    class Counted:
        def decode(self, ids):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.decode(ids)

    for stops in ((), ("\n\n\n\n", "cat cat ab"), ("not in any answer",)):
        ids = [i for _ in range(3) for i in random_ids(tokenizer, rng, 500)]
        decoded, stream = 0, TextStream(Counted(), stops)
        text = "".join([*(stream.add([i]) for i in ids), stream.finish()])
        assert text == cut(tokenizer.decode(ids), stops)
        assert decoded < 150 * len(ids) + 5000
        check(tokenizer, ids, stops, chunks(ids, rng, 100))


def test_half_a_character_is_not_shown_until_it_is_whole_or_the_answer_ends(tokenizers):
    for kind in ("llama-like", "byte-level"):
        tokenizer = tokenizers[kind]
        head, parts = tokenizer.encode("a"), [b"\xf0", b"\x9f", b"\x98", b"\x80"]
        if kind == "byte-level":
            parts = [tokenizer.pieces.index(part) for part in parts]
        else:
            parts = [i for i in tokenizer.encode("😀", prefix=False)]
        assert len(parts) == 4
        stream = TextStream(tokenizer)
        assert [stream.add(head), *(stream.add([i]) for i in parts), stream.finish()] == ["a", "", "", "", "😀", ""]
        stream = TextStream(tokenizer)
        assert [stream.add([*head, *parts[:2]]), stream.finish()] == ["a", tokenizer.decode(parts[:2])]
        stream = TextStream(tokenizer)
        broken = tokenizer.decode(parts[:2]) + "b"
        b = tokenizer.encode("ab", prefix=False)
        assert "".join([stream.add([*head, *parts[:2]]), stream.add(b)]) == f"a{broken[:-1]}ab"


STOPPED = [
    # stop texts, letters that come one by one, what is shown after each, what is left to the end, ids of the text
    (["stop"], "a stop b", ["a", " ", "", "", "", "", "", ""], "", 2),
    (["stop"], "a stob", ["a", " ", "", "", "", "stob"], "", 6),
    (["stop"], "a sto", ["a", " ", "", "", ""], "sto", 5),
    (["stop"], "sstop", ["", "s", "", "", ""], "", 1),
    (["stop"], "stop", ["", "", "", ""], "", 0),
    (["ab", "abc"], "xabc", ["x", "", "", ""], "", 1),
    (["abc", "bc"], "xabc", ["x", "", "", ""], "", 1),
    (["abcd", "bc"], "xabcd", ["x", "", "", "", ""], "", 1),
    (["abcd", "bc"], "xabce", ["x", "", "", "", "a"], "", 2),
    (["abcd", "bc"], "xabc", ["x", "", "", ""], "a", 2),
    (["aa"], "baaa", ["b", "", "", ""], "", 1),
    (["aab"], "aaab", ["", "", "a", ""], "", 1),
]


@pytest.mark.parametrize(("stops", "letters", "pieces", "rest", "count"), STOPPED)
def test_what_may_become_a_stop_text_waits(stops, letters, pieces, rest, count):
    tokenizer = Characters("abcdeopstx ")
    stream = TextStream(tokenizer, stops)
    assert [stream.add(tokenizer.encode(letter)) for letter in letters] == pieces
    assert (stream.finish(), stream.count) == (rest, count)
    assert stream.ended == any(stop in letters for stop in stops)


def test_a_stop_text_may_begin_and_end_inside_of_ids(tokenizers):
    tokenizer = tokenizers["byte-level"]
    ids = [tokenizer.pieces.index(piece) for piece in (b"cat", b".\n", b"\n\n", b"cat")]
    for stops, text, count in (
        (("\n\n",), "cat.", 2),
        (("t.",), "ca", 1),
        (("\n",), "cat.", 2),
        ((".\n",), "cat", 1),
        (("c",), "", 0),
    ):
        for largest in (1, 2, 4):
            stream = TextStream(tokenizer, stops)
            pieces = [stream.add(ids[at : at + largest]) for at in range(0, 4, largest)]
            assert ("".join(pieces), stream.finish(), stream.count, stream.ended) == (text, "", count, True)


def test_the_space_at_the_beginning_is_that_of_the_whole_text(tokenizers):
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        for text in (" a cat", "   a", " ", "\n a", " \n"):
            for prefix in (True, False):
                ids = tokenizer.encode(text, prefix)
                stream = TextStream(tokenizer)
                assert "".join([*(stream.add([i]) for i in ids), stream.finish()]) == tokenizer.decode(ids)


def test_spaces_behind_a_long_text_are_all_shown(tokenizers):
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        spaces = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([*tokenizer.encode("ab"), i])[2:] == " "]
        for space in spaces:
            ids = [*tokenizer.encode("ab") * 30, *[space] * 100, *tokenizer.encode("ab")]
            stream = TextStream(tokenizer)
            shown = "".join([*(stream.add([i]) for i in ids), stream.finish()])
            assert shown == tokenizer.decode(ids) and shown.endswith(" " * 100 + shown.split()[-1])
        assert spaces


def test_an_answer_without_ids_is_empty():
    stream = TextStream(Characters("ab"), ["a"])
    assert (stream.add([]), stream.finish(), stream.count, stream.ended) == ("", "", 0, False)
