"""Qwen2 and Qwen2.5: LLaMA's form, with biases on queries, keys and values."""

from lmm_jax.families.kinds import FLAT, Decoder, Prompt
from lmm_jax.families.llama import IGNORED, KEYS, LAYER, ROPE_TYPES, TENSORS

CHATML = {
    "opening": "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
    "user": ("\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "assistant": ("", "<|im_end|>"),
}
VISION = ("<|vision_start|>", "<|vision_end|>")
_ALL = {"vocab_size": 151936, "rope_theta": 1000000.0, "norm_eps": 1e-6}

QWEN2 = Decoder(
    name="qwen2",
    title="Qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    sizes={
        "0.5b": _ALL | {"width": 896, "depth": 24, "heads": 14, "kv_heads": 2, "mlp_dim": 4864, "tied": True},
        "1.5b": _ALL | {"width": 1536, "depth": 28, "heads": 12, "kv_heads": 2, "mlp_dim": 8960, "tied": True},
        "3b": _ALL | {"width": 2048, "depth": 36, "heads": 16, "kv_heads": 2, "mlp_dim": 11008, "tied": True},
        "7b": _ALL | {"width": 3584, "depth": 28, "heads": 28, "kv_heads": 4, "mlp_dim": 18944, "vocab_size": 152064},
    },
    fields={"qk_norm": False, "qkv_bias": True, "multipliers": ()},
    keys=KEYS,
    rope_types=ROPE_TYPES,
    window="sliding_window",
    window_switch="use_sliding_window",
    constants={"hidden_act": ("silu",)},
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    tensors=TENSORS | {f"layers/{n}/bias": (f"{LAYER}self_attn.{n}_proj.bias", FLAT) for n in "qkv"},
    ignored=IGNORED,
    tokenizer="huggingface",
    prompts={
        # Qwen2, and LLaVA on it. Qwen2.5's text models have the longer system prompt "You are Qwen, created by …".
        "chatml": Prompt(system="You are a helpful assistant.", **CHATML),
        # Qwen2-VL and Qwen2.5-VL.
        "qwen2_vl": Prompt(system="You are a helpful assistant.", picture=VISION, **CHATML),
    },
    types=r"qwen-?2",
    prompt_rules=((r"qwen2(_5)?_vl", "qwen2_vl"), ("", "chatml")),
)
