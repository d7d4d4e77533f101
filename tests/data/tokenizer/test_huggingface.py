"""A tokenizer.json: the ids of transformers for any text, and control pieces that data cannot forge."""

import base64
import json
import pathlib
import pickle
import random
import unicodedata

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken

from lmm_jax.cli import main
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.tokenizer import huggingface, load_tokenizer
from lmm_jax.data.tokenizer.huggingface import EXTRA, HuggingFace
from lmm_jax.data.tokenizer.tokenizer import MARKER
from tests.data.tokenizer.kinds import LOC, NAMED, write

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
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
    "\n\n",
    "a\n\n\nb",
    "\t",
    "a\tb",
    "\r\n",
    " \n ",
]
TEXTS += ["日本語 text", "中文，文本。", "한국어", "ä ﬁ ½", "🙂 x 🙂🙂", "👩\u200d👩\u200d👧 🇩🇪"]
TEXTS += [
    "e\u0301 a\u0308\u0323",
    "\u1100\u1161\u11a8",
    "\u3000wide",
    "\u00a0",
    "<0x41>",
    "a▁b",
    "▁",
    "x\u0000y",
    "a \n b  ",
    "it's IT'S",
]
TEXTS += ["1234567 12,345.6", "<loc> a<loc>b <loc>", "for i in x:\n    print(f'{i:>3}')  # ok\n\n", "\u200bz\u200d"]
TEXTS += ["\U0010ffff\ufffe", "İ ß ẞ", "<|im_", "_end|>"]
BITS = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "é",
    "日本",
    "=",
    "-",
    "7",
    "42",
    "ASSISTANT:",
    "🙂",
    " cat",
]
BITS += [
    "<|",
    "|>",
    "<|im_",
    "_end|>",
    "</",
    "s>",
    "<",
    ">",
    "<loc",
    "<loc>",
    "'s",
    "e\u0301",
    "\u00a0",
    "▁",
    "<0x0A>",
]
RANGES = [
    (0x20, 0x7F),
    (0xA0, 0x24F),
    (0x300, 0x36F),
    (0x400, 0x52F),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0x1100, 0x11FF),
]
RANGES += [
    (0x2000, 0x206F),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xFB00, 0xFFEF),
    (0x1F300, 0x1FAFF),
]


PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def golden_texts():
    """All texts of the golden sets."""

    def strings(x):
        if isinstance(x, str):
            yield x
        elif isinstance(x, list | dict):
            for value in x.values() if isinstance(x, dict) else x:
                yield from strings(value)

    paths = [path for path in GOLDEN.rglob("*.json") if path.name != "grad_norms.json"]
    return list(dict.fromkeys(text for path in paths for text in strings(json.loads(path.read_text()))))


def fuzzed(count):
    """Random strings over Unicode, with runs of white space, digits and parts of special tokens."""
    rng = random.Random(0)

    def bit():
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(BITS)
        if kind < 0.7:
            return rng.choice(" \n\t0123456789") * rng.randrange(1, 9)
        low, high = rng.choice(RANGES) if kind < 0.95 else (0, 0x10FFFF)
        code = rng.randint(low, high)
        return chr(code) if not 0xD800 <= code < 0xE000 else "?"

    return ["".join(bit() for _ in range(rng.randrange(1, 30))) for _ in range(count)]


def free_of(control, texts):
    """Those texts that hold no control piece, not even one that a tokenizer's normalisation makes of ＜s＞."""
    plain = [text + unicodedata.normalize("NFKC", text) for text in texts]
    return [text for text, both in zip(texts, plain, strict=True) if not any(piece in both for piece in control)]


@pytest.mark.parametrize("name", NAMED)
def test_ids_of_texts_are_those_of_transformers(transformers, tmp_path, name):
    check_ids(transformers, tmp_path, name, TEXTS + golden_texts() + fuzzed(300))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_ids_of_ten_thousand_fuzzed_texts_are_those_of_transformers(transformers, tmp_path, name):
    check_ids(transformers, tmp_path, name, fuzzed(10_000))


def check_ids(transformers, folder, name, texts):
    ours = load_tokenizer(write(folder, name))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.kind == "huggingface" and ours.vocab_size == len(theirs)
    free = free_of(ours._control, texts)
    assert len(free) > 0.9 * len(texts)
    for text, want in zip(free, theirs(free, add_special_tokens=False).input_ids, strict=True):
        assert ours.encode(text) == want, text
        assert ours.decode(want) == theirs.decode(want, **PLAIN), text
    assert ours.eos == theirs.eos_token_id
    assert ([] if ours.bos is None else [ours.bos]) == theirs("").input_ids


@pytest.mark.parametrize("name", NAMED)
def test_data_cannot_forge_a_control_piece(tmp_path, name):
    tokenizer = load_tokenizer(write(tmp_path, name, [LOC, AddedToken("<|fim|>", special=False)], pad_token="[PAD]"))
    control = set(tokenizer._control.values()) - {tokenizer.vocab.get("<unk>"), tokenizer.vocab.get("[UNK]")}
    assert {"<|fim|>", "[PAD]"} <= tokenizer._control.keys() and tokenizer.vocab["<loc>"] not in control
    rng, pieces = random.Random(0), [*tokenizer._control, "＜s＞", " 3 ", "<loc>"]
    texts = [*pieces, *(f"a{piece} b" for piece in pieces)]
    texts += ["".join(rng.choices(pieces + BITS, k=8)) for _ in range(300)]
    for text in texts:
        for prefix in (True, False):
            ids = tokenizer.encode(text, prefix)
            assert not control & set(ids), text
            if tokenizer._byte_level and name != "qwen":  # which normalises
                assert tokenizer.decode(ids) == text
    loc = tokenizer.vocab["<loc>"]
    assert loc in tokenizer.encode("a <loc> b") and "<loc>" in tokenizer.decode([loc])
    assert tokenizer.markup("<|fim|>a<loc>") == [tokenizer.vocab["<|fim|>"], "a<loc>"]


@pytest.mark.parametrize("name", NAMED)
def test_it_pickles_and_is_saved_byte_by_byte(tmp_path, name):
    (tmp_path / "again").mkdir()
    tokenizer = load_tokenizer(write(tmp_path, name))
    tokenizer.save(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    for other in (pickle.loads(pickle.dumps(tokenizer)), HuggingFace.load(tmp_path / "again/tokenizer.json")):
        assert other.fingerprint == tokenizer.fingerprint and other.encode("a <loc>") == tokenizer.encode("a <loc>")
        assert (other.bos, other.eos, other.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
    other = load_tokenizer(write(tmp_path, name, added=()))
    assert other.fingerprint != tokenizer.fingerprint


def test_flags_of_added_tokens_act_as_in_transformers(transformers, tmp_path):
    flags = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": False}, {"normalized": True}]
    control = [AddedToken(f"<|c{n}|>", special=True, **f) for n, f in enumerate(flags[:4])]
    ordinary = [AddedToken(f"<É{n}>", special=False, **f) for n, f in enumerate(flags)]
    texts = ["a <É0> b", "a<É1>  b", "a<É2>b a <É2> b", "a<É3>b", "<E\u03014><É4>", "x <É1> <É0>", "<É0>a <É1>"]
    ours_too = ["<|c0|>x  <|c0|>x", "<|c1|>  x<|c1|>\n\nx", "a<|c2|>b <|c2|> c", "<|c3|> a<|c1|> <|c0|>b"]
    for name in ("qwen", "bpe fallback", "bpe fallback, legacy"):
        tokenizer = load_tokenizer(write(tmp_path, name, [*control, *ordinary]))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            assert tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids, (name, text)
        for text in ours_too:  # of our own: with control pieces
            ids = [i for part in tokenizer.encode_items(tokenizer.markup(text)) for i in part]
            assert ids == theirs(text, add_special_tokens=False).input_ids, (name, text)


def test_old_folders_say_in_other_files_what_was_added(transformers, tmp_path):
    write(tmp_path, "qwen", added=())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>", "rstrip": True}}))
    first = load_tokenizer(tmp_path).vocab_size - 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": first, "<box>": first + 1}))
    tokenizer, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_tokens_to_ids(["<pad>", "<box>"]) == [first, first + 1]
    assert tokenizer.encode("a<box>") == theirs("a<box>", add_special_tokens=False).input_ids
    assert (tokenizer.pad, tokenizer.vocab["<pad>"], tokenizer.vocab["<box>"]) == ("<pad>", first, first + 1)
    assert first not in tokenizer.encode("<pad>") and first + 1 in tokenizer.encode("<box>")


def test_what_transformers_writes_anew_is_the_same_tokenizer(transformers, tmp_path):
    for name in NAMED:
        tokenizer = load_tokenizer(write(tmp_path, name))
        (tmp_path / name).mkdir()
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert (again.vocab, again.bos, again.eos) == (tokenizer.vocab, tokenizer.bos, tokenizer.eos)
        assert again._control == tokenizer._control
        assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_pieces_of_an_export_alone_are_no_part_of_the_tokenizer(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, "qwen"))
    extra = [AddedToken("<image>", special=True), AddedToken("<pad>", special=True)]
    other = load_tokenizer(write(tmp_path, "qwen", [LOC, *extra], **{EXTRA: ["<image>", "<pad>"], "x": "<pad>"}))
    assert (other.fingerprint, other.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert other.encode("<image>") == tokenizer.encode("<image>")


@pytest.mark.parametrize("name", NAMED)
def test_what_is_shown_of_ids_spells_the_text(tmp_path, name):
    tokenizer = load_tokenizer(write(tmp_path, name))
    for text in ("a cat 🙂 日本 <loc> x", "<loc>", "déjà vu\n"):
        ids = tokenizer.encode(text)
        shown = tokenizer.shown(ids)
        assert sum(part.count for part in shown) == len(ids) and not any(part.broken for part in shown)
        if "[UNK]" not in tokenizer.vocab and name not in ("unigram", "bpe fallback, legacy"):  # which finds ▁<loc>
            assert "".join(part.text for part in shown).removeprefix(" " * tokenizer.starts_with_mark) == text
    (shown,) = tokenizer.shown([tokenizer.eos])
    assert shown.control and shown.text == tokenizer.piece(tokenizer.eos)
    assert tokenizer.decode([tokenizer.eos, tokenizer.vocab_size + 3, -200]) == ""


def test_text_goes_on_without_a_word_mark(tmp_path):
    for name in NAMED:
        tokenizer = load_tokenizer(write(tmp_path, name))
        marked = name in ("bpe fallback", "bpe fallback, legacy", "unigram")
        assert tokenizer.starts_with_mark == marked
        assert tokenizer.prefix_after_control == (name in ("bpe fallback, legacy", "unigram"))
        mark = tokenizer.vocab.get("▁")
        for text in ("cat", "the mat"):
            joined = tokenizer.encode("x\n" + text)
            assert tokenizer.encode(text, prefix=False) == joined[-len(tokenizer.encode(text, prefix=False)) :]
            assert (tokenizer.encode(text, prefix=False) != tokenizer.encode(text)) == marked or mark is None


def test_a_lone_surrogate_is_refused(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, "qwen"))
    for text, at in (("\ud800", 0), ("ab\udfff", 2)):
        with pytest.raises(ValueError, match=rf"lone surrogate U\+D.* at character {at}"):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1", "begins with b'version https"),
        (b"[]", "not a tokenizer.json"),
        (b'{"model": {"type": "WordLevel"}}', "model.type is 'WordLevel'; BPE, Unigram, WordPiece are supported"),
        (b'{"model": {"type": "BPE", "vocab": {}}}', "cannot read it"),
    ],
)
def test_what_is_no_tokenizer_json_is_named(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", r"tokenizer_config\.json is no JSON"),
        ("[1]", r"tokenizer_config\.json is not what Hugging Face writes"),
        (
            '{"added_tokens_decoder": {"9999": {"content": "<x>"}}}',
            "gives the piece '<x>' the id 9999",
        ),
        ('{"added_tokens_decoder": {"a": 3}}', "added_tokens_decoder"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    write(tmp_path, "qwen")
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("ids", [[999_999], [4_294_967_096], [999_999, 999_999], [0, 999_999]])
def test_an_id_around_a_text_that_no_piece_has_is_named(tmp_path, ids):
    content = json.loads((write(tmp_path, "qwen") / "tokenizer.json").read_text())
    steps = [*({"SpecialToken": {"id": str(i), "type_id": 0}} for i in ids), {"Sequence": {"id": "A", "type_id": 0}}]
    named = {str(i): {"id": str(i), "ids": [i], "tokens": [str(i)]} for i in ids}
    pair = [*steps, {"Sequence": {"id": "B", "type_id": 1}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": steps,
        "pair": pair,
        "special_tokens": named,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"tokenizer\.json: it puts the id {ids[-1]} around a text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "table", [b"", b"\x01", b"\0" * 4, b"\4\0\0\0" + b"\xff" * 4, b"\4\0\0\0" + b"\0" * 4 + b"x"], ids=len
)
def test_a_damaged_table_of_characters_is_a_valueerror(tmp_path, table):
    """The library panics when it reads it, or not before it meets the first character."""
    content = json.loads((write(tmp_path, "unigram") / "tokenizer.json").read_text())
    table = base64.b64encode(table).decode()
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="its tables are damaged: the library tokenizers stopped with"):
        load_tokenizer(tmp_path).encode("a cat")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_but_a_panic_is_told_as_one(error):
    with pytest.raises(error), huggingface._panics_told():
        raise error


def test_dropout_of_merges_draws_nothing(tmp_path):
    content = json.loads((write(tmp_path, "qwen") / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids = [load_tokenizer(tmp_path).encode("the cat sat on the mat") for _ in range(5)]
    assert all(np.array_equal(ids[0], other) for other in ids)


def test_markers_are_what_they_look_like():
    assert MARKER.fullmatch("<|im_end|>") and not MARKER.fullmatch("<| a|>") and not MARKER.fullmatch("<loc>")


def test_a_folder_prepares_a_data_set_whose_batch_is_shown(tmp_path, capsys):
    """`lmm prepare --tokenizer FOLDER`, then `lmm show batch`: the tokenizer travels with the data."""
    (tmp_path / "qwen").mkdir()
    tokenizer = load_tokenizer(write(tmp_path / "qwen", "qwen"))
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": "<image>\nWhat <loc> is <|im_end|>?"},
        {"role": "assistant", "content": "A"},
    ]
    rows = [{"id": str(n), "image": "a.png", "messages": messages} for n in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = ["--tokenizer", tmp_path / "qwen", "--template", "chatml", "--workers", 0, "--out", tmp_path / "out"]
    assert main(list(map(str, ["prepare", "--data", tmp_path / "rows.json", *flags]))) == 0
    data = Prepared(tmp_path / "out", "train")
    assert data.tokenizer.fingerprint == tokenizer.fingerprint == data.about["tokenizer"]
    assert (data.about["template"], len(data)) == ("chatml", 8)
    with pytest.raises(ValueError, match=r"template 'vicuna_v1' does not fit this tokenizer \(kind huggingface"):
        prepare_rows(tmp_path / "rows.json", None, tmp_path / "no", tokenizer=tmp_path / "qwen", workers=0)
    page = tmp_path / "page.html"
    config = f"configs/own.py:data={tmp_path / 'out'}"
    assert main(["show", "batch", "--config", config, "--out", str(page)]) == 0
    shown = page.read_text()
    assert "a huggingface tokenizer of" in shown and "&lt;loc&gt;" in shown and "template <b>chatml</b>" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["added_tokens"][-1].update(id=10**9), "has the id 1000000000; ids are 0 to 16,777,215"),
        (lambda c: c["added_tokens"][-1].update(id=-5), "has the id -5; ids are 0"),
        (
            lambda c: c["added_tokens"][-1].update(id=c["added_tokens"][-1]["id"] + 7),
            "from its vocabulary it follows",
        ),
        (lambda c: c["added_tokens"][-1].update(id=True), "has the id True"),
        (lambda c: c["model"]["vocab"].update(x=10**8), "has the id 100000000"),
        (lambda c: c["model"]["vocab"].update(x=5, y=5), "have the same id 5"),
    ],
)
def test_ids_that_no_piece_can_have_are_named(tmp_path, change, message):
    path = write(tmp_path, "qwen") / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*({message}|cannot read it)"):
        HuggingFace.load(tmp_path)
