"""An export run in transformers beside our model."""

import importlib.util
import inspect
import json
import shutil

import pytest

from lmm_jax import families
from lmm_jax.release.verify import LOGITS, require_processor, verify
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


@pytest.mark.parametrize(
    "whole", [whole for whole in families.WHOLES.values() if not whole.code], ids=lambda w: w.name
)
def test_what_a_processor_asks_for_is_named_before_anything_is_written(transformers, monkeypatch, whole):
    """A processor that takes films needs torchvision; whatever is missing is a sentence."""
    takes = inspect.signature(getattr(transformers, whole.processor).__init__).parameters
    assert ("torchvision" in whole.processor_needs) == ("video_processor" in takes)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if not whole.processor_needs:
        require_processor(whole)
        return
    with pytest.raises(ImportError, match=f"needs {' and '.join(whole.processor_needs)}, which {whole.processor}"):
        require_processor(whole)
