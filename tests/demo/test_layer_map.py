"""The map names the layers that stacks are really added before."""

import numpy as np
import pytest

from lmm_jax.config import load_config, visual_layout
from lmm_jax.data.visual_layout import SEQUENCES
from lmm_jax.demo.drawing import colour
from lmm_jax.demo.layer_map import SEQUENCE, Row, draw_map, find_rows, find_stacks, stack_label
from lmm_jax.models.lmm import build


def parts(name):
    config = load_config(f"configs/{name}")
    return visual_layout(config), build(config.model)


@pytest.mark.parametrize(
    "name", ["deepstack.py", "deepstack.py:recipe=hd", "hybrid.py", "qwen3vl_style.py", "digits.py:recipe=deepstack"]
)
def test_stacks_of_the_decoder_are_those_that_its_scan_adds(name):
    visual, model = parts(name)
    numbers = np.full(model.decoder.depth, -1)
    for number, stack in enumerate(find_stacks(visual, model)):
        assert stack.part == "decoder"
        numbers[stack.layer] = number
    np.testing.assert_array_equal(numbers, model.decoder.stack_numbers())
    layers = [row for row in find_rows(visual, model) if row.part == "decoder"]
    assert layers[-1].text.endswith(f" {model.decoder.depth - 1}")


def test_rows_of_deepstack_l():
    assert find_rows(*parts("deepstack.py")) == [
        Row("encoder", "vision encoder: 24 × 24 features of each view"),
        Row("sequence", "in the sequence: the whole picture's tokens"),
        Row("decoder", "decoder layer 0"),
        *(Row("decoder", f"decoder layer {layer}", (layer - 1,)) for layer in (1, 2, 3, 4)),
        Row("decoder", "decoder layers 5 to 31"),
    ]


def test_deepstack_v_adds_inside_the_encoder():
    visual, model = parts("digits.py:recipe=deepstack_v")
    stacks = find_stacks(visual, model)
    assert [(stack.part, stack.layer) for stack in stacks] == [("encoder", block) for block in (1, 2, 3, 4)]
    assert stack_label(3, stacks) == "sample 3 of the tiles → encoder block 4"
    assert [row.stacks for row in find_rows(visual, model)] == [(), (0,), (1,), (2,), (3,), (), ()]


def test_maps_of_the_encoder_are_named():
    names = [stack.name for stack in find_stacks(*parts("qwen3vl_style.py"))]
    assert names == [f"earlier map {n} of the encoder" for n in (1, 2, 3)]
    assert find_stacks(*parts("hybrid.py"))[3].name == "sample 3 of earlier map 1 of the encoder"


def test_a_model_without_stacks_says_so():
    assert "adds nothing on the way" in draw_map(*parts("digits.py"))
    drawn = draw_map(*parts("deepstack.py"))
    assert "adds nothing" not in drawn and drawn.count("added before →") == 4 and colour(3) in drawn


def test_every_sequence_has_words():
    assert set(SEQUENCE) == set(SEQUENCES)
