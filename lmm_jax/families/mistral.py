"""Mistral-instruct's prompt; its weights are read as LLaMA's, see there."""

from lmm_jax.families.kinds import Decoder, Prompt

MISTRAL = Decoder(
    name="mistral",
    title="Mistral",
    # LLaVA-1.6 on it: as LLaMA-2's, with neither system prompt nor begin pieces between rounds.
    prompts={"mistral": Prompt(opening="[INST] ", user=("[INST] ", " [/INST]"), assistant=(" ", " </s>"))},
    types=r"mistral|mixtral",
    prompt_rules=(("", "mistral"),),
)
