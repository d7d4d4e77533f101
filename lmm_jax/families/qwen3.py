"""Qwen3, dense: LLaMA's form, with norms of each head's queries and keys, and heads of a width of their own."""

from lmm_jax.families.kinds import SAME, Decoder, Prompt
from lmm_jax.families.llama import IGNORED, KEYS, LAYER, ROPE_TYPES, TENSORS
from lmm_jax.families.qwen2 import CHATML, QWEN2, VISION

WITHOUT_SYSTEM = "<|im_start|>user\n"
_ALL = {"kv_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000.0, "norm_eps": 1e-6}

QWEN3 = Decoder(
    name="qwen3",
    title="Qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    sizes={
        "0.6b": _ALL | {"width": 1024, "depth": 28, "heads": 16, "mlp_dim": 3072, "tied": True},
        "1.7b": _ALL | {"width": 2048, "depth": 28, "heads": 16, "mlp_dim": 6144, "tied": True},
        "4b": _ALL | {"width": 2560, "depth": 36, "heads": 32, "mlp_dim": 9728, "tied": True},
        "8b": _ALL | {"width": 4096, "depth": 36, "heads": 32, "mlp_dim": 12288},
        "14b": _ALL | {"width": 5120, "depth": 40, "heads": 40, "mlp_dim": 17408},
        "32b": _ALL | {"width": 5120, "depth": 64, "heads": 64, "mlp_dim": 25600},
    },
    fields={"qk_norm": True, "qkv_bias": False, "multipliers": ()},
    keys=KEYS,
    rope_types=ROPE_TYPES,
    window="sliding_window",
    window_switch="use_sliding_window",
    constants={"hidden_act": ("silu",), "attention_bias": (None, False)},
    defaults=dict(QWEN2.defaults) | {"head_dim": 128},
    tensors=TENSORS | {f"layers/{n}_norm/scale": (f"{LAYER}self_attn.{n}_norm.weight", SAME) for n in "qk"},
    ignored=IGNORED,
    tokenizer="huggingface",
    prompts={
        # The instruct models: those that think aloud write <think> into their answers.
        "qwen3": Prompt(without_system=WITHOUT_SYSTEM, **CHATML),
        "qwen3_vl": Prompt(without_system=WITHOUT_SYSTEM, picture=VISION, **CHATML),
    },
    types=r"qwen-?3",
    prompt_rules=((r"qwen3_vl", "qwen3_vl"), ("", "qwen3")),
)
