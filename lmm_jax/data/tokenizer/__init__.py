"""Tokenizers: what one must give (`Tokenizer`), the kinds that there are, and reading one without knowing its kind.

To add a kind, write one file here with a class derived from `Tokenizer`, and name it in `TOKENIZERS`. Everything
then works but an export for transformers, which needs a converter too: see `lmm_jax.hf.tokenizer_json`.
"""

from etils import epath

from lmm_jax.data.tokenizer.huggingface import HuggingFace
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.data.tokenizer.tokenizer import Tokenizer

__all__ = ["TOKENIZERS", "TRAINED", "Tokenizer", "find_kind", "load_tokenizer", "tokenizer_files"]

# Where a folder holds the files of several kinds, the first of them is read: it has what tokenizer.json adds, too.
TOKENIZERS = {"sentencepiece": SentencePiece, "huggingface": HuggingFace}

# Files of tokenizers that we do not read, to be named where there is none that we do, and what would do.
OTHERS = {
    "vocab.json": "transformers makes a tokenizer.json of it: AutoTokenizer.from_pretrained(F).save_pretrained(F)",
    "vocab.txt": "transformers makes a tokenizer.json of it: AutoTokenizer.from_pretrained(F).save_pretrained(F)",
    "qwen.tiktoken": "take the tokenizer.json of a later release, such as Qwen1.5's, whose ids are the same",
    "tekken.json": "take the tokenizer.json that the same model has in transformers' layout",
}

# What is trained where no tokenizer is given.
TRAINED = SentencePiece


def load_tokenizer(path, kind=None) -> Tokenizer:
    """Reads the tokenizer of a folder, or one whose file is named.

    Args:
      path: of either.
      kind: in `TOKENIZERS`, which is asked first: a folder may hold the files of several. The others follow in turn.

    Raises:
      FileNotFoundError: there is no such folder or file, or the folder holds no tokenizer.
      ValueError: a file that is no tokenizer of a kind that we know, or one that cannot be read.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer {path}: there is no such folder or file")
    found = find_kind(path, kind)
    if found is not None:
        return TOKENIZERS[found].load(path)
    known = ", ".join(f"{name} looks for {TOKENIZERS[name].FILES[0]}" for name in _in_turn(kind))
    if path.is_dir():
        others = [name for name in OTHERS if (path / name).exists()]
        hint = f"; its {others[0]} is of another kind, which we do not read: {OTHERS[others[0]]}" if others else ""
        raise FileNotFoundError(f"{path} holds no tokenizer of a kind that we know: {known}{hint}")
    raise ValueError(f"{path} is not the file of a tokenizer of a kind that we know: {known}")


def find_kind(path, kind=None) -> str | None:
    """The kind in which `load_tokenizer` reads what lies there; None if in none."""
    return next((name for name in _in_turn(kind) if TOKENIZERS[name].recognises(epath.Path(path))), None)


def _in_turn(kind):
    return TOKENIZERS if kind is None else {kind: None} | TOKENIZERS


def tokenizer_files() -> set[str]:
    """Names of all files that a tokenizer of any kind writes into a folder."""
    return {name for holder in TOKENIZERS.values() for name in holder.FILES}
