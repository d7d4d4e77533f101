"""The train state: created sharded, every leaf where it is planned to be."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import sharding
from lmm_jax.models.layers import Kernel
from lmm_jax.models.lmm import LMM, build
from lmm_jax.training import adapters, optimizer

TABLE = "decoder/table"
WINDOW = 128  # losses that a spike is told by


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: updates tried so far; also the position in the data.
      params: nested dict of float32 arrays; frozen ones may be held in bfloat16, see `config.optimizer`.
      opt_state: of the trainable leaves only.
      skipped: updates skipped because loss or gradient was not finite, or the loss a spike.
      skipped_in_row: of those, the latest without an update between.
      recent: losses `[WINDOW]` of the latest updates that were made, which spikes are told by, see `step.is_spike`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    skipped_in_row: jax.Array
    recent: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config and a mesh determine before any array exists.

    Attributes:
      config: the config.
      mesh: the mesh.
      model: the Linen module.
      tx: the optax transformation over the flat trainable leaves.
      rates: peak learning rate by parameter path.
      boxed: abstract parameters with their logical axes, adapters included.
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
    batch = {name: jnp.zeros((1, 1, 1), jnp.int32) for name in ("id", "slot", "segment")}
    batch["position"] = jnp.zeros((1, 1, 1, *decoder.position_shape), jnp.int32)
    size = vision.side
    batch["pixels"] = jnp.zeros((1, 1 + vision.extra_views, size, size, 3), jnp.uint8)
    tiled = len(decoder.inject_layers) - sum(n * n for n in model.stack_strides)
    if tiled:
        batch["gather"] = jnp.zeros((1, 1 + tiled, 1, vision.grid, vision.grid), jnp.int32)
    batch["question"] = batch["question_grids"] = jnp.zeros((1, 1, 1), jnp.int32)  # what a router reads
    return model.init(key, batch, method=lambda m, b: m.logits(m.route(b)[0]))["params"]


def make_program(config, mesh=None) -> Program:
    """Plans model, optimizer and shardings.

    Raises:
      ValueError: see `sharding.check_length`, `sharding.param_shardings`, `optimizer.rates` and `adapters.add_boxes`.
    """
    mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
    sharding.check_length(mesh, config.rules, config.data.length)
    model = build(config.model)
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    if config.lora.rank:
        boxed = adapters.add_boxes(boxed, config.lora)
    rates = optimizer.rates(config.optimizer, flatten_dict(nn.unbox(boxed), sep="/"))
    boxed = _frozen_in(config.optimizer.frozen_dtype, boxed, rates)
    params = nn.unbox(boxed)
    tx = optimizer.make_optimizer(config.optimizer, config.train.steps, rates)
    placed = sharding.param_shardings(boxed, mesh, config.rules)
    one = sharding.replicated(mesh)
    trainable, _ = optimizer.split(params, rates)
    opt_state = optax.tree_map_params(
        tx,
        optimizer.moment_sharding,
        jax.eval_shape(tx.init, trainable),
        trainable,
        optimizer.split(placed, rates)[0],
        transform_non_params=lambda _: one,
    )
    return Program(config, mesh, model, tx, rates, boxed, TrainState(one, placed, opt_state, one, one, one))


def _frozen_in(dtype, boxed, rates):
    """Boxed parameters, of which kernels of linear layers and the token table are held in `dtype` if they are frozen.

    The computation casts these to its own dtype before it uses them; what it uses in float32 stays so.
    """
    flat = flatten_dict(boxed, sep="/")
    for path, box in flat.items():
        if rates[path] == 0 and ((isinstance(box, Kernel) and not adapters.is_adapter(path)) or path == TABLE):
            flat[path] = box.replace(value=jax.ShapeDtypeStruct(box.value.shape, dtype))
    return unflatten_dict(flat, sep="/")


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
    """Initialises parameters and optimizer, of `dtype` or as planned, each leaf on the devices that hold it."""
    config, planned = program.config, nn.unbox(program.boxed)

    def build(key):
        params = nn.unbox(init_params(program.model, key))
        if config.lora.rank:
            flat = flatten_dict(params, sep="/") | adapters.init(key, program.boxed, config.lora)
            params = unflatten_dict(flat, sep="/")
        return _fresh(program, jax.tree.map(lambda x, p: x.astype(dtype or p.dtype), params, planned))

    # Outside the mesh context: under one, Flax constrains each new parameter and refuses axes that do not divide.
    return jax.jit(build, out_shardings=program.shardings)(jax.random.key(config.seed))


def _fresh(program, params):
    trainable, _ = optimizer.split(params, program.rates)
    zero = jnp.zeros((), jnp.int32)
    recent = jnp.zeros(WINDOW, jnp.float32)
    return TrainState(zero, params, program.tx.init(trainable), zero, zero, recent)
