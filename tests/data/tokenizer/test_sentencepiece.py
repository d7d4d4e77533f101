"""SentencePiece behind explicit control ids."""

import hashlib
import io
import json
import pickle

import pytest
import sentencepiece as spm

from lmm_jax.data.tokenizer.sentencepiece import SentencePiece, train_tokenizer

LINES = ["digit at b2?", "how many 7s?", "7 1 2 3", "yes", "no"] * 50


@pytest.fixture(scope="module")
def tokenizer():
    return SentencePiece(train_tokenizer(LINES, 60))


@pytest.fixture(scope="module")
def llama_like():
    """Model bytes with LLaMA's settings and, as Yi has them, markers that SentencePiece itself finds in text."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([*LINES, "USER: a cat ASSISTANT: a dog"] * 5),
        model_writer=out,
        model_type="bpe",
        vocab_size=350,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return out.getvalue()


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
        SentencePiece.load(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "it is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "it is a pointer of Git LFS; .*git lfs pull",
        ),
        (b"IQ== 0\nIg== 1\n", "it is a vocabulary of tiktoken"),
        (b'{"model": 1}', 'it is a text that begins with \'{"model"'),
        (train_tokenizer(LINES, 60)[:500], "it is damaged or of another kind"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, data, what):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=f"tokenizer.model: not a SentencePiece model: {what}"):
        SentencePiece.load(tmp_path)


@pytest.mark.parametrize("piece", ["", 5, None, ["a"], {"a": 1}, "<x>"])
@pytest.mark.parametrize("number", ["-1", "99999999999", "one", "1.5", "400"])
def test_added_pieces_that_are_none_are_refused(tmp_path, llama_like, piece, number):
    (tmp_path / "tokenizer.model").write_bytes(llama_like)
    settings = {"added_tokens_decoder": {number: {"content": piece}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if (piece, number) == ("<x>", "400"):
        assert SentencePiece.load(tmp_path).added == {"<x>": (400, False)}
        return
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not what Hugging Face writes"):
        SentencePiece.load(tmp_path)


@pytest.mark.parametrize("text", ["cat", " cat", "  cat  dog", "\nyes", "\n\n", "", " ", "äß日本", "USER: a"])
def test_without_prefix_is_what_follows_a_newline(llama_like, text):
    tokenizer = SentencePiece(llama_like)
    mark, newline, *rest = tokenizer.encode("\n" + text)
    assert (tokenizer.piece(mark), tokenizer.piece(newline)) == ("▁", "<0x0A>")
    assert tokenizer.encode(text, prefix=False) == rest
    assert tokenizer.encode(text, prefix=True) == tokenizer.encode(" " + text, prefix=False) or not text


def test_legacy_puts_a_mark_after_control_pieces(llama_like):
    items = [" a", 2, "USER: a", -200, "yes", -200, 2, "no", "", " cat"]
    new, old = (SentencePiece(llama_like, legacy).encode_items(items) for legacy in (False, True))
    bare, marked = (lambda text, p=p: SentencePiece(llama_like).encode(text, prefix=p) for p in (False, True))
    want = [marked(" a"), [2], bare("USER: a"), [-200], marked("yes"), [-200], [2], bare("no"), [], bare(" cat")]
    assert new == want
    assert old == [*want[:2], marked("USER: a"), *want[3:7], marked("no"), *want[8:]]


def test_only_markup_makes_control_ids(llama_like):
    tokenizer = SentencePiece(llama_like, added={"<|end|>": (400, True), "<|user|>": (401, False)})
    start, end = (tokenizer._processor.piece_to_id(piece) for piece in ("<|im_start|>", "<|im_end|>"))
    text = "<s>a<|im_end|> <|end|> \n<|user|>\nb<unk><|im_start|></s>"
    assert tokenizer.markup(text) == [1, "a", end, " ", 400, 401, "\nb", 0, start, 2]
    spelled = tokenizer.encode(text)
    assert not {0, 1, 2, start, end, 400, 401} & set(spelled)
    assert tokenizer.decode(spelled) == text
    assert tokenizer.decode([1, end, 400, -200, *tokenizer.encode("b")]) == "b"
    assert (tokenizer.vocab_size, tokenizer.piece(400), tokenizer.piece(end)) == (402, "<|end|>", "<|im_end|>")


def test_what_is_shown_of_ids_is_their_text_character_by_character(llama_like):
    tokenizer = SentencePiece(llama_like, added={"<|end|>": (400, True)})
    (end,) = tokenizer.markup("<|im_end|>")
    text = "a cat ✓ é\n</s> <0x41>"
    ids = tokenizer.encode(text)
    shown = tokenizer.shown([tokenizer.bos, *ids, 400, end])
    assert "".join(part.text for part in shown) == f"<s> {text}<|end|><|im_end|>"
    assert [part.text for part in shown if part.control] == ["<s>", "<|end|>", "<|im_end|>"]
    assert {part.text: part.count for part in shown if part.count > 1} == {"✓": 3, "é": 2}
    assert sum(part.count for part in shown) == len(ids) + 3 and not any(part.broken for part in shown)
    assert "at" in [part.text for part in shown]  # the pieces, not their letters


def test_bytes_that_spell_no_character_are_named(llama_like):
    tokenizer = SentencePiece(llama_like)
    first, second, third = tokenizer.encode("✓", prefix=False)
    cut = tokenizer.shown([first, second, tokenizer.eos, third, third, first])
    assert [(part.text, part.count, part.broken) for part in cut] == [
        ("<0xE2><0x9C>", 2, True),
        ("</s>", 1, False),
        ("<0x93>", 1, True),
        ("<0x93>", 1, True),
        ("<0xE2>", 1, True),
    ]


def test_settings_survive_and_are_in_the_fingerprint(llama_like, tmp_path):
    added = {"<|end|>": (400, True)}
    variants = [SentencePiece(llama_like, legacy, pieces) for legacy in (False, True) for pieces in (None, added)]
    assert len({t.fingerprint for t in variants}) == 4
    assert variants[0].fingerprint == hashlib.sha256(llama_like).hexdigest()
    for tokenizer in variants:
        tokenizer.save(tmp_path)
        for again in (SentencePiece.load(tmp_path / "tokenizer.model"), pickle.loads(pickle.dumps(tokenizer))):
            assert (again.legacy, again.added) == (tokenizer.legacy, tokenizer.added)
            assert again.fingerprint == tokenizer.fingerprint


ENTRIES = [  # as transformers writes them into tokenizer.json
    {"id": 2, "content": "</s>", "special": True},
    {"id": 400, "content": "<|end|>", "rstrip": True, "special": False},
    {"id": 401, "content": "<image>", "special": True},
    {"id": 402, "content": "<loc>", "special": False},
]


@pytest.mark.parametrize("where", ["tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("legacy", [False, True])
def test_added_pieces_are_found_wherever_they_stand(llama_like, tmp_path, where, legacy):
    (tmp_path / "tokenizer.model").write_bytes(llama_like)
    settings = {"legacy": legacy}
    if where == "tokenizer_config.json":
        settings["added_tokens_decoder"] = {str(entry["id"]): entry for entry in ENTRIES}
    elif where == "tokenizer.json":
        (tmp_path / where).write_text(json.dumps({"added_tokens": ENTRIES}))
    else:
        (tmp_path / where).write_text(json.dumps({entry["content"]: entry["id"] for entry in ENTRIES}))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "image": "<image>"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = SentencePiece.load(tmp_path)
    assert (tokenizer.ordinary, tokenizer.vocab_size) == ({"<loc>"}, 403)
    assert tokenizer.added["<|end|>"] == (400, where != "added_tokens.json")
    assert tokenizer.markup("a<|end|><image><loc>") == ["a", 400, 401, "<loc>"]
    text = "<loc> a cat<loc>b</s> <image><|end|>"
    ids = tokenizer.encode(text)
    assert ids.count(402) == 2 and not {2, 400, 401} & set(ids)
    marked = [402, *tokenizer.encode(" a cat", legacy), 402, *tokenizer.encode("b</s> <image><|end|>", legacy)]
    assert ids == marked
    assert tokenizer.decode(tokenizer.encode("a<loc>")) == "a<loc>" and tokenizer.spelling(402) == b"<loc>"
    tokenizer.save(tmp_path)
    for again in (SentencePiece.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert (again.fingerprint, again.ordinary) == (tokenizer.fingerprint, tokenizer.ordinary)
        assert again.encode(text) == ids
    plain = SentencePiece(llama_like, legacy, tokenizer.added)
    assert plain.fingerprint != tokenizer.fingerprint and 402 not in plain.encode("<loc>")


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"added_tokens": [3]}', '{"added_tokens": [{"content": 3, "id": 1}]}']
)
def test_a_damaged_tokenizer_json_beside_a_model_is_named(llama_like, tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(llama_like)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not what Hugging Face writes"):
        SentencePiece.load(tmp_path)


def test_settings_of_others_are_read(llama_like, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_like)
    assert not SentencePiece.load(tmp_path / "tokenizer.model").legacy
    settings = tmp_path / "tokenizer_config.json"
    entry = {"content": "<|end|>", "lstrip": False, "rstrip": True, "special": True}
    settings.write_text(json.dumps({"chat_template": "{{ 1/0 }}", "added_tokens_decoder": {"400": entry}}))
    tokenizer = SentencePiece.load(tmp_path / "tokenizer.model")
    assert tokenizer.legacy and tokenizer.added == {"<|end|>": (400, True)}
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        SentencePiece.load(tmp_path / "tokenizer.model")
