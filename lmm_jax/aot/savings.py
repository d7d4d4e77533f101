"""What the options that store less of a run save of its state: nothing is compiled for it."""

import math

import jax
from flax.traverse_util import flatten_dict

from lmm_jax.training import optimizer
from lmm_jax.training.base import taken
from lmm_jax.training.state import abstract_state, make_program

LLAVA_RANK = 128  # of LLaVA's finetune_lora.sh


def options(config) -> dict[str, dict]:
    """Fields of a config that store less, by a name for readers; the first stores all there is."""
    whole = {
        "lora.rank": 0,
        "optimizer.moments": "float32",
        "optimizer.second_moment": "full",
        "optimizer.frozen_dtype": "float32",
    }
    bfloat16, factored = {"optimizer.moments": "bfloat16"}, {"optimizer.second_moment": "factored"}
    rank = config.lora.rank or min(LLAVA_RANK, config.model.decoder.width // 8)
    half = {"optimizer.frozen_dtype": config.model.dtype}
    return {
        "all in float32": whole,
        "bfloat16 moments": whole | bfloat16,
        "factored second moment": whole | factored,
        "factored, and a bfloat16 first moment": whole | factored | bfloat16,
        f"LoRA of rank {rank}": whole | {"lora.rank": rank},
        f"LoRA of rank {rank}, frozen kernels in {config.model.dtype}": whole | {"lora.rank": rank} | half,
    }


def savings(config, mesh) -> list[dict]:
    """A row for each of `options`: name, trainable parameters, and bytes of one device: state and gradients.

    `checkpoint_bytes` are those of a checkpoint, of all devices. Options that do not go with the config, as those of
    adapters for layers that it freezes, have no row.
    """
    return [row for name, fields in options(config).items() if (row := _row(config, mesh, name, fields))]


def _row(config, mesh, name, fields):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for field, value in fields.items():
            part, leaf = field.split(".")
            config[part][leaf] = value
    try:
        program = make_program(config, mesh)
    except ValueError:
        return None
    state = abstract_state(program)
    trainable, _ = optimizer.split(state.params, program.rates)
    params = flatten_dict(state.params, sep="/")
    elsewhere = taken(program)
    kept = [x for path, x in params.items() if path not in elsewhere] + jax.tree.leaves(state.opt_state)
    return {
        "name": name,
        "trainable": sum(x.size for x in trainable.values()),
        "state_bytes": _held([state.params, state.opt_state]),
        "gradient_bytes": _held(trainable),
        "checkpoint_bytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in kept),
    }


def _held(tree):
    """Bytes of one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
