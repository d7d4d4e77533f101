"""Mistral: LLaMA's form, with a window of attention in its first version, which must be as long as a row."""

from lmm_jax.families.kinds import Decoder, Prompt
from lmm_jax.families.llama import IGNORED, KEYS, ROPE_TYPES, TENSORS

_7B = {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "mlp_dim": 14336}

MISTRAL = Decoder(
    name="mistral",
    title="Mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    sizes={
        "7b-v0.1": _7B,
        "7b-v0.2": _7B | {"rope_theta": 1000000.0},
        "7b-v0.3": _7B | {"rope_theta": 1000000.0, "vocab_size": 32768},
    },
    fields={"qk_norm": False, "qkv_bias": False, "multipliers": ()},
    keys=KEYS,
    rope_types=ROPE_TYPES,
    window="sliding_window",
    constants={"hidden_act": ("silu",)},
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    tensors=TENSORS,
    ignored=IGNORED,
    # LLaVA-1.6 on it: as LLaMA-2's, with neither system prompt nor begin pieces between rounds.
    prompts={"mistral": Prompt(opening="[INST] ", user=("[INST] ", " [/INST]"), assistant=(" ", " </s>"))},
    types=r"mistral|mixtral",
    prompt_rules=(("", "mistral"),),
)
