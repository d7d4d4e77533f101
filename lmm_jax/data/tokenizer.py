"""SentencePiece, with explicit control ids and a fingerprint."""

import hashlib
import io

import sentencepiece as spm
from etils import epath


class Tokenizer:
    """A SentencePiece model; pickles as its bytes.

    Control pieces in text (`<s>`, `</s>`, `<image>`) are ordinary characters to SentencePiece, so data cannot forge
    them; `bos` and `eos` are placed by `lmm_jax.data.conversation`.
    """

    def __init__(self, model: bytes):
        """Raises ValueError if `model` is not a SentencePiece model, or has no begin or end piece."""
        self.model = model
        try:
            self._processor = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise ValueError("the SentencePiece model has no <s> or no </s> piece")

    @classmethod
    def load(cls, path):
        """Reads a `tokenizer.model` file; the error of a bad one names it."""
        try:
            return cls(epath.Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def fingerprint(self) -> str:
        """sha256 of the model file."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text) -> list[int]:
        """Ids of `text`, without begin or end piece."""
        return self._processor.encode(text)

    def decode(self, ids) -> str:
        """Text of `ids`; control and padded ids leave nothing."""
        return self._processor.decode([i for i in map(int, ids) if i < self.vocab_size])

    def piece(self, i) -> str:
        """The piece of one id, for display."""
        return self._processor.id_to_piece(int(i))

    def __reduce__(self):
        return Tokenizer, (self.model,)


def train_tokenizer(lines, vocab_size) -> bytes:
    """Trains a small BPE model on `lines`, LLaMA-like: identity normalisation, unk 0, `<s>` 1, `</s>` 2.

    Letters and digits may share a piece, so that the name of a cell ("b2") is one.
    """
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        split_by_number=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    return out.getvalue()
