"""An export run in transformers beside our model."""

import json
import shutil

import pytest

from lmm_jax.release.verify import LOGITS, verify
from tests.release.recipes import RECIPES, by_default


@pytest.mark.parametrize("recipe", by_default("convllava"))
def test_transformers_gives_our_ids_pixels_logits_and_answers(exported, transformers, recipe):
    workdir, folder = exported(recipe)
    assert json.loads((folder / "config.json").read_text())["model_type"] == RECIPES[recipe][2]
    assert verify(workdir, folder) <= LOGITS


def test_verifying_notices_another_sampling(exported, transformers, tmp_path):
    """Ids, pixels and tensors are as they should be; only what the stacks are made of is another."""
    workdir, folder = exported("deepstack_l")
    shutil.copytree(folder, tmp_path / "other")
    keys = json.loads((folder / "config.json").read_text())
    assert keys["sampling"] == "2d"
    (tmp_path / "other/config.json").write_text(json.dumps(keys | {"sampling": "1d"}))
    with pytest.raises(ValueError, match="logits differ by"):
        verify(workdir, tmp_path / "other")
