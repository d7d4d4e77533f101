"""The model card: its code runs as it stands, and what it says of where exports run is said in one place."""

import pathlib

import numpy as np
import pytest
from PIL import ExifTags, Image

import lmm_jax as lmm
from lmm_jax import families
from lmm_jax.data.images import open_picture
from lmm_jax.release import runs


def test_the_card_s_own_lines_give_m3_s_budgets(exported, transformers, tmp_path):
    """The model card's code is run as it stands."""
    workdir, folder = exported("m3")
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    load, budget = (block.split("```")[0].replace('"FOLDER"', f'"{folder}"') for block in blocks)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(tmp_path / "picture.png")
    load = load.replace('"picture.png"', f'"{tmp_path}/picture.png"').replace("max_new_tokens=64", "max_new_tokens=6")
    import torch

    scope = {"torch": torch}
    exec(load, scope)
    exec(budget.replace("max_new_tokens=64", "max_new_tokens=6"), scope)
    assert scope["scale"] == 4 and (scope["inputs"]["input_ids"] == scope["model"].config.image_token_id).sum() == 4
    ours = lmm.load(workdir)
    (want,) = ours.generate_ids([[picture]], ["What is it?"], scale=4, max_new_tokens=6)
    found = scope["answer"][0, scope["inputs"]["input_ids"].shape[1] :].tolist()
    assert found[: len(want)] == want and len(want) > 1


LEVELS = np.random.default_rng(0).integers(0, 256, (40, 60, 4), np.uint8)


def turned(path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(LEVELS[..., :3]).save(path, exif=exif)


def deep(path):
    Image.fromarray(LEVELS[..., 0].astype(np.uint16) * 257).save(path)


@pytest.mark.parametrize(
    ("save", "largest"),
    [(turned, 0), (deep, 255), (lambda path: Image.fromarray(LEVELS).save(path), 255)],
    ids=["EXIF", "16 bits", "alpha"],
)
def test_how_far_the_card_s_pictures_are_from_ours(transformers, tmp_path, save, largest):
    """In levels of 255: not at all if a header turns the picture; of the others the card says that they differ."""
    from transformers.image_utils import load_image

    save(tmp_path / "picture.png")
    theirs, ours = (np.asarray(f(str(tmp_path / "picture.png")), int) for f in (load_image, open_picture))
    assert theirs.shape == ours.shape
    assert np.abs(theirs - ours).max() == pytest.approx(largest, abs=3)


def test_the_card_opens_pictures_by_load_image_and_names_the_least_version(exported):
    _, folder = exported("convllava")
    text = (folder / "README.md").read_text()
    assert "load_image(" in text and "Image.open(" not in text.split("```")[1] and "16 bits" in text
    assert "needs transformers 5.0 or newer" in text and runs.runs_table([EXPORTS["fast_vlm"]]) in text


EXPORTS = {export.name: export for export in runs.EXPORTS}


def test_every_export_has_a_row_and_the_readme_quotes_the_table():
    assert EXPORTS.keys() == {*families.WHOLES, runs.BUDGETS, runs.ORIGINAL}
    assert all(len(export.runs) == len(runs.PROGRAMS) for export in runs.EXPORTS)
    assert {how for export in runs.EXPORTS for how, _ in export.runs} == {runs.RUN, runs.READ, runs.NO}
    page = pathlib.Path(lmm.__file__).parent / "hf/README.md"
    assert runs.runs_table() in page.read_text(), f"quote this:\n{runs.runs_table()}"
