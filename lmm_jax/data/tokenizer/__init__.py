"""Tokenizers: what one must give (`Tokenizer`), the kinds that there are, and reading one without knowing its kind.

To add a kind, write one file here with a class derived from `Tokenizer`, and name it in `TOKENIZERS`. Everything
then works but an export for transformers, which needs a converter too: see `lmm_jax.hf.tokenizer_json`.
"""

from etils import epath

from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.data.tokenizer.tokenizer import Tokenizer

__all__ = ["TOKENIZERS", "TRAINED", "Tokenizer", "load_tokenizer", "tokenizer_files"]

# Where a folder holds the files of several kinds, the first of them is read.
TOKENIZERS = {"sentencepiece": SentencePiece}

# Files of tokenizers that we do not read, to be named where there is none that we do.
OTHERS = ("tokenizer.json", "vocab.json", "vocab.txt", "qwen.tiktoken", "tekken.json")

# What is trained where no tokenizer is given.
TRAINED = SentencePiece


def load_tokenizer(path, kind=None) -> Tokenizer:
    """Reads the tokenizer of a folder, or one whose file is named.

    Args:
      path: of either.
      kind: in `TOKENIZERS`, where it is known: a folder may hold the files of several. None asks each in turn.

    Raises:
      FileNotFoundError: there is no such folder or file, or the folder holds no tokenizer.
      ValueError: a file that is no tokenizer of a kind that we know, or one that cannot be read.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer {path}: there is no such folder or file")
    asked = TOKENIZERS if kind is None else {kind: TOKENIZERS[kind]}
    for holder in asked.values():
        if holder.recognises(path):
            return holder.load(path)
    known = ", ".join(f"{name} looks for {holder.FILES[0]}" for name, holder in asked.items())
    if path.is_dir():
        others = [name for name in OTHERS if (path / name).exists()]
        hint = f"; its {others[0]} is of another kind, which we do not read" if others else ""
        raise FileNotFoundError(f"{path} holds no tokenizer of a kind that we know: {known}{hint}")
    raise ValueError(f"{path} is not the file of a tokenizer of a kind that we know: {known}")


def tokenizer_files() -> set[str]:
    """Names of all files that a tokenizer of any kind writes into a folder."""
    return {name for holder in TOKENIZERS.values() for name in holder.FILES}
