"""The model card: its code runs as it stands."""

import numpy as np
from PIL import Image

import lmm_jax as lmm


def test_the_card_s_own_lines_give_m3_s_budgets(exported, transformers):
    """The model card's code is run as it stands."""
    workdir, folder = exported("m3")
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    load, budget = (block.split("```")[0].replace('"FOLDER"', f'"{folder}"') for block in blocks)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    load = load.replace('Image.open("picture.png")', "picture").replace("max_new_tokens=64", "max_new_tokens=6")
    import torch

    scope = {"picture": picture, "torch": torch}
    exec(load, scope)
    exec(budget.replace("max_new_tokens=64", "max_new_tokens=6"), scope)
    assert scope["scale"] == 4 and (scope["inputs"]["input_ids"] == scope["model"].config.image_token_id).sum() == 4
    ours = lmm.load(workdir)
    (want,) = ours.generate_ids([[picture]], ["What is it?"], scale=4, max_new_tokens=6)
    found = scope["answer"][0, scope["inputs"]["input_ids"].shape[1] :].tolist()
    assert found[: len(want)] == want and len(want) > 1
