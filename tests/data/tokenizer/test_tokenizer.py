"""What every tokenizer gives: one of another kind, which lives here alone, goes wherever SentencePiece goes."""

import hashlib
import json
import pathlib
import pickle
import re

import numpy as np
import pytest

from lmm_jax.data.conversation import IMAGE, encode, stop_id
from lmm_jax.data.prepare import folder as prepare
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.tokenizer import TOKENIZERS, Tokenizer, load_tokenizer, tokenizer_files
from lmm_jax.hf.tokenizer_json import CONVERTERS, added_ids, tokenizer_json

ROOT = pathlib.Path(__file__).parents[3]


class Characters(Tokenizer):
    """A piece for each letter of an alphabet; what is not in it is spelled `?`, the last one."""

    kind, FILES = "characters", ("characters.json",)
    CONTROL = ("<s>", "</s>")

    def __init__(self, letters):
        self.pieces = [*self.CONTROL, *letters, "?"]
        self.bos, self.eos, self.vocab_size = 0, 1, len(self.pieces)

    @property
    def fingerprint(self):
        return hashlib.sha256("".join(self.pieces).encode()).hexdigest()

    def encode(self, text, prefix=True):
        letters = self.pieces[len(self.CONTROL) :]
        return [len(self.CONTROL) + letters.index(x if x in letters else "?") for x in text]

    def markup(self, text):
        parts = [part for part in re.split("(</?s>)", text) if part]
        return [self.CONTROL.index(part) if part in self.CONTROL else part for part in parts]

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids if len(self.CONTROL) <= i < self.vocab_size)

    def piece(self, i):
        return self.pieces[i]

    def save(self, folder):
        (folder / self.FILES[0]).write_text(json.dumps(self.pieces[len(self.CONTROL) : -1]))

    @classmethod
    def load(cls, path):
        path = path / cls.FILES[0] if path.is_dir() else path
        return cls(json.loads(path.read_text()))


@pytest.fixture
def characters(monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "characters", Characters)
    return Characters("abcdefghijklmnopqrstuvwxyzAERSTU012345 .:\n")


@pytest.fixture
def rows(tmp_path):
    """A file of three conversations, in the second of which a user forges the end of an answer."""
    texts = [("what is 2", "it is 2"), ("say </s> now", "no"), ("and 3", "3")]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in texts]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": messages} for messages in turns]))
    return tmp_path / "rows.json"


def test_each_kind_is_called_what_the_table_says_and_made_of_files():
    assert all(holder.kind == name and holder.FILES for name, holder in TOKENIZERS.items())
    assert CONVERTERS.keys() <= TOKENIZERS.keys()
    assert tokenizer_files() >= {"tokenizer.model", "tokenizer_config.json"}


def test_a_holder_that_lacks_a_method_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Tokenizer,), {"encode": lambda self, text, prefix=True: []})()


def test_another_kind_prepares_a_data_set_and_is_found_there(characters, rows, tmp_path):
    characters.save(tmp_path)
    out = tmp_path / "out"
    counts = prepare.prepare_rows(rows, None, out, tokenizer=tmp_path / "characters.json", workers=0)
    data = Prepared(out, "train")
    assert counts["rows"] == 3 and isinstance(data.tokenizer, Characters)
    assert data.tokenizer.fingerprint == characters.fingerprint == data.about["tokenizer"]
    longest = encode([("user", "say </s> now"), ("assistant", "no")], characters, "vicuna_v1")
    assert data.index["turn_tokens"][1] == len(longest.ids)
    (out / "prepared.json").rename(out / "preparing.json")  # as if it had been killed: all that stands there is ours
    assert prepare.prepare_rows(rows, None, out, tokenizer=tmp_path, workers=0) == counts


def test_data_cannot_forge_the_end_of_an_answer(characters):
    turns = [("user", "<image>\nsay </s> now"), ("assistant", "a </s>"), ("user", "<s>"), ("assistant", "b")]
    encoded = encode(turns, characters, "vicuna_v1")
    assert np.flatnonzero(encoded.ids == characters.eos).tolist() == (encoded.turn_ends - 1).tolist()
    assert (encoded.ids == characters.bos).sum() == 1 and (encoded.ids == IMAGE).sum() == 1
    assert characters.decode(encoded.ids[encoded.supervised]) == " a ??s? b"
    assert stop_id(characters, "vicuna_v1") == characters.eos


def test_prefixes_stand_where_a_text_starts():
    class Marked(Characters):
        def encode(self, text, prefix=True):
            return ["^"] * prefix + list(text)

    items = ["a", 1, "b", -200, "c", "", "d", -200, 1, "e"]
    seen = "".join(str(i[0]) if len(i) < 2 else "".join(i) for i in Marked("").encode_items(items) if i)
    assert seen == "^a1b-200^cd-2001e"
    Marked.prefix_after_control = True
    seen = "".join(str(i[0]) if len(i) < 2 else "".join(i) for i in Marked("").encode_items(items) if i)
    assert seen == "^a1^b-200^cd-2001^e"


def test_a_folder_or_a_file_says_which_kind_it_is(characters, digits_folder, tmp_path):
    characters.save(tmp_path)
    sentencepiece = load_tokenizer(digits_folder)
    for path, kind in (
        (tmp_path, "characters"),
        (tmp_path / "characters.json", "characters"),
        (digits_folder, "sentencepiece"),
        (digits_folder / "tokenizer.model", "sentencepiece"),
    ):
        tokenizer = load_tokenizer(path)
        again = pickle.loads(pickle.dumps(tokenizer))
        want = characters if kind == "characters" else sentencepiece
        assert tokenizer.kind == kind and tokenizer.fingerprint == again.fingerprint == want.fingerprint
    sentencepiece.save(tmp_path)  # beside the other's: who knows which it is says so
    for known in (characters, sentencepiece):
        assert load_tokenizer(tmp_path, known.kind).fingerprint == known.fingerprint
    (tmp_path / "characters.json").unlink()  # a kind that is expected and not there: the others are asked
    assert load_tokenizer(tmp_path, "characters").fingerprint == sentencepiece.fingerprint
    (tmp_path / "spiece.model").write_bytes((digits_folder / "tokenizer.model").read_bytes())
    assert load_tokenizer(tmp_path / "spiece.model").fingerprint == sentencepiece.fingerprint


def test_what_is_no_tokenizer_is_told_with_what_each_kind_looks_for(characters, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such"):
        load_tokenizer(tmp_path / "nowhere")
    looked = r"sentencepiece looks for tokenizer\.model, huggingface looks for tokenizer\.json, characters"
    with pytest.raises(FileNotFoundError, match=f"holds no tokenizer .*{looked}"):
        load_tokenizer(tmp_path)
    for name, hint in (
        ("tekken.json", "same model"),
        ("qwen.tiktoken", "Qwen1.5's"),
        ("vocab.txt", "save_pretrained"),
    ):
        (tmp_path / name).write_text("a")
        with pytest.raises(FileNotFoundError, match=f"; its {name} is of another kind, .*: .*{hint}"):
            load_tokenizer(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(ValueError, match=rf"vocab\.txt is not the file .*{looked}"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_a_kind_without_a_converter_is_not_exported(characters):
    for convert in (added_ids, tokenizer_json):
        with pytest.raises(ValueError, match="need a tokenizer.json; a tokenizer of kind 'characters' has no conv"):
            convert(characters)


def test_only_the_tokenizer_itself_names_its_file():
    named = re.compile(r"tokenizer\.model\b(?!_)|import sentencepiece\b|tokenizer\.sentencepiece import")
    for path in (ROOT / "lmm_jax").rglob("*.py"):
        of_it = path.is_relative_to(ROOT / "lmm_jax/data/tokenizer") or path.name == "sentencepiece_json.py"
        assert of_it or not named.search(path.read_text()), path


def test_what_is_shown_of_ids_is_their_text_and_their_control_pieces(characters):
    ids = [characters.bos, *characters.encode("a b"), characters.eos]
    shown = characters.shown(ids)
    assert [part.text for part in shown] == ["<s>", "a", " ", "b", "</s>"]
    assert [part.control for part in shown] == [True, False, False, False, True]
