"""LLaMA, of which Vicuna 1.5 is LLaMA-2 tuned to converse: the decoder of LLaVA, M3, ConvLLaVA and DeepStack."""

from lmm_jax.families.kinds import FROM_HEADS, LINEAR, SAME, Decoder, Prompt

_LAYER = "model.layers.{layer}."

LLAMA = Decoder(
    name="llama",
    title="LLaMA",
    model_types=("llama", "mistral"),  # Mistral's are LLaMA's where no window is shorter than the row
    architecture="LlamaForCausalLM",
    sizes={
        "7b": {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008},
        "13b": {"width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "mlp_dim": 13824},
    },
    fields={"tied": False, "qk_norm": False, "qkv_bias": False, "rope_scaling": ()},
    keys={
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "mlp_dim": "intermediate_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
    constants={
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "attention_bias": (None, False),
        "sliding_window": (None,),
    },
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    },
    tensors={
        "table": ("model.embed_tokens.weight", SAME),
        "head/kernel": ("lm_head.weight", LINEAR),
        "norm/scale": ("model.norm.weight", SAME),
        "layers/attention_norm/scale": (f"{_LAYER}input_layernorm.weight", SAME),
        "layers/mlp_norm/scale": (f"{_LAYER}post_attention_layernorm.weight", SAME),
        **{f"layers/{n}/kernel": (f"{_LAYER}self_attn.{n}_proj.weight", LINEAR) for n in "qkv"},
        "layers/o/kernel": (f"{_LAYER}self_attn.o_proj.weight", FROM_HEADS),
        **{f"layers/{n}/kernel": (f"{_LAYER}mlp.{n}_proj.weight", LINEAR) for n in ("gate", "up", "down")},
    },
    ignored={r"rotary_emb\.inv_freq$": "computed"},
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
        # LLaVA-1.6 on Yi (its `chatml_direct`), a LLaMA: no newline after <|im_end|>, unlike other ChatML.
        "chatml": Prompt(
            opening="<|im_start|>system\n{system}<|im_end|><|im_start|>user\n",
            user=("<|im_start|>user\n", "<|im_end|><|im_start|>assistant\n"),
            assistant=("", "<|im_end|>"),
            system="Answer the questions.",
        ),
    },
    # A LLaVA on another decoder says so in its name.
    types=r"^(?!.*(phi|qwen|gemma|mpt|llama4)).*(\bllama|llava)",
    prompt_rules=(
        (r"llama-?3", None),
        (r"\byi-|v1\.6-34b", "chatml"),
        (r"llama-?2.*chat", "llama_2"),
        ("", "vicuna_v1"),
    ),
)
