"""An export run in transformers beside our model: the same ids, pixels, logits and answers. Needs the extra 'hf'."""

import functools
import importlib.util

import jax
import numpy as np
from PIL import Image

from lmm_jax.config import visual_layout
from lmm_jax.generation.model import Model, load
from lmm_jax.hf.names import projector_family
from lmm_jax.hf.read_config import pixel_patches
from lmm_jax.hf.tokenizer_json import added_ids
from lmm_jax.hf.write_config import architecture, own_scales
from lmm_jax.training.state import make_program

LOGITS = 1e-4  # in float32, of logits of about 1
PROMPTS = ("What is it?", "Read the text in the picture.")
SHAPES = ((96, 64), (50, 120))  # of the pictures (width, height)
NEW_TOKENS = 16
LENGTH = 16384  # positions that the comparison may take, whatever was trained


def require():
    """torch and transformers; ImportError says how to install what is missing."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"verifying needs {error.name}: pip install 'lmm_jax[hf]'") from error
    return torch, transformers


def require_processor(whole):
    """ImportError if a package is not installed that transformers' processor of a family of whole models asks for."""
    missing = [name for name in whole.processor_needs if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"verifying needs {' and '.join(missing)}, which {whole.processor} of transformers asks for: "
            f"pip install {' '.join(missing)}; without --verify the folder is the same"
        )


def verify(workdir, folder, note=print) -> float:
    """Compares a workdir with the folder exported from it, on drawn pictures, in float32.

    Args:
      workdir: of `lmm train`.
      folder: as `hf.export.export` wrote it.
      note: called with a line a prompt.

    Returns:
      the largest difference of logits, as it is. Those of more than 1 may differ in proportion to the largest.

    Raises:
      ImportError: torch or transformers is not installed.
      ValueError: what differs: tensors missing or unexpected, ids, pixels, logits or tokens.
    """
    torch, transformers = require()
    ours = _in_float32(load(workdir))
    whole = architecture(ours.program.config)
    remote = {"trust_remote_code": True} if whole.code else {}
    theirs, info = transformers.AutoModelForImageTextToText.from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True, **remote
    )
    wrong = {name: sorted(found) for name, found in info.items() if found}
    if wrong:
        raise ValueError(f"{folder}: transformers reports {wrong}")
    processor = _processor(transformers, str(folder), **remote)
    image = added_ids(ours.tokenizer, placeholder=whole.image_piece)[0]
    routes = [(scale, words, _logits_of(ours, scale)) for scale, words in _routes(ours.program.config.model)]
    worst, rng = 0.0, np.random.default_rng(0)
    for question, (width, height) in zip(PROMPTS, SHAPES, strict=True):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        for scale, words, our_logits in routes:
            inputs = processor(images=[picture], text=prompt, return_tensors="pt", **words)
            batch = ours.batch([picture], question, scale)
            length = int((batch["segment"] > 0).sum())
            _same_ids(inputs["input_ids"][0].numpy(), batch, length, image)
            _same_pixels(inputs["pixel_values"].numpy(), batch["pixels"], picture, ours, whole)
            with torch.no_grad():
                said = theirs(**inputs)
            logits = said.logits[0, :, : ours.tokenizer.vocab_size].numpy()
            want = our_logits(batch)[:length, : ours.tokenizer.vocab_size]
            difference, largest = float(np.abs(logits - want).max()), float(np.abs(want).max())
            if not difference <= LOGITS * max(1.0, largest):
                raise ValueError(f"{folder}: logits differ by {difference:.2g} for '{question}'")
            _same_route(getattr(said, "router_logits", None), ours.expect([picture], question), folder)
            (answer,) = ours.generate_ids([[picture]], [question], scale, NEW_TOKENS)
            new = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :].tolist()
            new = new[: new.index(ours.stop)] if ours.stop in new else new
            if new != answer:
                raise ValueError(f"{folder}: '{question}' is answered {new}, ours is {answer}")
            close = f"logits of up to {largest:.1f} within {difference:.1e}"
            note(f"{question}: {length} ids, {close}, {len(answer)} tokens alike")
            worst = max(worst, difference)
    return worst


def _processor(transformers, folder, **remote):
    """A folder's processor, with pictures resized by Pillow, which those that take films too do not offer whole."""
    try:
        return transformers.AutoProcessor.from_pretrained(folder, backend="pil", **remote)
    except ImportError:
        processor = transformers.AutoProcessor.from_pretrained(folder, **remote)
        processor.image_processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **remote)
        return processor


def _routes(model):
    """`(scale, what the processor is asked for it)` of each path of the projector: transformers' own scales."""
    scales = own_scales(model)
    if len(scales) == 1:
        return [(scales[0], {})]
    word = projector_family(model).finer_word
    return [(scale, {word: scale == max(scales)}) for scale in scales]


def _in_float32(model):
    config = model.program.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.dtype = "float32"
        config.data.length = max(config.data.length, LENGTH)
    program = make_program(config, model.program.mesh)
    return Model(program, jax.tree.map(lambda x: x.astype(np.float32), model.params), model.tokenizer)


def _logits_of(model, scale=None):
    """The function from a batch of one row to its logits `[T, vocabulary]` at a scale, the largest if None."""
    scale = max(model.scales) if scale is None else scale

    def logits(lmm, batch):
        return lmm.logits(lmm(batch, (scale,)))

    run = jax.jit(functools.partial(model.program.model.apply, method=logits))

    def at(batch):
        with model.program.use(), jax.default_matmul_precision("highest"):
            return np.asarray(run({"params": model.params}, batch))[0, 0]

    return at


def _same_ids(found, batch, length, image):
    """Text ids at their places; where ours has a picture's slot, theirs has the placeholder."""
    ids, slot = batch["id"].reshape(-1)[:length], batch["slot"].reshape(-1)[:length]
    ids = np.where(slot >= 0, image, ids)
    if found.tolist() != ids.tolist():
        raise ValueError(f"the processor's ids {found.tolist()} differ from ours {ids.tolist()}")


def _same_pixels(found, pixels, picture, ours, whole):
    """Views in the order of the sequence, normalised."""
    vision, visual = ours.program.model.vision, visual_layout(ours.program.config)
    views = np.asarray(pixels[0], np.float32)[visual.views_in_sequence(visual.tiling(*picture.size))]
    want = np.moveaxis((views / 255 - vision.mean) / vision.std, -1, -3)
    if whole.pixels:
        want = patches_of(want[0], ours.program.config.model)
    found = found.reshape(-1, *want.shape[1:])
    if found.shape != want.shape or np.abs(found - want).max() > 1e-5:
        raise ValueError(f"the processor's pixels {found.shape} differ from ours {want.shape}")


def patches_of(view, model):
    """A view `[3, H, W]` as `[n, 3 · frames · p · p]`: patches that become one token stand together, frames alike."""
    p, frames, k = (pixel_patches(model)[key] for key in ("patch_size", "temporal_patch_size", "merge_size"))
    channels, height, width = view.shape
    cells = view.reshape(channels, height // (k * p), k, p, width // (k * p), k, p)
    cells = cells.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]  # [rows, columns, k, k, channels, 1, p, p]
    return np.repeat(cells, frames, axis=5).reshape(-1, channels * frames * p * p)


def _same_route(logits, expected, folder):
    """How likely the pictures need the largest scale, where transformers' class has a router too."""
    if logits is None:
        return
    found = 1 / (1 + np.exp(-logits.numpy()))
    if np.abs(found - expected[-1]).max() > LOGITS:
        raise ValueError(f"{folder}: its router says {found.tolist()}, ours {expected[-1]}")
