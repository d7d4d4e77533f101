"""What is published of each model family, as data: nothing here imports anything of ours, or computes.

One file a family, of the kinds in `kinds`, and a line in a table below. Whoever reads, writes, tokenises or prompts
asks these tables; where several families could answer, the first one counts.
"""

from lmm_jax.families.clip import CLIP
from lmm_jax.families.convnext import CONVNEXT
from lmm_jax.families.deepstack import DEEPSTACK
from lmm_jax.families.granite import GRANITE
from lmm_jax.families.granite_docling import (
    CONNECTOR,
    GRANITE_DOCLING,
    GRANITE_DOCLING_MARKS,
    GRANITE_DOCLING_ROUTER,
    GRANITE_DOCLING_TEXT,
    GRANITE_DOCLING_VISION,
)
from lmm_jax.families.kinds import Prompt
from lmm_jax.families.llama import LLAMA
from lmm_jax.families.llava import FAST_VLM, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, PROJECTOR_FIELDS
from lmm_jax.families.llava_code import LLAVA_CODE
from lmm_jax.families.mistral import MISTRAL
from lmm_jax.families.phi3 import PHI3
from lmm_jax.families.qwen2 import QWEN2
from lmm_jax.families.qwen3 import QWEN3
from lmm_jax.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MERGER, QWEN3_VL_TEXT, QWEN3_VL_VISION
from lmm_jax.families.siglip import SIGLIP
from lmm_jax.families.smollm2 import SMOLLM2
from lmm_jax.families.smolvlm import SMOLVLM, SMOLVLM_CONNECTOR, SMOLVLM_MARKS, SMOLVLM_VISION

DECODERS = {
    family.name: family
    for family in (PHI3, MISTRAL, SMOLLM2, QWEN3, QWEN2, GRANITE, GRANITE_DOCLING_TEXT, QWEN3_VL_TEXT, LLAMA)
}
ENCODERS = {
    family.name: family
    for family in (CONVNEXT, CLIP, SIGLIP, SMOLVLM_VISION, GRANITE_DOCLING_VISION, QWEN3_VL_VISION)
}
PROJECTORS = {family.name: family for family in (SMOLVLM_CONNECTOR, CONNECTOR, QWEN3_VL_MERGER)}
# Of a head that chooses between two budgets, by our path below `density_router/`.
ROUTER = GRANITE_DOCLING_ROUTER
# Fields of the projector of whole models that name none: LLaVA's.
PLAIN_PROJECTOR = PROJECTOR_FIELDS
WHOLES = {
    family.name: family
    for family in (LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, FAST_VLM, DEEPSTACK, SMOLVLM, GRANITE_DOCLING, QWEN3_VL)
}

# The layout under whose names all others' tensors are known here, and in which projects' own code releases models.
ORIGINAL = LLAVA_CODE
# Text inside the block of a picture, see `Marks`.
MARKS = {SMOLVLM.marks: SMOLVLM_MARKS, GRANITE_DOCLING.marks: GRANITE_DOCLING_MARKS}

DEFAULT_DECODER, DEFAULT_PROMPT = LLAMA.name, "vicuna_v1"

# Prompts of no family: bare questions and answers, told apart by `</s>` alone; and LLaVA's first stage (M3's too),
# whose caption ends with a newline, not with </s>.
GENERAL_PROMPTS = {"qa": Prompt(apart=True), "plain": Prompt(assistant=("", "\n"), captions=True)}

# Names that meant another layout in files of before, and what that is called today.
RENAMED_PROMPTS = {"chatml": "chatml_direct"}


def prompts() -> dict[str, Prompt]:
    """All layouts of a conversation by name."""
    return GENERAL_PROMPTS | {name: prompt for family in DECODERS.values() for name, prompt in family.prompts.items()}
