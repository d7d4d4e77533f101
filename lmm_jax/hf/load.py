"""The tensors of models that others trained, read into our parameters: a whole model, or a part of a run.

A folder is read whole or not at all: whatever is missing, unexpected or of another shape is listed, and nothing is
loaded. What was read, what was not and why is a table.
"""

import collections
import dataclasses
import math
import re
from concurrent import futures

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from lmm_jax.families import ORIGINAL
from lmm_jax.hf import key_ranges
from lmm_jax.hf.names import (
    LEVELS,
    VOCABULARY,
    block_number,
    decoder_family,
    encoder_family,
    ignored,
    original_name,
    part_of,
    tensors,
)
from lmm_jax.hf.read_config import Keys, LoadError, check_window, find_whole, tied, tower_folder
from lmm_jax.hf.rope import read_axes, read_rope, rope_keys
from lmm_jax.hf.safetensors import DTYPES, Folder

HEAD = "decoder/head/kernel"
PARTS = {
    "vision": ("vision",),
    "language": ("decoder",),
    "projector": ("projector", LEVELS, "image_newline", "density_router"),
}
READERS = 4  # threads that read and transpose layers


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one tensor of a folder, or of one parameter of ours that no tensor gives.

    Attributes:
      name: theirs as stored, or our path.
      shape: theirs, or ours.
      fate: "loaded", "initialised" or "ignored".
      why: of what is not loaded as it is.
    """

    name: str
    shape: tuple[int, ...]
    fate: str
    why: str = ""


def load_params(folder, model, abstract, vision=None, allow_pickle=False):
    """Reads a model's parameters, tensor by tensor, each to the devices that hold it.

    Args:
      folder: of the model.
      model: `config.model` as `read_config.read_model_config` reads it.
      abstract: our parameters as `ShapeDtypeStruct`s with shardings.
      vision: folder of the vision tower, where it lies apart.
      allow_pickle: see `safetensors.Folder`.

    Returns:
      the parameters, and the table: a list of `Entry`.

    Raises:
      LoadError: every tensor that is missing, unexpected or of another shape.
    """
    folder = epath.Path(folder)
    keys = Keys(folder / "config.json")
    found = _Tensors([Folder(folder, allow_pickle)])
    tower = tower_folder(folder, keys, vision)
    if tower is not None and not any(name.startswith(ORIGINAL.tower) for name in found.shapes):
        found = _Tensors([Folder(folder, allow_pickle), Folder(tower, allow_pickle)])
    flat = flatten_dict(abstract, sep="/")
    matched = _match(folder, found, model, flat, flat, tied(keys))
    _check_head(folder, found, model)
    return unflatten_dict(_read(folder, found, matched, flat), sep="/"), matched.table


def load_part(folder, part, model, abstract, fresh=(), allow_pickle=False):
    """Reads one part of a run from a model's folder, or from one that holds this part alone.

    Args:
      folder: for "vision" a CLIP, its vision side or a ConvNeXt (of transformers, timm or open_clip); for "language"
        a LLaMA; for any part a LLaVA in a layout that `load_params` reads.
      part: "vision", "language" or "projector".
      model: `config.model` of the run.
      abstract: its parameters, as for `load_params`.
      fresh: path prefixes of our parameters that keep the values they start with.
      allow_pickle: see `safetensors.Folder`.

    Returns:
      flat parameters by path, those of the part but the fresh ones, and the table: a list of `Entry`.

    Raises:
      LoadError: tensors as in `load_params`, or nothing of this part is there.
    """
    found, matched, wanted = _match_part(folder, part, model, abstract, fresh, allow_pickle)
    return _read(epath.Path(folder), found, matched, wanted), matched.table


def part_reader(folder, part, model, abstract, fresh=(), allow_pickle=False):
    """A function from the path of a parameter to what `load_part`, of the same arguments, would read of it alone."""
    found, matched, wanted = _match_part(folder, part, model, abstract, fresh, allow_pickle)
    return lambda path: _array(found, matched.tensors[path], wanted[path])


def match_part(folder, part, model, abstract, fresh=(), allow_pickle=False):
    """Raises what `load_part` would, of the same arguments; only names and shapes are read."""
    _match_part(folder, part, model, abstract, fresh, allow_pickle)


def _match_part(folder, part, model, abstract, fresh, allow_pickle):
    flat = {path: x for path, x in flatten_dict(abstract, sep="/").items() if path.startswith(PARTS[part])}
    wanted = {path: x for path, x in flat.items() if not _under(path, fresh)}
    folder = epath.Path(folder)
    path = folder / "config.json"
    shared = path.exists() and tied(Keys(path))
    found = _Tensors([Folder(folder, allow_pickle)])
    return found, _match(folder, found, model, flat, wanted, shared, part), wanted


TOLD_APART = ("heads", "norm_eps", "rope_theta")  # fields of a decoder that `config.json` says and tensors do not


def check_part(folder, part, model, length=0):
    """Raises LoadError if a part's `config.json`, where there is one, says other than the run.

    Args:
      folder: of the part.
      part: see `load_part`.
      model: `config.model` of the run.
      length: its `data.length`, which no window of a language model may be shorter than.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists() or part == "projector":
        return
    if part == "vision":
        family, ours, inner = encoder_family(model), model.vision, "vision_config"
        told_apart = family.told_apart
    else:
        family, ours, inner, told_apart = decoder_family(model), model.decoder, "text_config", TOLD_APART
    if not told_apart:
        return
    keys, divides = Keys(path), True
    if inner in keys.content:
        divides = getattr(find_whole(keys), "divides_logits", True)
        keys = keys.inner(inner)
    elif part == "vision" and ORIGINAL.told_by in keys.content:
        return  # the tower's own config lies elsewhere
    keys.hold(key_ranges.of_encoder(family) if part == "vision" else key_ranges.of_decoder(family))
    for key, allowed in family.constants.items():
        keys.require(key, *allowed)
    if part == "language":
        check_window(keys, family, length)
    said = keys.content | ({} if part == "vision" else rope_keys(keys).content)  # rotary positions lie apart
    named = [(name, family.keys[name], ours[name]) for name in told_apart]
    for name, key in family.keys.items():
        if isinstance(key, tuple):
            read = key if divides or name != "multipliers" else key[:-1]  # the last one divides logits
            named += [(one, one, value) for one, value in zip(read, ours[name] or (1.0,) * len(key), strict=False)]
    wrong = [
        f"{name} is {said[key]} there, {value} here"
        for name, key, value in named
        if key in said and not _agree(said[key], value)
    ]
    if part == "language" and read_rope(keys, family) != tuple(ours.rope_scaling):
        wrong.append(f"rope_scaling is {read_rope(keys, family)} there, {tuple(ours.rope_scaling)} here")
    if part == "language" and read_axes(keys, family) != tuple(ours.rope_axes):
        wrong.append(f"rope_axes is {read_axes(keys, family)} there, {tuple(ours.rope_axes)} here")
    if wrong:
        raise LoadError(f"{path}: not the {part} part of this run: {'; '.join(wrong)}")


def _agree(theirs, ours):
    return isinstance(theirs, int | float) and math.isclose(theirs, ours, rel_tol=1e-6)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a model's numbers are stored in, and what they are held in here.

    Attributes:
      kinds: numpy's names of the types of its tensors, the most common first.
      tensors: how many there are.
      rows: of its table of embeddings; 0 if it has none.
      held: bfloat16 if all are that; else float32, which alone keeps all of a float16, and the most of a float64.
    """

    kinds: tuple[str, ...]
    tensors: int
    rows: int

    @property
    def held(self):
        return ml_dtypes.bfloat16 if set(self.kinds) == {"bfloat16"} else np.float32


def read_stored(folder, model, allow_pickle=False) -> Stored:
    """What the parameters of a model's folder are stored in; only headers are read.

    Args:
      folder: of the model.
      model: `config.model`, as `read_config.read_model_config` reads it.
      allow_pickle: see `safetensors.Folder`.
    """
    found = Folder(folder, allow_pickle)
    counted = collections.Counter(found.dtypes.values())
    table = decoder_family(model).tensors["table"][0]
    rows = [shape[0] for name, shape in found.shapes.items() if shape and original_name(name) == table]
    return Stored(tuple(kind for kind, _ in counted.most_common()), len(found.shapes), max(rows, default=0))


def report(table) -> str:
    """A table of `Entry`s as text: a line for all tensors whose names differ in numbers alone."""
    lines = {}
    for entry in table:
        key = (entry.fate, re.sub(r"\d+", "#", entry.name), entry.shape, entry.why)
        lines.setdefault(key, []).append([int(n) for n in re.findall(r"\d+", entry.name)])
    out = []
    for (fate, name, shape, why), numbers in lines.items():
        for column in zip(*numbers, strict=True):
            low, high = min(column), max(column)
            name = name.replace("#", str(low) if low == high else f"{{{low}-{high}}}", 1)
        out.append((fate, str(len(numbers)), name, "x".join(map(str, shape)), why))
    widths = [max(map(len, column)) for column in zip(*out, strict=True)]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(row, widths, strict=True)).rstrip() for row in sorted(out))


@dataclasses.dataclass(frozen=True)
class _Matched:
    """Which tensors give the parameters: `(Tensor, name)` pairs by our path, and the table of all."""

    tensors: dict
    table: list[Entry]


def _match(folder, found, model, flat, wanted, shared, part=None) -> _Matched:
    """The tensors for parameters `wanted` among `flat`; `part` says that others' tensors are no fault."""
    vocabulary = model.decoder.vocab_size
    faults, expected, read, table = [], {}, {}, []
    for tensor in tensors(model, {path: x.shape for path, x in flat.items()}):
        expected.setdefault(tensor.name, tensor)
        if tensor.path not in wanted:
            continue
        source = tensor.name
        if shared and tensor.path == HEAD and source not in found.shapes:
            source = decoder_family(model).tensors["table"][0]
        shape, theirs = _unpadded(tensor, vocabulary), found.shapes.get(source)
        if tensor.rows and tensor.rows[0]:  # the first of those that are fused was looked at
            read.setdefault(tensor.path, []).append((tensor, source))
        elif theirs is None:
            faults.append(f"missing {source} {shape}")
        elif not _fits(theirs, shape, padded=tensor.path in VOCABULARY):
            field = f" (model.decoder.vocab_size={vocabulary})" if tensor.path in VOCABULARY else ""
            faults.append(f"{found.stored(source)} is {theirs}, expected {shape}{field}")
        elif found.dtype(source) not in DTYPES.values():
            faults.append(
                f"{found.stored(source)} is {found.dtype(source)}, expected one of {', '.join(DTYPES.values())}"
            )
        else:
            read.setdefault(tensor.path, []).append((tensor, source))
            why = [f"{theirs[0] - shape[0]} rows past the vocabulary left out"] if theirs != shape else []
            kind, held = found.dtype(source), np.dtype(wanted[tensor.path].dtype).name
            why += [f"{kind}, held in {held}"] if kind != held else []
            table.append(Entry(found.stored(source), theirs, "loaded", "; ".join(why)))
    for name in sorted(found.shapes.keys() - {entry[1] for parts in read.values() for entry in parts}):
        tensor, shape = expected.get(name), found.shapes[name]
        if tensor is not None and tensor.path not in wanted:
            table.append(Entry(found.stored(name), shape, "ignored", "starts fresh"))
        elif tensor is None:
            why = _head_too(name, model) or (part and _of_another_part(name, part))
            why = why or ignored(name) or unused(name, model)
            if why:
                table.append(Entry(found.stored(name), shape, "ignored", why))
            else:
                faults.append(f"unexpected {found.stored(name)} {shape}")
    if faults:
        listed = "\n  ".join(faults[:40] + [f"… and {len(faults) - 40} more"] * (len(faults) > 40))
        raise LoadError(f"{folder}: {len(faults)} tensors do not fit, nothing was loaded\n  {listed}")
    table += [Entry(path, x.shape, "initialised", "starts fresh") for path, x in flat.items() if path not in wanted]
    return _Matched(read, table)


def _read(folder, found, matched, wanted):
    """The flat parameters `wanted`, tensor by tensor."""
    params, total = {}, sum(math.prod(x.shape) * x.dtype.itemsize for x in wanted.values())
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"loading {folder.name}", disable=None, leave=False
    ) as bar:
        for path, x in wanted.items():
            params[path] = _array(found, matched.tensors[path], x)
            bar.update(math.prod(x.shape) * x.dtype.itemsize)
    return params


def _array(found, parts, abstract):
    """One parameter of ours, read whole by this process, which gives each of its devices the part that it holds."""
    out = np.empty(abstract.shape, abstract.dtype)  # filled in place: a layer at a time is in memory twice
    stacked = parts[0][0].layer is not None

    def read(tensor, source, out):
        array = tensor.of_ours(found.read(source))
        rows = tensor.shape[0] - array.shape[0] if tensor.path in VOCABULARY else 0
        if rows > 0:
            array = np.pad(array, ((0, rows), (0, 0)))
        tensor.to_ours(array[: tensor.shape[0]], out)

    with futures.ThreadPoolExecutor(READERS) as pool:
        list(pool.map(lambda part, layer: read(*part, layer), parts, out if stacked else [out]))
    return jax.make_array_from_callback(abstract.shape, abstract.sharding, lambda index: out[index])


def _fits(theirs, shape, padded):
    """Whether a tensor can be read as one of a shape: a table that may be `padded` also if it has more rows."""
    more_rows = len(theirs) == len(shape) and theirs[1:] == shape[1:] and theirs > shape
    return theirs == shape or (padded and more_rows)


def _unpadded(tensor, vocabulary):
    """Their shape of a tensor; the tables of ours have more rows than there are pieces."""
    return (vocabulary, *tensor.shape[1:]) if tensor.path in VOCABULARY else tensor.stored_shape


def _head_too(name, model):
    """Why a head is not read beside the table of a model in which both are one, see `_check_head`; or None."""
    return "is the table" if model.decoder.tied and name == _head(model) else None


def _head(model):
    return decoder_family(model).tensors[HEAD.removeprefix("decoder/")][0]


def _check_head(folder, found, model):
    """Raises LoadError if a folder that says that its head is its table stores another one."""
    head = _head(model)
    if not model.decoder.tied or head not in found.shapes:
        return
    table = found.read(decoder_family(model).tensors["table"][0])
    if not np.array_equal(found.read(head), table):
        raise LoadError(
            f"{folder}: {found.stored(head)} differs from the table of embeddings, which config.json says that it is "
            "(tie_word_embeddings = True): set it to false there if the head was trained, or delete the tensor"
        )


def unused(name, model) -> str | None:
    """Why this model in particular does not read a tensor, or None."""
    if name == ORIGINAL.newline and not model.newline:
        return "this recipe has no newline"
    number = block_number(name, model)
    if number is not None:
        level, depth = (model.vision[field] for field in encoder_family(model).level)
        if range(depth + 1)[level] <= number < depth:
            return f"past the hidden state {level} that is read"
    return None


def _under(path, prefixes):
    """Whether a path is one of `prefixes`, or lies beneath one."""
    return any(path == prefix or path.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def _of_another_part(name, part):
    """Why a part of a run does not read a tensor of a whole model, or None."""
    of = part_of(name)
    return of_another_part(of) if of != part else None


def of_another_part(part) -> str:
    """Why a tensor of `part` is ignored where another part is read."""
    return f"of the {part} part"


class _Tensors:
    """The tensors of one or more folders under LLaVA's original names.

    Attributes:
      shapes: name to shape.
    """

    def __init__(self, folders):
        self._home = {}
        for folder in folders:
            for stored in folder.shapes:
                name = original_name(stored)
                if name in self._home:
                    raise LoadError(f"{folder.path}: {stored} and {self._home[name][1]} are both {name}")
                self._home[name] = (folder, stored)
        self.shapes = {name: folder.shapes[stored] for name, (folder, stored) in self._home.items()}

    def stored(self, name):
        return self._home[name][1] if name in self._home else name

    def dtype(self, name):
        folder, stored = self._home[name]
        return folder.dtypes[stored]

    def read(self, name):
        folder, stored = self._home[name]
        return folder.read(stored)
