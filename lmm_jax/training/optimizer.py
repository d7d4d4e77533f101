"""AdamW with a rate per group of paths; frozen parameters have no gradient and no state.

What AdamW keeps of each trainable parameter, two float32 numbers, is half of what a run holds or more. Two options
make it less. `optimizer.moments="bfloat16"` stores both moments in two bytes a number. `optimizer.second_moment=
"factored"` keeps of the second only the means over the rows and over the columns of a matrix, as Adafactor does.
"""

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax.training.adapters import SCALE, is_adapter

NO_DECAY = ("scale", "bias", "cls", "position", "image_newline")  # last name of a path


def rates(config, paths) -> dict[str, float]:
    """Peak learning rate of each parameter path; 0 = frozen.

    Beside adapters, an adapted layer's own parameters are frozen, and others train only if a group names them.

    Raises:
      ValueError: a group's prefix matches nothing, or a group freezes adapters.
    """
    groups = [(prefix.rstrip("/"), float(rate)) for prefix, rate in config.groups]
    for prefix, _ in groups:
        if not any(_under(path, prefix) for path in paths):
            raise ValueError(f"optimizer.groups: no parameter lies under '{prefix}'")
    adapted = {path.rpartition("/")[0] for path in paths if is_adapter(path)}

    def rate(path):
        layer, _, leaf = path.rpartition("/")
        prefix, named = next(((p, rate) for p, rate in groups if _under(path, p)), (None, None))
        if not adapted:
            return config.learning_rate if named is None else named
        if layer in adapted and (leaf == SCALE or not is_adapter(path)):
            return 0.0
        if not is_adapter(path):
            return named or 0.0
        if named == 0:
            raise ValueError(
                f"optimizer.groups: {prefix!r} has rate 0 and lora.paths gives {layer} an adapter, which would never "
                "train; give the group a rate, or leave the layer out of lora.paths"
            )
        return config.learning_rate if named is None else named

    return {path: rate(path) for path in paths}


def split(params, rates):
    """Splits nested `params` into flat dicts of trainable and of frozen leaves, by path."""
    flat = flatten_dict(params, sep="/")
    trainable = {path: x for path, x in flat.items() if rates[path] > 0}
    return trainable, {path: x for path, x in flat.items() if rates[path] == 0}


def merge(trainable, frozen):
    """Inverse of `split`."""
    return unflatten_dict({**trainable, **frozen}, sep="/")


def schedule(config, steps):
    """Share of the peak rate at each step: linear warm-up, then cosine to `final`."""
    warmup = max(round(config.warmup * steps), 1)
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(steps, warmup + 1), config.final)


def make_optimizer(config, steps, rates):
    """AdamW over the flat dict of trainable leaves; clipping comes first and sees all of them.

    Args:
      config: `config.optimizer`.
      steps: training steps.
      rates: path to peak rate.
    """

    def decays(params):
        return {path: path.rsplit("/", 1)[-1] not in NO_DECAY for path in params}

    def scale(updates):
        return {path: -rates[path] * update for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        _moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_schedule(schedule(config, steps)),
        optax.stateless(lambda updates, _: scale(updates)),
    )


def _moments(config):
    """What the gradients' moments make of them: Adam's, or with a factored second moment Adafactor's with momentum.

    The latter is what trains ViTs at scale (Zhai et al. 2022, arXiv 2106.04560): the second moment's decay grows as
    in Adafactor but not past b2, updates are clipped to a root mean square of 1 a parameter, and their mean with
    decay b1 is taken.
    """
    stored = store_in_bfloat16 if config.moments == "bfloat16" else lambda moments: moments
    if config.second_moment == "full":
        return stored(optax.scale_by_adam(config.b1, config.b2))
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate_fn=lambda step, power: jnp.minimum(1 - (step + 1.0) ** -power, config.b2)
        ),
        optax.clip_by_block_rms(1.0),
        stored(optax.ema(config.b1)),
    )


def store_in_bfloat16(moments):
    """An optax transformation whose float32 state lies in bfloat16 between steps, rounded up or down at random.

    A second moment changes by a thousandth a step, which is less than half the distance of two bfloat16 numbers:
    rounded to the nearest it would stay where it is. Rounded up with the probability of how near that is, it is
    right on average. What is drawn depends on the step and the parameter alone, so that a run can be resumed.

    Args:
      moments: its state has a `count` of steps.
    """

    def init(params):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, moments.init(params))

    def update(updates, state, params=None):
        whole = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        updates, new = moments.update(updates, whole, params)
        leaves, tree = jax.tree.flatten(new)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        rounded = [
            round_at_random(x, jax.random.fold_in(key, n)) if x.dtype == jnp.float32 else x
            for n, x in enumerate(leaves)
        ]
        return updates, jax.tree.unflatten(tree, rounded)

    return optax.GradientTransformation(init, update)


def round_at_random(x, key):
    """float32 `x` as one of the two bfloat16 numbers that it lies between, so that the mean is `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def moment_sharding(moment, param, placed):
    """The sharding of a moment: its parameter's, without the axis that a factored one is a mean over.

    Args:
      moment, param: abstract arrays.
      placed: `NamedSharding` of the parameter.
    """
    if moment.shape == param.shape:
        return placed
    spec = (*placed.spec, *[None] * (param.ndim - len(placed.spec)))
    for axis in reversed(range(param.ndim)):
        if moment.shape == (*param.shape[:axis], *param.shape[axis + 1 :]):
            return jax.NamedSharding(placed.mesh, jax.P(*spec[:axis], *spec[axis + 1 :]))
    return jax.NamedSharding(placed.mesh, jax.P())  # one number, where optax keeps nothing


def _under(path, prefix):
    return path == prefix or path.startswith(prefix + "/")
