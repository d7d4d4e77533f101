"""The train state: created sharded, every leaf where it is planned to be."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from lmm_jax import sharding
from lmm_jax.models.lmm import LMM, build
from lmm_jax.training import optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: updates tried so far; also the position in the data.
      params: nested dict of float32 arrays.
      opt_state: of the trainable leaves only.
      skipped: updates skipped because loss or gradient was not finite.
      skipped_in_row: of those, the latest without an update between.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config and a mesh determine before any array exists.

    Attributes:
      config: the config.
      mesh: the mesh.
      model: the Linen module.
      tx: the optax transformation over the flat trainable leaves.
      rates: peak learning rate by parameter path.
      boxed: abstract parameters with their logical axes.
      shardings: `TrainState` of shardings.
    """

    config: Any
    mesh: jax.sharding.Mesh
    model: LMM
    tx: optax.GradientTransformation
    rates: dict[str, float]
    boxed: Any
    shardings: TrainState

    def use(self):
        """Context in which the program is traced and run."""
        return sharding.use(self.mesh, self.config.rules)


def init_params(model, key):
    """Boxed parameters of a model, by way of the smallest batch that touches them all."""
    vision, decoder = model.vision, model.decoder
    batch = {name: jnp.zeros((1, 1, 1), jnp.int32) for name in ("id", "slot", "position", "segment")}
    size = vision.grid * vision.stride
    batch["pixels"] = jnp.zeros((1, 1 + vision.extra_views, size, size, 3), jnp.uint8)
    tiled = len(decoder.inject_layers) - sum(n * n for n in vision.level_strides)
    if tiled:
        batch["gather"] = jnp.zeros((1, 1 + tiled, 1, vision.grid, vision.grid), jnp.int32)
    batch["question"] = batch["question_grids"] = jnp.zeros((1, 1, 1), jnp.int32)  # what a router reads
    return model.init(key, batch, method=lambda m, b: m.logits(m.route(b)[0]))["params"]


def make_program(config, mesh=None) -> Program:
    """Plans model, optimizer and shardings.

    Raises:
      ValueError: see `sharding.check_length`, `sharding.param_shardings` and `optimizer.rates`.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    sharding.check_length(mesh, config.rules, config.data.length)
    model = build(config.model)
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = nn.unbox(boxed)
    rates = optimizer.rates(config.optimizer, flatten_dict(params, sep="/"))
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps, rates)
    placed = sharding.param_shardings(boxed, mesh, config.rules)
    one = sharding.replicated(mesh)
    trainable, _ = optimizer.split(params, rates)
    opt_state = optax.tree_map_params(
        tx,
        lambda _, s: s,
        jax.eval_shape(tx.init, trainable),
        optimizer.split(placed, rates)[0],
        transform_non_params=lambda _: one,
    )
    return Program(config, mesh, model, tx, rates, boxed, TrainState(one, placed, opt_state, one, one))


def abstract_params(program, dtype=None):
    """The parameters as `ShapeDtypeStruct`s that carry their planned shardings; of `dtype`, float32 if None."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s),
        nn.unbox(program.boxed),
        program.shardings.params,
    )


def abstract_state(program) -> TrainState:
    """The train state as `ShapeDtypeStruct`s that carry their planned shardings."""

    def build():
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nn.unbox(program.boxed))
        return _fresh(program, params)

    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), jax.eval_shape(build), program.shardings
    )


def init_state(program, dtype=None) -> TrainState:
    """Initialises parameters and optimizer, of `dtype` or float32, each leaf on the devices that hold it."""

    def build(key):
        params = nn.unbox(init_params(program.model, key))
        return _fresh(program, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params))

    # Outside the mesh context: under one, Flax constrains each new parameter and refuses axes that do not divide.
    return jax.jit(build, out_shardings=program.shardings)(jax.random.key(program.config.seed))


def _fresh(program, params):
    trainable, _ = optimizer.split(params, program.rates)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, program.tx.init(trainable), zero, zero)
