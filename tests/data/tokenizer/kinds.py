"""Small tokenizers of each kind that Hugging Face's library makes, in folders as transformers writes them."""

import functools
import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

# How the byte-level tokenizers of Qwen and of Llama 3 cut a text before merging: digits one by one, or up to three.
CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CUTS += r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GRANITE = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<image>")
SMOLVLM = ("<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>")
LINES = [
    "A chat between a curious user and an artificial intelligence assistant.\n\nYou are a helpful assistant.",
    "USER: What is this? ASSISTANT: a cat  sat\non the mat, the cat and the dog; 1234567 + 89 = 1,234,656",
    "def f(x):\n\treturn x ** 2  # it's déjà vu, naïve\r\n    if x:\n        pass",
    "日本語のテキスト 中文文本 한국어 русский текст العربية e\u0301 ½ 🙂👩‍👩‍👧 user assistant system",
] * 10


@functools.cache
def bare(kind):
    """A trained `tokenizers.Tokenizer` of a kind, with no added tokens, as its JSON text."""
    unk, special = {"bpe fallback": "<unk>", "unigram": "<unk>", "wordpiece": "[UNK]"}.get(kind), []
    if kind in ("qwen", "llama 3", "gpt 2"):
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama 3"))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt 2")
        if kind != "gpt 2":
            cut = pre_tokenizers.Split(Regex(CUTS % ("" if kind == "qwen" else "{1,3}")), "isolated")
            level = pre_tokenizers.Sequence([cut, level])
        else:
            level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
        if kind == "qwen":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=520, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
    elif kind == "bpe fallback":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unk, byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        special = [unk, "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=620, show_progress=False, special_tokens=special)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        special = ["<s>", "<pad>", "</s>", unk]
        trainer = trainers.UnigramTrainer(
            vocab_size=300, show_progress=False, special_tokens=special, unk_token=unk, shrinking_factor=0.9
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=unk))
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.BertNormalizer(),
            pre_tokenizers.BertPreTokenizer(),
        )
        tokenizer.decoder = decoders.WordPiece()
        special = [unk, "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=300, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(LINES, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if not t["content"].startswith("<0x")]
    return json.dumps(content)


# Kind, special tokens, the begin piece that stands before a text, and what tokenizer_config.json says.
NAMED = {
    "qwen": ("qwen", CHATML, "", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}),
    "llama 3": ("llama 3", LLAMA_3, "<|begin_of_text|>", {"eos_token": "<|eot_id|>"}),
    "granite": ("gpt 2", GRANITE, "", {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}),
    "smolvlm": ("gpt 2", SMOLVLM, "", {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}),
    "bpe fallback": ("bpe fallback", (), "<s>", {"eos_token": "</s>", "unk_token": "<unk>"}),
    "bpe fallback, legacy": ("bpe fallback", (), "<s>", {"eos_token": "</s>", "unk_token": "<unk>"}),
    "unigram": ("unigram", (), "", {"eos_token": "</s>", "pad_token": "<pad>"}),
    "wordpiece": ("wordpiece", (), "", {"eos_token": "[SEP]", "unk_token": "[UNK]"}),
}
LOC = AddedToken("<loc>", special=False)  # what somebody added for boxes, as `add_tokens(["<loc>"])` makes it


def write(folder, name, added=(LOC,), **settings):
    """Writes a tokenizer of `NAMED` as transformers would; `added` tokens come behind the special ones."""
    kind, special, begin, about = NAMED[name]
    tokenizer = tokenizers.Tokenizer.from_str(bare(kind))
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    if "legacy" in name:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    if begin:
        of = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{begin} $A", f"{begin} $A $B", of)
        about = about | {"bos_token": begin}
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **about, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder
