"""Granite 3 and 4, dense: LLaMA's form, with multipliers of embeddings, layers, scores and logits."""

from lmm_jax.families.kinds import Decoder, Prompt
from lmm_jax.families.llama import IGNORED, KEYS, ROPE_TYPES, TENSORS

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_ALL = {"kv_heads": 8, "vocab_size": 49155, "tied": True}

GRANITE = Decoder(
    name="granite",
    title="Granite",
    model_types=("granite",),
    architecture="GraniteForCausalLM",
    sizes={
        "3-2b": _ALL
        | {"width": 2048, "depth": 40, "heads": 32, "mlp_dim": 8192}
        | {"multipliers": (12.0, 0.22, 0.015625, 8.0)},
        "3-8b": _ALL
        | {"width": 4096, "depth": 40, "heads": 32, "mlp_dim": 12800}
        | {"multipliers": (12.0, 0.22, 0.0078125, 16.0)},
    },
    fields={"qk_norm": False, "qkv_bias": False},
    keys=KEYS | {"multipliers": MULTIPLIERS},
    rope_types=ROPE_TYPES,
    constants={"hidden_act": ("silu",), "attention_bias": (None, False), "mlp_bias": (None, False)},
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    tensors=TENSORS,
    ignored=IGNORED,
    tokenizer="huggingface",
    prompts={
        # Granite 3.0 and Granite-Docling; later ones write a system prompt with dates where a chat has none.
        "granite": Prompt(
            opening="<|start_of_role|>system<|end_of_role|>{system}<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>",
            without_system="<|start_of_role|>user<|end_of_role|>",
            user=(
                "\n<|start_of_role|>user<|end_of_role|>",
                "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
            ),
            assistant=("", "<|end_of_text|>"),
            picture=("", ""),
        ),
    },
    types=r"granite",
    prompt_rules=(("", "granite"),),
)
