"""Rotary positions in the words of `config.json`: read into `model.decoder.rope_scaling`, and written from it.

transformers 4 has a key rope_scaling beside rope_theta, 5 has rope_parameters, which holds both. Kinds and numbers
are those of `models.layers.scale_frequencies`.
"""

import math

from lmm_jax.hf import key_ranges

# Key of each number of a kind, in the order of ours, and what transformers takes where it is missing; None: required.
_NUMBERS = {
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": None,
        "attention_factor": None,
    },
}
# Keys that change what is computed in a way that is not ours, with the values that do not.
_PLAIN = {
    "partial_rotary_factor": (None, 1, 1.0),
    "truncate": (None, True),
    "mscale": (None, 0),
    "mscale_all_dim": (None, 0),
}


def rope_keys(keys):
    """The `Keys` of rotary positions, wherever they stand; empty ones if nothing is said.

    Raises:
      LoadError: a value that is out of its range.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if keys.get(name):
            rope = keys.inner(name)
            rope.hold(key_ranges.of_rope())
            return rope
    return type(keys)(keys.path, {})


def read_rope(keys, family) -> tuple:
    """`model.decoder.rope_scaling` of the `Keys` of a decoder.

    Raises:
      LoadError: a kind that the family's class or ours does not compute, or a number that is missing.
    """
    rope = rope_keys(keys)
    kind = rope.get("rope_type", rope.get("type"))
    if kind is None and not set(rope.content) <= {"rope_theta"}:
        raise keys.error(f"{rope.part} = {rope.content!r} has no rope_type, so that it may mean anything")
    kind = kind or "default"
    if kind == "default":
        return ()
    if kind not in family.rope_types:
        raise keys.error(
            f"rope_type = {kind!r} is not supported of a {family.title}, "
            f"{' or '.join(map(repr, ('default', *family.rope_types)))} is"
        )
    for key, plain in _PLAIN.items():
        rope.require(key, *plain)
    numbers = []
    for key, usual in _NUMBERS[kind].items():
        value = rope.get(key, usual)
        if key == "original_max_position_embeddings":  # which older folders have beside the others
            value = rope.get(key, keys.get(key, keys.get("max_position_embeddings")))
        if key == "attention_factor" and value is None:
            value = 0.1 * math.log(numbers[0]) + 1 if numbers[0] > 1 else 1.0
        if not isinstance(value, int | float):
            raise keys.error(f"{key} = {value!r} of rope_type {kind!r} is not supported, a number is")
        numbers.append(float(value))
    return kind, *numbers


def read_axes(keys, family) -> tuple:
    """`model.decoder.rope_axes` of the `Keys` of a decoder, see `read_rope`."""
    if not family.axes_key:
        return ()
    rope = rope_keys(keys)
    for key, allowed in family.axes_constants.items():
        rope.require(key, *allowed)
    found = rope.get(family.axes_key, family.defaults[family.axes_key])
    if not isinstance(found, list | tuple):
        raise keys.error(f"{family.axes_key} = {found!r} is not supported, a list of three numbers is")
    return tuple(found)


def written_rope(theta, scaling, axes=(), family=None) -> dict:
    """The keys of `config.json`, for transformers 4 and 5 alike; `axes` in the words of the `family`."""
    about = {}
    if scaling:
        kind, *numbers = scaling
        about = {"rope_type": kind} | dict(zip(_NUMBERS[kind], numbers, strict=True))
        if "original_max_position_embeddings" in about:
            about["original_max_position_embeddings"] = int(about["original_max_position_embeddings"])
    if axes:
        constants = {key: allowed[0] for key, allowed in family.axes_constants.items()}
        about = {"rope_type": "default"} | about | {family.axes_key: list(axes)} | constants
    return {"rope_theta": theta} | ({"rope_scaling": about} if about else {})
