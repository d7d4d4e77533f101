"""Rotary positions in the words of `config.json`, beside what transformers makes of them."""

import numpy as np
import pytest
from etils import epath

from lmm_jax.families import DECODERS
from lmm_jax.hf.read_config import Keys, LoadError
from lmm_jax.hf.rope import read_rope, written_rope
from lmm_jax.models.layers import rotation_length, scale_frequencies

LLAMA = DECODERS["llama"]
SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all said": {
        "rope_type": "yarn",
        "factor": 16.0,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
    },
}


def keys(**content):
    return Keys(epath.Path("config.json"), content)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(transformers, name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    said = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"} | said,
    )
    plain = 5000.0 ** (-np.arange(16, dtype=np.float32) / 16)
    want, length = plain, 1.0
    if said:
        want, length = ROPE_INIT_FUNCTIONS[said["rope_type"]](config, "cpu")
    ours = read_rope(keys(rope_scaling=said, rope_theta=5000.0), LLAMA)
    np.testing.assert_allclose(scale_frequencies(plain, ours, 5000.0), want, rtol=1e-6)
    assert rotation_length(ours) == pytest.approx(length, rel=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_what_is_written_is_read_in_both_places_that_transformers_has(name):
    scaling = read_rope(keys(rope_scaling=SCALINGS[name]), LLAMA)
    written = written_rope(5000.0, scaling)
    assert read_rope(keys(**written), LLAMA) == scaling and written["rope_theta"] == 5000.0
    assert read_rope(keys(rope_parameters=written | written.get("rope_scaling", {})), LLAMA) == scaling


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic' is not supported of a LLaMA, 'default' or"),
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type = 'longrope' is not supported"),
        ({"factor": 2.0}, "has no rope_type"),
        ({"rope_type": "linear"}, "factor = None of rope_type 'linear' is not supported, a number is"),
        ({"rope_type": "linear", "factor": "2"}, "factor = '2'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "truncate = False is not supported"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale = 0.7 is not supported"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)
def test_what_is_computed_otherwise_is_refused_by_key(said, message):
    with pytest.raises(LoadError, match=r"config\.json") as error:
        read_rope(keys(rope_scaling=said, max_position_embeddings=64), LLAMA)
    assert message in str(error.value)
