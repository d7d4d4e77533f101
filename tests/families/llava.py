"""Tiny LLaVAs with drawn weights on a decoder of each family, in folders as transformers writes them."""

import json

from tokenizers import AddedToken

from lmm_jax.hf.tokenizer_json import added_ids
from tests.data.tokenizer import kinds
from tests.release.recipes import TOKENIZER

SIDE = 30
# Kind of the tokenizer, layout of the prompt, and what `text_config` says beside the sizes.
DECODERS = {
    "llama": (
        "llama 3",
        "llama_3",
        {
            "model_type": "llama",
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama, yarn": (
        "sentencepiece",
        "vicuna_v1",
        {
            "model_type": "llama",
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "mistral": ("sentencepiece", "mistral", {"model_type": "mistral", "sliding_window": None}),
    "qwen2": ("qwen", "chatml", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen3": ("qwen", "qwen3", {"model_type": "qwen3", "head_dim": 16}),
    "phi3": ("sentencepiece", "vicuna_v1", {"model_type": "phi3", "pad_token_id": 0, "eos_token_id": 2}),
    "granite": (
        "granite",
        "granite",
        {
            "model_type": "granite",
            "tie_word_embeddings": False,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.25,
            "logits_scaling": 4.0,
        },
    ),
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
# The tower, what `config.json` says of it, and its tokens; 30 pixels are no multiple of a patch.
ENCODERS = {
    "siglip": ({"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 8}, -1, "full", 9),
    "clip": ({"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 10}, -2, "default", 9),
}


def write(folder, transformers, torch, decoder, encoder):
    """Writes a model with its tokenizer; returns transformers' model."""
    kind, template, text = DECODERS[decoder]
    tower, level, strategy, tokens = ENCODERS[encoder]
    if kind == "sentencepiece":
        TOKENIZER.save(folder)
        image, _, rows = added_ids(TOKENIZER)
    else:
        kinds.write(folder, kind, added=[] if kind == "granite" else [AddedToken("<image>", special=True)])
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        image, rows = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer) + 6
    config = transformers.LlavaConfig(
        text_config=SIZES | {"vocab_size": rows} | text,
        vision_config=TOWER | tower,
        image_token_index=image,
        vision_feature_layer=level,
        vision_feature_select_strategy=strategy,
        image_seq_length=tokens,
        tie_word_embeddings=bool(text.get("tie_word_embeddings")),
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            spread = 0.1 if "embed_tokens" in name else 0.3 if x.dim() > 1 else 0.2
            x.normal_(0, spread).add_(float("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    keys = json.loads((folder / "config.json").read_text()) | {"lmm_jax_template": template}
    (folder / "config.json").write_text(json.dumps(keys))
    pictures = {"image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    pictures |= {"do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return model
