"""AdamW with a rate per group of paths; frozen parameters have no gradient and no state."""

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

NO_DECAY = ("scale", "bias", "cls", "position", "image_newline")  # last name of a path


def rates(config, paths) -> dict[str, float]:
    """Peak learning rate of each parameter path; 0 = frozen.

    Raises:
      ValueError: a group's prefix matches nothing.
    """
    groups = [(prefix.rstrip("/"), float(rate)) for prefix, rate in config.groups]
    for prefix, _ in groups:
        if not any(_under(path, prefix) for path in paths):
            raise ValueError(f"optimizer.groups: no parameter lies under '{prefix}'")
    return {
        path: next((rate for prefix, rate in groups if _under(path, prefix)), config.learning_rate) for path in paths
    }


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
        optax.scale_by_adam(config.b1, config.b2),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.scale_by_schedule(schedule(config, steps)),
        optax.stateless(lambda updates, _: scale(updates)),
    )


def _under(path, prefix):
    return path == prefix or path.startswith(prefix + "/")
