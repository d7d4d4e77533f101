"""LLaMA 1 to 3, and what has their form.

Vicuna 1.5, the decoder of LLaVA, M3, ConvLLaVA and DeepStack, is LLaMA 2 tuned to converse. SmolLM2 is one too.
"""

from lmm_jax.families.kinds import FROM_HEADS, LINEAR, SAME, Decoder, Prompt

LAYER = "model.layers.{layer}."
# What all relatives of LLaMA call the sizes of a decoder, and its parts.
KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "mlp_dim": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tied": "tie_word_embeddings",
}
ROPE_TYPES = ("linear", "llama3", "yarn")
TENSORS = {
    "table": ("model.embed_tokens.weight", SAME),
    "head/kernel": ("lm_head.weight", LINEAR),
    "norm/scale": ("model.norm.weight", SAME),
    "layers/attention_norm/scale": (f"{LAYER}input_layernorm.weight", SAME),
    "layers/mlp_norm/scale": (f"{LAYER}post_attention_layernorm.weight", SAME),
    **{f"layers/{n}/kernel": (f"{LAYER}self_attn.{n}_proj.weight", LINEAR) for n in "qkv"},
    "layers/o/kernel": (f"{LAYER}self_attn.o_proj.weight", FROM_HEADS),
    **{f"layers/{n}/kernel": (f"{LAYER}mlp.{n}_proj.weight", LINEAR) for n in ("gate", "up", "down")},
}
IGNORED = {r"rotary_emb\.inv_freq$": "computed"}
_LLAMA_3 = {"kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
_SMOL = {"vocab_size": 49152, "tied": True, "rope_theta": 100000.0}

LLAMA = Decoder(
    name="llama",
    title="LLaMA",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    sizes={
        "7b": {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008},
        "13b": {"width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "mlp_dim": 13824},
        "3-8b": _LLAMA_3 | {"width": 4096, "depth": 32, "heads": 32, "mlp_dim": 14336},
        "3.1-8b": _LLAMA_3
        | {"width": 4096, "depth": 32, "heads": 32, "mlp_dim": 14336}
        | {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 8192.0)},
        "3.2-1b": _LLAMA_3
        | {"width": 2048, "depth": 16, "heads": 32, "mlp_dim": 8192, "tied": True}
        | {"rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192.0)},
        "3.2-3b": _LLAMA_3
        | {"width": 3072, "depth": 28, "heads": 24, "mlp_dim": 8192, "tied": True}
        | {"rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192.0)},
        "smollm2-135m": _SMOL | {"width": 576, "depth": 30, "heads": 9, "kv_heads": 3, "mlp_dim": 1536},
        "smollm2-360m": _SMOL | {"width": 960, "depth": 32, "heads": 15, "kv_heads": 5, "mlp_dim": 2560},
        "smollm2-1.7b": _SMOL
        | {"width": 2048, "depth": 24, "heads": 32, "kv_heads": 32, "mlp_dim": 8192, "rope_theta": 130000.0},
    },
    fields={"qk_norm": False, "qkv_bias": False, "multipliers": ()},
    keys=KEYS,
    rope_types=ROPE_TYPES,
    constants={
        "hidden_act": ("silu",),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "pretraining_tp": (None, 1),
    },
    window="sliding_window",
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    tensors=TENSORS,
    ignored=IGNORED,
    # The layouts, and to the letter the system prompts, that published checkpoints were trained with.
    prompts={
        # LLaVA-1.5, M3, ConvLLaVA, DeepStack.
        "vicuna_v1": Prompt(
            opening="{system} USER: ",
            user=("USER: ", " ASSISTANT:"),
            assistant=(" ", "</s>"),
            system="A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ),
        # LLaVA on Llama-2-chat (its `llava_llama_2`): each round has a begin and an end piece.
        "llama_2": Prompt(
            opening="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
            user=("<s>[INST] ", " [/INST]"),
            assistant=(" ", " </s>"),
            system="You are a helpful language and vision assistant. "
            "You are able to understand the visual content that the user provides, "
            "and assist the user with a variety of tasks using natural language.",
        ),
        # LLaVA-1.6 on Yi, a LLaMA: no newline after <|im_end|>, unlike other ChatML.
        "chatml_direct": Prompt(
            opening="<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
            user=("<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n"),
            assistant=("", "<|im_end|>"),
            system="Answer the questions.",
        ),
        # Llama 3; from 3.1 on the released template also writes dates into a system turn.
        "llama_3": Prompt(
            opening="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n",
            without_system="<|start_header_id|>user<|end_header_id|>\n\n",
            user=(
                "<|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            assistant=("", "<|eot_id|>"),
            trimmed=True,
        ),
    },
    # A LLaVA on another decoder says so in its name.
    types=r"^(?!.*(phi|qwen|gemma|mpt|llama4)).*(\bllama|llava)",
    prompt_rules=(
        (r"llama-?3", "llama_3"),
        (r"\byi-|v1\.6-34b", "chatml_direct"),
        (r"llama-?2.*chat", "llama_2"),
        ("", "vicuna_v1"),
    ),
)
