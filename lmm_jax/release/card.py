"""The model card of an export: what was trained on what, how well it does at which budget, how to load it."""

import json

from lmm_jax.families import ORIGINAL
from lmm_jax.hf.names import decoder_family, encoder_family

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

## Recipe

{recipe}

## Data

{data}

## Results

{results}
"""

LOAD = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER"{remote})
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil"{remote})
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is it?"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=[Image.open("picture.png")], text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

The code that this folder ships is run only with `trust_remote_code=True`. In JAX: `lmm_jax.load("FOLDER")`."""

BUDGETS = """

Fewer visual tokens a picture, {scales} of {most}, with stock calls: pool the features and tell the processor.

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


def model_card(workdir, config, whole, task) -> str:
    """Text of README.md.

    Args:
      workdir: what it holds of metrics and evaluations is quoted.
      config: of the run.
      whole: the family that the folder is of, see `hf.write_config.architecture`; None for the original layout.
      task: name of the task that the data belong to, see `evaluation.tasks`; "" if it is not known.
    """
    model, vision = config.model, config.model.vision
    remote = ", trust_remote_code=True" if whole is not None and whole.code else ""
    load = LOAD.format(remote=remote)
    if whole is None:
        load = f'In {ORIGINAL.title}\'s original layout, for code that reads it. In JAX: `lmm_jax.load("FOLDER")`.'
    elif not remote:
        load = load.replace("The code that this folder ships is run only with `trust_remote_code=True`. ", "")
    scales = sorted(model.scales)
    if len(scales) > 1 and whole is not None:
        side = int(scales[-1] ** 0.5)
        load += BUDGETS.format(
            scales=", ".join(map(str, scales[:-1])),
            most=scales[-1],
            example=scales[-2],
            size=vision.image_size,
            patch=vision.image_size // side,
            side=side,
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
        recipe=_recipe(config),
        data=_data(config, task),
        results=_results(workdir),
    )


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
        "stacks": (data.stacks or "none") + (f" before layers {layers}" if layers else ""),
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
    logged = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    trained = [m for m in logged if "loss" in m]
    if trained:
        lines.append(f"Training loss at step {trained[-1]['step']}: {trained[-1]['loss']:.3f}.")
    found = workdir / "evaluation.json"
    for task, by_scale in (json.loads(found.read_text()) if found.exists() else {}).items():
        kinds = [k for k in next(iter(by_scale.values())) if "/" in k or not k.startswith("n_")]
        lines += ["", f"| {task}: visual tokens | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
        lines += [f"| {scale} | {' | '.join(f'{m[k]:.3f}' for k in kinds)} |" for scale, m in by_scale.items()]
    return "\n".join(lines) or "Not evaluated."
