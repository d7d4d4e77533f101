"""Phi-3's prompt; its weights are not read."""

from lmm_jax.families.kinds import Decoder, Prompt

PHI3 = Decoder(
    name="phi3",
    title="Phi-3",
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
