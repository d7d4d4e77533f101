"""Phi-3 in its short version (4k): LLaMA's form, with fused tensors and a window that must be as long as a row."""

from lmm_jax.families.kinds import FUSED_GATE_UP, FUSED_QKV, Decoder, Prompt
from lmm_jax.families.llama import IGNORED, KEYS, LAYER, TENSORS

PHI3 = Decoder(
    name="phi3",
    title="Phi-3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    sizes={
        "mini": {"width": 3072, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 8192, "vocab_size": 32064},
        "medium": {"width": 5120, "depth": 40, "heads": 40, "kv_heads": 10, "mlp_dim": 17920, "vocab_size": 32064},
    },
    fields={"qk_norm": False, "qkv_bias": False, "multipliers": ()},
    keys=KEYS,
    window="sliding_window",
    constants={
        "hidden_act": ("silu",),
        "partial_rotary_factor": (None, 1.0),
        "resid_pdrop": (0.0,),  # which its class applies while it trains
        "embd_pdrop": (0.0,),
    },
    defaults={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    tensors=TENSORS
    | {f"layers/{n}/kernel": (f"{LAYER}self_attn.qkv_proj.weight", FUSED_QKV) for n in "qkv"}
    | {f"layers/{n}/kernel": (f"{LAYER}mlp.gate_up_proj.weight", FUSED_GATE_UP) for n in ("gate", "up")},
    ignored=IGNORED,
    prompts={
        # DeepStack on Phi-3.
        "phi3": Prompt(
            opening="<|system|>\n{system}<|end|>\n<|user|>\n",
            user=("\n<|user|>\n", "<|end|>\n<|assistant|>\n"),
            assistant=("", "<|end|>"),
            system="You are a helpful AI assistant.",
        ),
    },
    types=r"phi[-_]?3",
    prompt_rules=(("", "phi3"),),
)
