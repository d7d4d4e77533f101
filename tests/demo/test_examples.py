"""The page begins with unseen pictures of the data that the model was trained on, if these are there."""

from ml_collections import ConfigDict

from lmm_jax.data.images import image_size
from lmm_jax.data.prepared import Prepared, as_turns
from lmm_jax.demo.examples import find_examples


def test_examples_are_unseen_records(digits_folder, tmp_path):
    found = find_examples(ConfigDict({"path": str(digits_folder), "mixture": ()}), tmp_path, count=3)
    assert len(found) == 3 and len({example.picture for example in found}) == 3
    first = as_turns(Prepared(digits_folder, "test")[0])[0].text
    assert found[0].question and found[0].question in first and "<image>" not in found[0].question
    assert [image_size(example.picture) for example in found] == [(24, 24)] * 3


def test_there_are_none_where_the_data_is_gone(tmp_path):
    assert find_examples(ConfigDict({"path": str(tmp_path / "gone"), "mixture": ()}), tmp_path) == []
    assert find_examples(ConfigDict({"path": "", "mixture": ()}), tmp_path) == []
