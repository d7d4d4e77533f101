"""What is published of each model family, as data: nothing here imports anything of ours, or computes.

One file a family, of the kinds in `kinds`, and a line in a table below. Whoever reads, writes, tokenises or prompts
asks these tables; where several families could answer, the first one counts.
"""

from lmm_jax.families.clip import CLIP
from lmm_jax.families.convnext import CONVNEXT
from lmm_jax.families.deepstack import DEEPSTACK
from lmm_jax.families.kinds import Prompt
from lmm_jax.families.llama import LLAMA
from lmm_jax.families.llava import FAST_VLM, LLAVA, LLAVA_NEXT
from lmm_jax.families.llava_code import LLAVA_CODE
from lmm_jax.families.mistral import MISTRAL
from lmm_jax.families.phi3 import PHI3

DECODERS = {family.name: family for family in (PHI3, MISTRAL, LLAMA)}
ENCODERS = {family.name: family for family in (CONVNEXT, CLIP)}
WHOLES = {family.name: family for family in (LLAVA, LLAVA_NEXT, FAST_VLM, DEEPSTACK)}

# The layout under whose names all others' tensors are known here, and in which projects' own code releases models.
ORIGINAL = LLAVA_CODE
DEFAULT_DECODER, DEFAULT_PROMPT = LLAMA.name, "vicuna_v1"

# Prompts of no family: bare questions and answers, told apart by `</s>` alone; and LLaVA's first stage (M3's too),
# whose caption ends with a newline, not with </s>.
GENERAL_PROMPTS = {"qa": Prompt(apart=True), "plain": Prompt(assistant=("", "\n"), captions=True)}


def prompts() -> dict[str, Prompt]:
    """All layouts of a conversation by name."""
    return GENERAL_PROMPTS | {name: prompt for family in DECODERS.values() for name, prompt in family.prompts.items()}
