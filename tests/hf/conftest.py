"""M3's golden set as a folder in LLaVA's original layout, and SentencePiece models of many kinds."""

import io
import json
import shutil

import pytest
import sentencepiece as spm

from lmm_jax import config as c
from lmm_jax import families
from lmm_jax.data.conversation import structural_pieces
from lmm_jax.data.tokenizer.sentencepiece import train_tokenizer
from lmm_jax.hf.processor import write_processor


@pytest.fixture
def m3(golden, tmp_path):
    """M3's golden set as the folder that its authors would release, with a tokenizer as small as its table."""
    about = json.loads((golden / "m3/config.json").read_text())
    folder = tmp_path / "some-convllava-deepstack-name"  # which must say nothing
    (folder / "tower").mkdir(parents=True)
    keys = about["text"] | about["mm"] | {"matryoshka_vis_token_scale": about["scales"], "mm_vision_tower": "tower"}
    keys |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    (folder / "config.json").write_text(json.dumps(keys))
    (folder / "tower/config.json").write_text(json.dumps(about["vision"] | {"model_type": "clip_vision_model"}))
    shutil.copyfile(golden / "m3/weights.safetensors", folder / "model.safetensors")
    # The golden one has 1,200 pieces, and the table 256 rows.
    (folder / "tokenizer.model").write_bytes(train_tokenizer(LINES, 120))
    return folder


LINES = [
    "digit at b2? how many 7s? 7 1 2 3",
    "a cat sat on the mat, the cat and the dog",
    "USER: What is this? ASSISTANT: yes, no",
    "aaaa aaa ababab bababa ==== --- déjà vu",
] * 40
PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


def train(**settings):
    """Bytes of a SentencePiece model of `LINES`."""
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=out, hard_vocab_limit=False, minloglevel=2, **settings
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def models(golden):
    """Model bytes by name."""
    llama = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    markers = structural_pieces("chatml_direct")
    structure = {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]}
    return {
        "ours": train_tokenizer(LINES, 120),
        "ours with bytes": train_tokenizer(LINES, 400, byte_fallback=True),
        "ours with markers": train_tokenizer(LINES, 400, byte_fallback=True, markers=markers),
        "LLaMA": (golden / "m3/tokenizer.model").read_bytes(),
        "LLaMA with markers": train(model_type="bpe", vocab_size=400, **llama, **structure),
        "no prefix": train(model_type="bpe", vocab_size=400, add_dummy_prefix=False, **llama),
        "unigram": train(model_type="unigram", vocab_size=90, normalization_rule_name="identity"),
        "unigram, NFKC": train(model_type="unigram", vocab_size=90),
    }


@pytest.fixture
def write(tmp_path):
    """`write(tokenizer, template, architecture, **fields)`: config and folder; fields are those of `config.data`."""

    def make(tokenizer, template="vicuna_v1", architecture="llava", size=28, scales=(4,), **fields):
        config = c.base()
        config.model.scales, config.model.decoder.vocab_size = scales, tokenizer.vocab_size
        if architecture == "fast_vlm":
            c.use_family(config, "convnext")
        config.model.vision.update(image_size=size, patch_size=14)
        config.data.update(template=template, **fields)
        if architecture == "llava_next":
            config.model.newline = True
            config.data.update(aspect="anyres", sequence="unpad", tilings=PINPOINTS)
        write_processor(tmp_path, config, tokenizer, families.WHOLES[architecture])
        (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
        return config, tmp_path

    return make
