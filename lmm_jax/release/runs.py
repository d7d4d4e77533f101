"""Which export runs in which program: for model cards and READMEs, which quote the table, see `runs_table`.

"run" means that the program was run and answered as ours does, "read" that its code or its documentation says that it
runs and nobody tried, "no" that it does not run; a few words say why. Of transformers, tiny models of every recipe
gave our logits (within 1e-5) and our answers in 4.57.6, 5.0.0 and 5.24.0; in 4.49.0 LLaVA-NeXT gave others, silently.
"""

import dataclasses

PROGRAMS = (
    "transformers 4.57",
    "transformers 5.24",
    "transformers serve 5.24",
    "lmms-eval 0.7.3",
    "vLLM 0.33",
    "llama.cpp",
)
RUN, READ, NO = "run", "read", "no"
BUDGETS, ORIGINAL = "budgets", "original"  # rows that are of no family


@dataclasses.dataclass(frozen=True)
class Export:
    """One kind of export.

    Attributes:
      name: in `families.WHOLES`, or one of the two above.
      title: for readers.
      least: the least version of transformers that runs it as ours does; "" if none does.
      runs: (how, why) for each of `PROGRAMS`; the why may be empty.
    """

    name: str
    title: str
    least: str
    runs: tuple[tuple[str, str], ...]


EXPORTS = (
    Export(
        name="llava",
        title="`llava`: LLaVA-1.5, M3's largest budget",
        least="4.49",
        runs=(
            (RUN, ""),
            (RUN, ""),
            (RUN, ""),
            (RUN, "its stock `llava_hf`, batch size 1"),
            (READ, "`LlavaForConditionalGeneration` is on its list"),
            (NO, "its converter begins with the original layout: `--layout llava`"),
        ),
    ),
    Export(
        name=BUDGETS,
        title="M3's smaller budgets, of any class",
        least="5.24",
        runs=(
            (NO, "`generate` takes no features there"),
            (RUN, "the lines of the card"),
            (NO, "no request can say a budget"),
            (NO, "no option says a budget; the plug-in of lmm_jax does"),
            (NO, "no option says a budget"),
            (NO, "no option says a budget"),
        ),
    ),
    Export(
        name="llava_next",
        title="`llava_next`: LLaVA-NeXT",
        least="4.57",
        runs=(
            (RUN, ""),
            (RUN, ""),
            (RUN, ""),
            (READ, "its stock `llava_hf` knows the class"),
            (READ, "`LlavaNextForConditionalGeneration` is on its list"),
            (NO, "its converter begins with the original layout: `--layout llava`"),
        ),
    ),
    Export(
        name="llava_onevision",
        title="`llava_onevision`: LLaVA-OneVision, of pictures",
        least="5.24",
        runs=(
            (READ, "it has the class; nobody tried"),
            (RUN, "its processor asks for torchvision"),
            (READ, "the class is its own"),
            (NO, "its stock `llava_hf` knows `llava` and `llava_next` alone"),
            (NO, "not looked for there"),
            (NO, "not looked for there"),
        ),
    ),
    Export(
        name="fast_vlm",
        title="`fast_vlm`: ConvLLaVA",
        least="5.0",
        runs=(
            (NO, "it has no such class"),
            (RUN, ""),
            (RUN, ""),
            (NO, "its stock `llava_hf` knows `llava` and `llava_next` alone"),
            (NO, "the class is not on its list; its general path was not tried"),
            (NO, "it has no ConvNeXt tower"),
        ),
    ),
    Export(
        name="deepstack",
        title="`deepstack_llava`: DeepStack, by code that the folder ships",
        least="4.57",
        runs=(
            (RUN, "`trust_remote_code=True`"),
            (RUN, "`trust_remote_code=True`"),
            (NO, "it takes classes that transformers has itself: `getattr(transformers, …)` fails"),
            (NO, "its stock `llava_hf` knows `llava` and `llava_next` alone; by `lmm_jax` it runs"),
            (NO, "it splits `pooler_output` into embeddings of one width, and stacks ride on its channels"),
            (NO, "it runs no code of a folder"),
        ),
    ),
    Export(
        name="smolvlm",
        title="`smolvlm`: SmolVLM, of pictures",
        least="5.24",
        runs=(
            (READ, "it has the class; nobody tried"),
            (RUN, "its processor asks for torchvision and num2words"),
            (READ, "the class is its own"),
            (NO, "its stock models were not looked at; by `lmm_jax` it runs"),
            (NO, "not looked for there"),
            (NO, "not looked for there"),
        ),
    ),
    Export(
        name="granite_docling",
        title="`granite_docling`: Granite-Docling, both budgets and the router",
        least="5.24",
        runs=(
            (NO, "it has no such class"),
            (RUN, ""),
            (READ, "the class is its own"),
            (NO, "its stock models do not know the class; by `lmm_jax` it runs"),
            (NO, "not looked for there"),
            (NO, "not looked for there"),
        ),
    ),
    Export(
        name="qwen3_vl",
        title="`qwen3_vl`: Qwen3-VL, dense, of pictures",
        least="5.24",
        runs=(
            (READ, "the class is its own; nobody tried"),
            (RUN, "its processor asks for torchvision"),
            (READ, "the class is its own"),
            (READ, "its stock `qwen3_vl`"),
            (NO, "not looked for there"),
            (NO, "not looked for there"),
        ),
    ),
    Export(
        name=ORIGINAL,
        title="LLaVA's original layout",
        least="",
        runs=(
            (NO, "no class reads it; export `--layout hf`"),
            (NO, "no class reads it; export `--layout hf`"),
            (NO, "no class reads it; export `--layout hf`"),
            (READ, "its `llava` by LLaVA's own code, where that reads the recipe"),
            (NO, "it reads transformers' layout"),
            (READ, "its converter of LLaVA-1.5 and -1.6; of M3 and DeepStack no budgets and no stacks"),
        ),
    ),
)


def runs_table(exports=EXPORTS) -> str:
    """The table of some exports as Markdown."""
    head = ["| export | least transformers | " + " | ".join(PROGRAMS) + " |", "|---" * (len(PROGRAMS) + 2) + "|"]
    cells = [
        [export.title, export.least or "–", *(f"{how}: {why}" if why else how for how, why in export.runs)]
        for export in exports
    ]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])


def exports_of(whole, scales) -> list[Export]:
    """The rows of the table that are about a folder.

    Args:
      whole: its family in `families.WHOLES`; None for the original layout.
      scales: token budgets of a view.

    Raises:
      ValueError: the table has no row for the family; add one.
    """
    rows = {export.name: export for export in EXPORTS}
    name = ORIGINAL if whole is None else whole.name
    if name not in rows:
        raise ValueError(f"release/runs.py says nothing of exports of the family {name}")
    return [rows[name], *([rows[BUDGETS]] if pools(whole, scales) else [])]


def pools(whole, scales) -> bool:
    """Whether budgets of a folder are pooled features that stock calls can make, as a card shows it."""
    return whole is not None and not whole.projector and not whole.shrink_key and len(scales) > 1
