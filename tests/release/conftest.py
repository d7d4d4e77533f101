"""Workdirs of the tiny recipes and the folders that they are exported to."""

import functools
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import save_config
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import abstract_params, make_program
from tests.release.recipes import CONFIGS, DECODER, RECIPES, TOKENIZER


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """`trained(recipe, *overrides, fsdp)`: a workdir with drawn parameters, saved from a mesh of `fsdp` devices."""

    @functools.cache
    def make(recipe, *overrides, fsdp=2):
        file, small, _ = RECIPES[recipe]
        vocabulary = f"model.decoder.vocab_size={TOKENIZER.vocab_size}"
        config = lmm.load_config(f"{CONFIGS}/{file}", *small, *DECODER, vocabulary, *overrides)
        program = make_program(config, sharding.make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp]))
        rng, drawn = np.random.default_rng(0), {}
        for path, x in flatten_dict(abstract_params(program, config.model.dtype), sep="/").items():
            one = x.shape[path.startswith(("decoder/layers/", "vision/blocks_")) or "/blocks/" in path :]
            spread = math.prod(one[:-1]) ** -0.5 if len(one) > 1 else 0.05  # logits of a few units
            value = rng.normal(float(path.endswith("scale")), spread, x.shape).astype(x.dtype)
            drawn[path] = jax.device_put(value, x.sharding)
        workdir = tmp_path_factory.mktemp(recipe)
        save_config(config, workdir / "config.json")
        TOKENIZER.save(workdir)
        checkpoints = Checkpoints(workdir)
        checkpoints.save_params(unflatten_dict(drawn, sep="/"))
        checkpoints.wait()
        return workdir

    return make


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    """`exported(recipe)`: workdir and its folder in transformers' layout."""

    @functools.cache
    def make(recipe):
        folder = tmp_path_factory.mktemp("hf") / recipe
        lmm.export(trained(recipe), folder)
        return trained(recipe), folder

    return make
