"""SmolVLM's prompt; its decoder, SmolLM2, is a LLaMA and has its sizes there."""

from lmm_jax.families.kinds import Decoder, Prompt

SMOLLM2 = Decoder(
    name="smollm2",
    title="SmolLM2",
    tokenizer="huggingface",
    prompts={
        # A space follows the colon only where text does: `User:<image>What?` and `User: What?`.
        "smolvlm": Prompt(
            opening="<|im_start|>System: {system}<end_of_utterance>\nUser:",
            without_system="<|im_start|>User:",
            user=("\nUser:", "<end_of_utterance>\nAssistant:"),
            assistant=(" ", "<end_of_utterance>"),
            picture=("", ""),
            before_text=" ",
        ),
    },
    types=r"smolvlm",
    wholes=r"smolvlm|idefics3",
    prompt_rules=(("", "smolvlm"),),
)
