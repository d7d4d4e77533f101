"""Names and layouts of tensors: every parameter has one in each layout, and comes back from it."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import lmm_jax as lmm
from lmm_jax import families, sharding
from lmm_jax.hf import names
from lmm_jax.training.state import make_program
from tests.release.recipes import CONFIGS, DECODER, RECIPES

LAYOUTS = {"llava": "llava", "llava_next": "llava_next", "convllava": "fast_vlm", "deepstack_v": "deepstack"}


@pytest.fixture(scope="module", params=LAYOUTS)
def model(request):
    """`config.model`, the shapes of its parameters by path, and what holds it in transformers."""
    file, small, _ = RECIPES[request.param]
    config = lmm.load_config(f"{CONFIGS}/{file}", *small, *DECODER, "model.decoder.vocab_size=400")
    program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    flat = flatten_dict(nn.unbox(program.boxed), sep="/")
    return config.model, {path: x.shape for path, x in flat.items()}, families.WHOLES[LAYOUTS[request.param]]


def test_every_layer_of_every_parameter_is_one_tensor_and_comes_back_from_it(model):
    model, shapes, _ = model
    found = names.tensors(model, shapes)
    assert len({t.name for t in found}) == len(found)
    rng, seen = np.random.default_rng(0), {path: [] for path in shapes}
    for t in found:
        shape = shapes[t.path] if t.layer is None else shapes[t.path][1:]
        ours = rng.normal(size=shape).astype(np.float32)
        theirs = t.to_theirs(ours)
        assert theirs.shape == t.shape and theirs.flags.c_contiguous
        back = np.zeros_like(ours)
        t.to_ours(theirs, back)
        np.testing.assert_array_equal(back, ours)
        seen[t.path].append(t.layer)
    for path, layers in seen.items():
        assert layers == [None] or layers == list(range(shapes[path][0])), path


def test_transformers_name_of_a_tensor_leads_back_to_the_original_one(model):
    model, shapes, whole = model
    for t in names.tensors(model, shapes):
        theirs = names.transformers_name(t.name, whole)
        assert names.original_name(theirs) == t.name
        assert names.original_name(t.name) == t.name and names.ignored(t.name) is None


def test_what_has_no_name_is_an_error():
    with pytest.raises(ValueError, match=r"tensor vision.mystery has no name in llava"):
        names.transformers_name("vision.mystery", families.WHOLES["llava"])
