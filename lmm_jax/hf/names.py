"""Our parameter paths beside the tensor names that published models store.

Ours are stacked over the layers of a scan and laid out input first; theirs are one tensor a layer, output first. The
families say the names; all layouts' are known here by those of the original one, `families.ORIGINAL`.
"""

import re

from lmm_jax import families
from lmm_jax.families import ORIGINAL
from lmm_jax.families.kinds import LINEAR, SAME
from lmm_jax.hf.tensor import Tensor, their_shape

VOCABULARY = ("decoder/table", "decoder/head/kernel")  # our paths of what has a row or a column a piece
BY_PATH = re.compile(r"_by_(\d+)(?=/)")  # ends a name of ours that belongs to one path of the projector
LEVELS = "level_projectors_"  # our paths of what stands behind the encoder's levels begin with it, then a number
NUMBERED = re.compile(r"\b(blocks|stage)_(\d+)\b")  # scans of our encoders: by their first block, or counted from 1


def decoder_family(model) -> families.kinds.Decoder:
    """The family of the decoder of `config.model`.

    Raises:
      ValueError: it names none whose tensors are known.
    """
    name = model.families.decoder
    known = [family.name for family in families.DECODERS.values() if family.tensors]
    if name not in known:
        raise ValueError(f"model.families.decoder='{name}' is no published family; known are {', '.join(known)}")
    return families.DECODERS[name]


def encoder_family(model) -> families.kinds.Encoder:
    """The family of the encoder of `config.model`.

    Raises:
      ValueError: it names none, or one that another module computes.
    """
    name = model.families.vision
    family = families.ENCODERS.get(name)
    if family is None:
        raise ValueError(
            f"model.families.vision='{name}' is no published family, so that nobody else's layout holds what "
            f"model.encoder='{model.encoder}' computes; known are {', '.join(families.ENCODERS)}"
        )
    if family.encoder != model.encoder:
        raise ValueError(
            f"model.families.vision='{name}' is computed by model.encoder='{family.encoder}', not '{model.encoder}'"
        )
    return family


def projector_family(model) -> families.kinds.Projector:
    """The family of the projector of `config.model`.

    Raises:
      ValueError: it is LLaVA's, which has no levels and no name.
    """
    name = model.families.projector
    if name not in families.PROJECTORS:
        raise ValueError(
            f"model.families.projector='{name}' is no published family whose projector has a name here; "
            f"known are {', '.join(families.PROJECTORS)}"
        )
    return families.PROJECTORS[name]


def tensors(model, shapes) -> list[Tensor]:
    """Every tensor that a model of ours is made of, under the names of the original layout.

    Args:
      model: `config.model`.
      shapes: our parameter paths and shapes, flat.

    Raises:
      ValueError: a parameter that no published model of these families has.
    """
    out = []
    for path, shape in shapes.items():
        name, layout, first = _theirs(model, path)
        stacked = "{layer}" in name
        one = shape[1:] if stacked else shape
        theirs = their_shape(layout, one, model.vision)
        rows = _rows(layout, path, shapes, stacked, model.vision)
        layers = range(shape[0]) if stacked else [None]
        for i in layers:
            out.append(Tensor(name.format(layer=first + (i or 0)), theirs, path, i, layout.order, rows))
    return out


def _rows(layout, path, shapes, stacked, fields):
    """`Tensor.rows` of a parameter, from the shapes of those that it is fused with."""
    if not layout.fused:
        return None
    *above, own, leaf = path.split("/")
    siblings = [shapes["/".join([*above, name, leaf])] for name in layout.fused]
    rows = [their_shape(layout, shape[1:] if stacked else shape, fields)[0] for shape in siblings]
    return sum(rows[: layout.fused.index(own)]), sum(rows)


def original_name(name) -> str:
    """The original name of a tensor that is stored under another layout's."""
    if name.startswith(ORIGINAL.tower):
        return name
    wholes = [alias for family in families.WHOLES.values() for alias in family.aliases]
    towers = [
        (pattern, ORIGINAL.tower + family.prefix + inside)
        for family in families.ENCODERS.values()
        for pattern, inside in family.aliases
    ]
    decoders = [alias for family in families.DECODERS.values() for alias in family.aliases]
    for pattern, original in (*wholes, *towers, *decoders):
        renamed, found = re.subn(pattern, original, name, count=1)
        if found:
            return renamed
    return name


def transformers_name(name, whole) -> str:
    """A tensor's name in a family of whole models, from the original one: what stands on its hub."""
    for original, theirs in whole.names:
        if name.startswith(original):
            return theirs + name.removeprefix(original)
    raise ValueError(f"tensor {name} has no name in {whole.name}")


def ignored(name) -> str | None:
    """Why a tensor of a checkpoint is not read, or None if it should be."""
    for family in (*families.DECODERS.values(), *families.ENCODERS.values()):
        for pattern, why in family.ignored.items():
            if re.search(pattern, name):
                return why
    return None


def part_of(name) -> str:
    """Which part of a run an original name belongs to: "vision", "projector" or "language"."""
    if name.startswith(ORIGINAL.tower):
        return "vision"
    projectors = [prefix for family in families.PROJECTORS.values() for prefix in family.prefixes]
    router = {theirs for theirs, _ in families.ROUTER.values()}
    if name.startswith((ORIGINAL.projector + ".", ORIGINAL.newline, *projectors)) or name in router:
        return "projector"
    return "language"


def block_number(name, model) -> int | None:
    """Number of the encoder's block that an original name belongs to, if its family numbers blocks."""
    family = encoder_family(model)
    prefix = ORIGINAL.tower + family.prefix + family.blocks
    if not family.blocks or not name.startswith(prefix):
        return None
    return int(name.removeprefix(prefix).split(".")[0])


def _of_projector(family, shuffle, part, rest):
    """`(name, layout)` of a parameter of a family's projector or of one behind a level of the encoder."""
    by_path = BY_PATH.search(rest)
    number = shuffle.index(int(by_path[1])) if by_path else 0
    known = family.level_tensors if part.startswith(LEVELS) else family.tensors
    found = known.get(BY_PATH.sub("", rest))
    if found is None or number >= len(family.paths):
        raise ValueError(f"parameter {part}/{rest} has no name in a projector of {family.title}")
    name, layout = found
    return name.replace("{path}", family.paths[number]).replace("{level}", part.removeprefix(LEVELS)), layout


def _theirs(model, path):
    """`(name with {layer} where there are several, layout, number of the first layer)`."""
    part, _, rest = path.partition("/")
    if path == "image_newline":
        return ORIGINAL.newline, SAME, 0
    if (part == "projector" and model.families.projector) or part.startswith(LEVELS):
        return *_of_projector(projector_family(model), model.projector.shuffle, part, rest), 0
    if part == "density_router":
        return *families.ROUTER[rest], 0
    if part == "projector":
        layer, leaf = rest.split("/")
        number = f".{2 * int(layer.removeprefix('linear_'))}" if model.projector.depth > 1 else ""
        kernel = leaf == "kernel"
        return f"{ORIGINAL.projector}{number}.{'weight' if kernel else 'bias'}", LINEAR if kernel else SAME, 0
    if part == "decoder":
        family, prefix = decoder_family(model), ""
    elif part == "vision":
        family = encoder_family(model)
        prefix = ORIGINAL.tower + family.prefix
    else:
        raise ValueError(f"parameter {path} has no name in the layouts of others")
    number = NUMBERED.search(rest)
    pattern = NUMBERED.sub(r"\1_#", rest)
    if pattern not in family.tensors:
        raise ValueError(f"parameter {path} has no name in a {family.title}")
    name, layout = family.tensors[pattern]
    counted = int(number[2]) if number else 0
    name = name.replace("{stage}", str(counted - 1))
    return prefix + name, layout, counted if number and number[1] == "blocks" else 0
