"""Adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`, read and written.

PEFT names a tensor by the module of transformers that it adapts, `base_model.model.<module>.lora_A.weight` `[r, in]`
and `….lora_B.weight` `[out, r]`. What its config says beside that changes what an adapter computes in a dozen ways;
all but the plain one are refused by key and value.
"""

import collections
import math
import re

import numpy as np
from etils import epath

from lmm_jax import strict_json
from lmm_jax.families.kinds import LINEAR
from lmm_jax.hf import key_ranges
from lmm_jax.hf.load import unused
from lmm_jax.hf.names import original_name, tensors, transformers_name
from lmm_jax.hf.read_config import LoadError, read_json
from lmm_jax.hf.safetensors import DTYPES, Folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
LEAVES = {"A": "lora_a", "B": "lora_b"}  # of ours, see `training.adapters`

# Keys of `adapter_config.json` that do not change what an adapter computes, or that its tensors say better.
OF_NO_EFFECT = {
    *("alpha_pattern", "rank_pattern"),  # refused below where they say anything
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
    *("task_type", "r", "lora_alpha", "use_rslora"),
}
# The values that others may have; a key that stands in neither table must be off.
REQUIRED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # What is drawn at first; other ways change the base too (PiSSA, OLoRA, CorDA, LoftQ).
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
INSTEAD = "merge the adapter into its model by PEFT itself (merge_and_unload), and load that"
OFF = (None, False, {}, [], "", ())


def adapter_fields(folder, model, shapes) -> dict:
    """The fields of `config.lora` of a folder: rank, alpha and paths; its dropout counts in training alone.

    Args:
      folder: as PEFT writes it.
      model: `config.model` of the model that it adapts.
      shapes: shapes of that model's parameters by path, flat and without adapters.

    Raises:
      LoadError: keys or tensors that we do not reproduce, by file, key and value.
    """
    keys = _read_config(epath.Path(folder))
    found = _match(folder, model, shapes)
    rank, alpha = keys["r"], float(keys["lora_alpha"])
    if keys.get("use_rslora"):
        alpha *= math.sqrt(rank)  # there what it gives is scaled by alpha / √r
    return {"rank": rank, "alpha": alpha, "paths": tuple(sorted(found.layers))}


def read_adapter(folder, model, planned) -> dict[str, np.ndarray]:
    """The adapters of a folder, flat by our paths, in float32.

    Args:
      folder: as PEFT writes it.
      model: `config.model` of the run.
      planned: its parameters, flat abstract arrays, with the adapters that `config.lora` makes.

    Raises:
      LoadError: see `adapter_fields`; or adapters of other layers, of another rank or scale than planned.
    """
    folder = epath.Path(folder)
    plain = {path: x.shape for path, x in planned.items() if path.rpartition("/")[2] not in _OURS}
    fields, found = adapter_fields(folder, model, plain), _match(folder, model, plain)
    wanted = [path.rpartition("/")[0] for path in planned if path.endswith("/lora_a")]
    if set(wanted) != set(found.layers):
        more = sorted(set(found.layers) - set(wanted)) or sorted(set(wanted) - set(found.layers))
        where = "there alone" if set(found.layers) - set(wanted) else "in lora.paths alone"
        raise LoadError(
            f"{folder}: it adapts other layers than lora.paths: {', '.join(more[:8])} {where}; it would be "
            f"lora.paths={fields['paths']}"
        )
    out = {}
    for layer, names in found.layers.items():
        for leaf, ours in LEAVES.items():
            x = planned[f"{layer}/{ours}"]
            if x.shape[-1 if leaf == "A" else names.stacked] != fields["rank"]:
                raise LoadError(f"{folder / CONFIG}: r = {fields['rank']}, and config field lora.rank is another")
            each = [found.folder.read(name).astype(np.float32).T for name in names.of[leaf]]
            out[f"{layer}/{ours}"] = np.stack(each).reshape(x.shape)
        scale = planned[f"{layer}/lora_scale"]
        out[f"{layer}/lora_scale"] = np.full(scale.shape, fields["alpha"] / fields["rank"], np.float32)
    return out


_OURS = ("lora_a", "lora_b", "lora_scale")


def _read_config(folder) -> dict:
    """The content of a folder's `adapter_config.json`, checked."""
    path = folder / CONFIG
    if not path.exists():
        raise LoadError(f"{folder} is no folder of adapters as PEFT writes it: it has no {CONFIG}")
    keys = read_json(path)
    if fault := strict_json.fault(keys, key_ranges.ADAPTER):
        raise LoadError(f"{path}: {fault}")
    for key, value in keys.items():
        if key in REQUIRED and value not in REQUIRED[key]:
            words = ", ".join(map(repr, REQUIRED[key]))
            raise LoadError(f"{path}: {key} = {value!r} is not supported, {words} is; {INSTEAD}")
        computes = key in ("alpha_pattern", "rank_pattern") or key not in {*REQUIRED, *OF_NO_EFFECT}
        if computes and value not in OFF:
            raise LoadError(f"{path}: {key} = {value!r} is not supported; {INSTEAD}")
    for key in ("r", "lora_alpha"):
        if keys.get(key) is None:
            raise LoadError(f"{path} has no '{key}'; {key_ranges.ADAPTER[key]} is expected")
    return keys


class _Names:
    """Stored names of an adapter's tensors, one a layer.

    Attributes:
      of: "A" and "B" to names in the order of layers.
      stacked: axes of layers that our parameters have, 0 or 1.
    """

    def __init__(self, count, stacked):
        self.of, self.stacked = {leaf: [None] * count for leaf in LEAVES}, stacked


class _Match:
    """The tensors of a folder beside our layers.

    Attributes:
      folder: `safetensors.Folder`.
      layers: `_Names` by path of a layer.
    """

    def __init__(self, folder):
        self.folder, self.layers = folder, {}


def _match(folder, model, shapes):
    folder = epath.Path(folder)
    if not (folder / WEIGHTS).exists():
        raise LoadError(f"{folder} holds no {WEIGHTS}; save the adapter in safetensors")
    found, rank = _Match(Folder(folder)), _read_config(folder)["r"]
    all_tensors = tensors(model, {path: shape for path, shape in shapes.items() if not path.startswith("router/")})
    count = collections.Counter(tensor.name for tensor in all_tensors)
    known = {tensor.name: tensor for tensor in all_tensors}
    for name, shape in found.folder.shapes.items():
        parts = NAME.fullmatch(name)
        if not parts:
            raise LoadError(
                f"{folder / WEIGHTS}: tensor {name} is no part of a plain adapter of a linear layer, which is called "
                f"{PREFIX}….lora_A.weight or ….lora_B.weight; {INSTEAD}"
            )
        original = original_name(f"{parts[1]}.weight")
        tensor = known.get(original)
        if tensor is None and unused(original, model):
            continue
        if tensor is None:
            raise LoadError(f"{folder / WEIGHTS}: tensor {name} adapts no layer of this model")
        if tensor.order != LINEAR.order or count[original] > 1 or not tensor.path.endswith("/kernel"):
            raise LoadError(
                f"{folder / WEIGHTS}: tensor {name} adapts what is no linear layer of its own here; {INSTEAD}"
            )
        want = (rank, tensor.shape[1]) if parts[2] == "A" else (tensor.shape[0], rank)
        if shape != want or found.folder.dtypes[name] not in DTYPES.values():
            raise LoadError(
                f"{folder / WEIGHTS}: tensor {name} is {found.folder.dtypes[name]} {shape}, expected {want} for "
                f"r = {rank}"
            )
        layer, stacked = tensor.path.removesuffix("/kernel"), tensor.layer is not None
        layers = shapes[tensor.path][0] if stacked else 1
        names = found.layers.setdefault(layer, _Names(layers, int(stacked)))
        names.of[parts[2]][tensor.layer or 0] = name
    for layer, names in found.layers.items():
        for leaf, of_layers in names.of.items():
            missing = [n for n, name in enumerate(of_layers) if name is None]
            if missing:
                raise LoadError(
                    f"{folder / WEIGHTS}: {layer} has no lora_{leaf} for layers {missing[:8]} of "
                    f"{len(of_layers)}; all layers of a scan have an adapter here, or none"
                )
    if not found.layers:
        raise LoadError(f"{folder / WEIGHTS} holds no adapter")
    return found


def modules(model, whole, shapes, layers) -> list[tuple[str, str, int | None, tuple[int, int]]]:
    """The modules of transformers that adapters of our layers lie on.

    Args:
      model: `config.model`.
      whole: the family of the whole model, `families.kinds.Whole`.
      shapes: our shapes by path, flat, without adapters.
      layers: our layers that have an adapter.

    Returns:
      (name of a module, path of our layer, number in its scan or None, (outputs, inputs)), in the order of `layers`.

    Raises:
      ValueError: a layer that is no linear layer of its own there.
    """
    out, chosen = [], {f"{layer}/kernel": shapes[f"{layer}/kernel"] for layer in layers}
    everything = tensors(model, {path: shape for path, shape in shapes.items() if not path.startswith("router/")})
    count = collections.Counter(tensor.name for tensor in everything)
    for tensor in tensors(model, chosen):
        layer = tensor.path.removesuffix("/kernel")
        if tensor.order != LINEAR.order or count[tensor.name] > 1:
            raise ValueError(
                f"lora.paths: {layer} is no linear layer of its own in {whole.architecture}, so that PEFT has no "
                "adapter for it; export it merged, without --adapter"
            )
        stored = transformers_name(tensor.name, whole)
        prefix = next(((old, new) for old, new in whole.modules if stored.startswith(old)), ("", ""))
        name = prefix[1] + stored.removeprefix(prefix[0])
        out.append((name.removesuffix(".weight"), layer, tensor.layer, tensor.shape))
    return out


def config_keys(lora, alpha, names, base) -> dict:
    """The content of `adapter_config.json`.

    Args:
      lora: `config.lora`.
      alpha: what it scales by alpha / rank.
      names: of the modules that are adapted.
      base: name or folder of the model that is adapted; None if it is not known.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(names),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def tensor_name(module, leaf) -> str:
    """Name of the tensor "A" or "B" of a module's adapter."""
    return f"{PREFIX}{module}.lora_{leaf}.weight"
