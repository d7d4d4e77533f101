"""The model card of an export: what was trained on what, how well it does at which budget, how to load it."""

import json

from lmm_jax import storage
from lmm_jax.families import ORIGINAL
from lmm_jax.hf.names import decoder_family, encoder_family, projector_family
from lmm_jax.hf.processor import begin_note
from lmm_jax.hf.write_config import own_scales
from lmm_jax.release.runs import exports_of, pools, runs_table

CARD = """\
---
library_name: {library}
pipeline_tag: image-text-to-text
tags: [{tags}]
---

# {name}

{what}

## Load

{load}

{begin}

## Where it runs

{runs}

## Recipe

{recipe}

## Data

{data}

## Results

{results}
"""

LOAD = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.image_utils import load_image

model = AutoModelForImageTextToText.from_pretrained("FOLDER"{remote})
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil"{remote})
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
picture = load_image("picture.png")
inputs = processor(images=[picture], text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

This needs transformers {least} or newer. The code that this folder ships is run only with `trust_remote_code=True`.
In JAX: `lmm_jax.load("FOLDER")`.

`load_image` turns a picture upright as its EXIF header says, which `PIL.Image.open` alone does not do. Of grey
pictures of 16 bits it cuts all levels at 255, and it drops an alpha channel; lmm_jax, with which this model was
trained, takes the high byte of 16 bits and composites transparency on white. Convert such pictures before you hand
them over."""

RUNS = """\
{table}

"run": the program was run on tiny models of this kind and answered as lmm_jax does; "read": its code or documentation
says that it runs, and nobody tried; "no": it does not."""

BUDGETS = """

Fewer visual tokens a picture, {scales} of {most}, with stock calls of transformers {least_budget} or newer: pool the
features and tell the processor.

```python
scale = {example}
processor.patch_size = int({size} / scale**0.5)  # so many placeholders; back to {patch} for {most}
inputs = processor(images=[picture], text=prompt, return_tensors="pt")
pixels = inputs.pop("pixel_values")
features = model.model.get_image_features(pixels, return_dict=True)
grids = features.pooler_output[0].T.reshape(1, -1, {side}, {side})
window = int({side} / scale**0.5)
features.pooler_output = [torch.nn.functional.avg_pool2d(grids, window).flatten(2)[0].T]
answer = model.generate(**inputs, mm_encoder_outputs={{"image": features}}, max_new_tokens=64)
```"""

ROUTES = """

The processor gives a view {coarse} visual tokens, and {fine} where it is asked to: `processor(…, {word}=True)`."""

ROUTER = """
`model.model.predict_fine_route(inputs["pixel_values"], inputs["pixel_attention_mask"])` says whether pictures need
these, as `scale="auto"` does in lmm_jax."""

NESTED = """

Other numbers of visual tokens a view, {scales}, are for lmm_jax alone: transformers' class has no place for them."""


def model_card(workdir, config, whole, task, tokenizer) -> str:
    """Text of README.md.

    Args:
      workdir: what it holds of metrics and evaluations is quoted.
      config: of the run.
      whole: the family that the folder is of, see `hf.write_config.architecture`; None for the original layout.
      task: name of the task that the data belong to, see `evaluation.tasks`; "" if it is not known.
      tokenizer: the `Tokenizer` of the run.
    """
    model, vision = config.model, config.model.vision
    remote = ", trust_remote_code=True" if whole is not None and whole.code else ""
    exports = exports_of(whole, model.scales)
    load = LOAD.format(remote=remote, least=exports[0].least)
    if whole is None:
        load = f'In {ORIGINAL.title}\'s original layout, for code that reads it. In JAX: `lmm_jax.load("FOLDER")`.'
    elif not remote:
        load = load.replace(" The code that this folder ships is run only with `trust_remote_code=True`.", "")
    scales = sorted(model.scales)
    if whole is not None and (whole.projector or whole.shrink_key):
        load += _routes(model, own_scales(model))
    if pools(whole, scales):
        side = int(scales[-1] ** 0.5)
        load += BUDGETS.format(
            scales=", ".join(map(str, scales[:-1])),
            most=scales[-1],
            example=scales[-2],
            size=vision.image_size,
            patch=vision.image_size // side,
            side=side,
            least_budget=exports[-1].least,
        )
    encoder, decoder = encoder_family(model).title, decoder_family(model).title
    what = (
        f"A large multimodal model: {encoder} of {vision.image_size} pixels a side, {', '.join(map(str, scales))} "
        f"visual tokens a view, a {decoder} decoder of {model.decoder.depth} layers and width {model.decoder.width}. "
        "Trained and exported by lmm_jax."
    )
    if model.router.width:
        what += " The run has a router, which chooses a number of visual tokens by itself; this folder leaves it out."
    return CARD.format(
        library="transformers" if whole else ORIGINAL.name,
        tags=", ".join(["lmm_jax", whole.name if whole else ORIGINAL.name]),
        name=workdir.name,
        what=what,
        load=load,
        runs=RUNS.format(table=runs_table(exports)),
        begin=begin_note(tokenizer),
        recipe=_recipe(config),
        data=_data(config, task),
        results=_results(workdir),
    )


def _routes(model, own):
    """What a family that has several paths from features to tokens gives by stock calls, and what it does not."""
    text, nested = "", sorted(set(model.scales) - set(own))
    if len(own) > 1:
        text += ROUTES.format(coarse=min(own), fine=max(own), word=projector_family(model).finer_word)
        text += ROUTER if model.density_router.width else ""
    return text + (NESTED.format(scales=", ".join(map(str, nested))) if nested else "")


def _recipe(config):
    optimizer, train, data = config.optimizer, config.train, config.data
    rates = (optimizer.learning_rate, optimizer.warmup, optimizer.weight_decay)
    layers = tuple(config.model.decoder.inject_layers)
    rows = {
        "steps, packs a step": f"{train.steps}, {train.batch_size}",
        "learning rate, warm-up, decay": ", ".join(f"{rate:g}" for rate in rates),
        "rates by part": ", ".join(f"{part} {rate:g}" for part, rate in optimizer.groups) or "the same",
        "pictures": f"aspect {data.aspect}, tilings {tuple(data.tilings) or 'none'}",
        "sequence": data.sequence,
        "stacks": (data.stacks or ("levels of the encoder" if layers else "none"))
        + (f" before layers {layers}" if layers else ""),
        "template, positions": f"{data.template}, {data.length}",
        "started from": config.init["from"] or "new parameters",
        "seed": config.seed,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _data(config, task):
    data = config.data
    folders = [(data.path, 1.0)] if data.path else list(data.mixture)
    lines = [f"- `{folder}`, weight {weight:g}" for folder, weight in folders] or ["Not stored with the run."]
    asked = f"`lmm evaluate --model FOLDER --data DIR` asks the questions of the task `{task}`."
    return "\n".join([*lines, *(["", asked] if task else [])])


def _results(workdir):
    """The last training loss, and accuracy by token budget where the run was evaluated."""
    lines = []
    metrics = workdir / "metrics.jsonl"
    logged = [json.loads(line) for line in metrics.read_text().splitlines()] if storage.is_file(metrics) else []
    trained = [m for m in logged if "loss" in m]
    if trained:
        lines.append(f"Training loss at step {trained[-1]['step']}: {trained[-1]['loss']:.3f}.")
    found = workdir / "evaluation.json"
    for task, by_scale in (json.loads(found.read_text()) if storage.is_file(found) else {}).items():
        kinds = [k for k in next(iter(by_scale.values())) if "/" in k or not k.startswith("n_")]
        lines += ["", f"| {task}: visual tokens | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        lines += [f"| {scale} | {' | '.join(f'{m[k]:.3f}' for k in kinds)} |" for scale, m in by_scale.items()]
    return "\n".join(lines) or "Not evaluated."
