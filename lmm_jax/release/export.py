"""A trained model as a folder that others load: transformers' layout, or LLaVA's original one.

A folder appears under its name only when it is whole. What it says of the model is read back and compared with the
model before any weight is written, so that nothing is exported that would load as something else.
"""

import collections
import json
import pathlib
import shutil
import sys
from concurrent import futures

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from lmm_jax import config as c
from lmm_jax import hf, sharding
from lmm_jax.config import flatten, read_config
from lmm_jax.data.conversation import check_template
from lmm_jax.data.prepared import trained_data_set
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.families import ORIGINAL
from lmm_jax.hf import safetensors, write_config
from lmm_jax.hf.names import VOCABULARY, encoder_family, tensors, transformers_name
from lmm_jax.hf.processor import write_processor
from lmm_jax.hf.read_config import TASK_KEY, read_model_config
from lmm_jax.hf.tokenizer_json import added_ids
from lmm_jax.release.adapter import export_adapter
from lmm_jax.release.card import model_card
from lmm_jax.training import adapters
from lmm_jax.training.base import stream_params
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.saved import check_holds_step
from lmm_jax.training.state import abstract_params, make_program

LAYOUTS = ("hf", ORIGINAL.name)
CODE = pathlib.Path(hf.__file__).parent  # in it, a folder for each family whose code an export ships
AHEAD = 2  # tensors that are transposed while one is written


def export(workdir, folder, layout="hf", verify=False, adapter=False) -> dict:
    """Writes the newest sound checkpoint of a workdir as a folder that others load.

    A run's adapters are merged into their kernels, in float32, unless they alone are asked for. Parameters are read
    and written one after the other, so that memory holds little more than the largest. A router is left out, and a
    line says so: nobody else's layout has a place for one.

    Args:
      workdir: of `lmm train`, on whatever mesh.
      folder: to write; it must not exist.
      layout: "hf" for transformers: llava (LLaVA-1.5, M3), llava_next, fast_vlm (ConvLLaVA) or, for DeepStack, code
        that the folder ships; "llava" for LLaVA's original layout, see `families.ORIGINAL`.
      verify: whether to run the folder in transformers beside our model, see `hf.verify`; needs the extra 'hf'.
      adapter: writes the adapters alone, as PEFT loads them, see `release.adapter`.

    Returns:
      {"files": names, "max_logit_difference": float, or None if not verified}.

    Raises:
      FileNotFoundError, FileExistsError: no workdir, or a folder that is there.
      ValueError: a model that the layout cannot hold, naming the field; or no sound checkpoint.
    """
    workdir, folder = epath.Path(workdir), epath.Path(folder)
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} is no workdir of `lmm train` (no config.json)")
    if layout not in LAYOUTS:
        raise ValueError(f"layout '{layout}' does not exist; choose from {', '.join(LAYOUTS)}")
    if adapter and (verify or layout != "hf"):
        raise ValueError("adapters alone are written for PEFT, in layout 'hf', and are not verified: leave these out")
    if adapter:
        return {"files": export_adapter(workdir, folder), "max_logit_difference": None}
    if verify and layout != "hf":
        raise ValueError("transformers loads layout 'hf' alone: export it to verify")
    if verify:
        from lmm_jax.release import verify as verifying

        verifying.require()
        verifying.require_processor(write_config.architecture(read_config(workdir / "config.json")))
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; move it away, or name another folder")
    trained, tokenizer = read_config(workdir / "config.json"), load_tokenizer(workdir)
    config = adapters.plain_config(trained)
    check_template(tokenizer, config.data.template)
    check_holds_step(workdir)
    whole = write_config.architecture(config) if layout == "hf" else None
    if config.model.router.width:
        print(f"the router of {workdir} is left out: no layout of others has a place for it", file=sys.stderr)
    task = trained_data_set(config.data)
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():  # of an export that was killed
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        _describe(partial, config, tokenizer, whole, task)
        _check_read_back(partial, config)
        _write_weights(partial, workdir, trained, tokenizer, whole)
        (partial / "README.md").write_text(model_card(workdir, config, whole, task, tokenizer))
        partial.rename(folder)
    except BaseException:
        partial.rmtree()
        raise
    difference = verifying.verify(workdir, folder) if verify else None
    return {"files": sorted(path.name for path in folder.iterdir()), "max_logit_difference": difference}


def _describe(folder, config, tokenizer, whole, task):
    """Writes everything but weights."""
    if whole is None:
        keys, tower = write_config.original_keys(config)
        tokenizer.save(folder)
        if tower is not None:
            (folder / "vision_tower").mkdir()
            _write_json(folder / "vision_tower" / "config.json", tower)
            _write_json(folder / "vision_tower" / "preprocessor_config.json", write_config.picture_keys(config))
    else:
        keys = write_config.transformers_keys(config, tokenizer, whole)
        write_processor(folder, config, tokenizer, whole)
        for name in whole.code:
            shutil.copyfile(CODE / whole.name / name, folder / name)
    _write_json(folder / "config.json", keys | ({TASK_KEY: task} if task else {}))


def _check_read_back(folder, config):
    """Raises ValueError for fields that would be others when the folder is loaded."""
    found = read_model_config(folder)
    blocks, level = write_config.blocks_built(config), encoder_family(config.model).level

    def matters(config):
        fields = flatten(config)
        if level:  # the same blocks may be said in two ways: those past the state that is read are not there
            fields |= {f"model.vision.{level[0]}": -1, f"model.vision.{level[1]}": blocks}
        unread = () if config.data.aspect == "native" else PIXELS
        kept = {name: x for name, x in fields.items() if name.startswith(OF_MODEL) and name not in unread}
        kept = {name: x for name, x in kept.items() if name not in OF_TRAINING}
        return {name: x for name, x in kept.items() if not name.startswith(ROUTER_FIELDS)}

    ours, theirs = matters(config), matters(found)
    wrong = [
        f"{name}={ours[name]!r} would be {theirs.get(name)!r}" for name in ours if ours[name] != theirs.get(name)
    ]
    if wrong:
        raise ValueError(f"this layout cannot hold the model: read back, {', '.join(wrong)}")


PIXELS = tuple(f"data.{name}" for name in c.PIXELS)  # of pictures at their native size alone
OF_MODEL = ("model.", "data.length", *(f"data.{name}" for name in c.OF_MODEL if name not in c.CANVAS))
ROUTER, ROUTER_FIELDS = "router", "model.router."  # which no layout has a place for, so that it is left out
OF_TRAINING = {"model.vision.remat", "model.decoder.remat", "model.decoder.vocab_size"}


def _write_weights(folder, workdir, trained, tokenizer, whole):
    """Streams the newest sound checkpoint of a run of config `trained` into safetensors files, with a bar."""
    config = adapters.plain_config(trained)
    program = make_program(config, sharding.make_mesh({"fsdp": -1}))
    params = {part: x for part, x in abstract_params(program, config.model.dtype).items() if part != ROUTER}
    abstract = flatten_dict(params, sep="/")
    parts = tensors(config.model, {path: x.shape for path, x in abstract.items()})
    pieces = config.model.decoder.vocab_size
    rows = pieces if whole is None else added_ids(tokenizer, pieces, whole.image_piece)[2]
    shapes, by_path = {}, {}
    for part in parts:
        name = part.name if whole is None else transformers_name(part.name, whole)
        shapes.pop(name, None)  # one that is fused of several comes when the last of them has been read
        shapes[name] = (rows, *part.shape[1:]) if part.path in VOCABULARY else part.stored_shape
        by_path.setdefault(part.path, []).append((name, part))
    norm = _unread_norm(config.model, whole)
    shapes |= {name: array.shape for name, array in norm.items()}
    dtype, checkpoints = np.dtype(config.model.dtype), Checkpoints(workdir)

    def theirs(name, part, array):
        one = part.to_theirs(array if part.layer is None else array[part.layer])
        one = one if part.path not in VOCABULARY or shapes[name] == part.shape else _with_rows(one, pieces, rows)
        return name, part.rows, one.astype(dtype, copy=False)

    def arrays(step):
        fused = {}  # what came of tensors that are fused of several of ours
        with futures.ThreadPoolExecutor(AHEAD) as pool:
            wanted = unflatten_dict(abstract, sep="/")
            for path, array in stream_params(checkpoints, step, wanted, trained, workdir):
                for name, at, one in _ahead(pool, theirs, [(name, part, array) for name, part in by_path[path]]):
                    bar.update(one.nbytes)
                    if at is None:
                        yield name, one
                        continue
                    whole = fused.setdefault(name, {})
                    whole[at[0]] = one
                    if sum(map(len, whole.values())) == at[1]:
                        yield name, np.concatenate([x for _, x in sorted(fused.pop(name).items())])
                del array
        yield from ((name, array.astype(dtype)) for name, array in norm.items())

    total = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
    damaged = []
    for step in checkpoints.steps():
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"exporting step {step}", disable=None) as bar:
            try:
                return safetensors.write(folder, shapes, dtype.name, arrays(step))
            except ValueError as error:
                damaged.append(str(error))
    raise ValueError(
        "\n".join(dict.fromkeys(damaged)) or f"{workdir} holds no checkpoint; was `lmm train` run there?"
    )


def _ahead(pool, run, jobs):
    """Results of `run(*job)` in the order of `jobs`, a few being made ahead of the one that is used."""
    running = collections.deque(pool.submit(run, *job) for job in jobs[:AHEAD])
    for n in range(len(jobs)):
        result = running.popleft().result()
        if n + AHEAD < len(jobs):
            running.append(pool.submit(run, *jobs[n + AHEAD]))
        yield result


def _with_rows(table, pieces, rows):
    """A table `[n, D]` cut to its pieces, then up to `rows` their mean, which greedy decoding never takes."""
    mean = table[:pieces].astype(np.float32).mean(axis=0, keepdims=True).astype(table.dtype)
    return np.concatenate([table[:pieces], *[mean] * (rows - pieces)])


def _unread_norm(model, whole):
    """The norm behind the tower's last block, which transformers builds and nothing reads."""
    family = encoder_family(model)
    if whole is None or not family.unread_norm:
        return {}
    name, field = family.unread_norm
    width = model.vision[field]
    width = width if isinstance(width, int) else width[-1]
    name = transformers_name(ORIGINAL.tower + family.prefix + name, whole)
    return {name + "weight": np.ones(width, np.float32), name + "bias": np.zeros(width, np.float32)}


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=1) + "\n")
