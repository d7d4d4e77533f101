"""What a Hugging Face folder of DeepStack-L, -L-HD and -V ships: its own code, run with `trust_remote_code=True`.

The three files of `FILES` are copied into the folder and run there, by transformers, which nothing of ours imports.
"""

FILES = ("configuration_deepstack.py", "modeling_deepstack.py", "processing_deepstack.py")

AUTO_MAP = {
    "AutoConfig": "configuration_deepstack.DeepStackConfig",
    "AutoModelForImageTextToText": "modeling_deepstack.DeepStackForConditionalGeneration",
    "AutoImageProcessor": "processing_deepstack.DeepStackImageProcessor",
    "AutoProcessor": "processing_deepstack.DeepStackProcessor",
}


def keys(config) -> dict:
    """Keys of `config.json`, beside those of a LLaVA-1.5.

    Raises:
      ValueError: a field whose value the shipped code does not reproduce, named.
    """
    _check(config)
    model, data = config.model, config.data
    return {
        "architectures": ["DeepStackForConditionalGeneration"],
        "model_type": "deepstack_llava",
        "auto_map": AUTO_MAP,
        "inject_layers": list(model.decoder.inject_layers),
        "sequence": data.sequence,
        "stacks": data.stacks,
        "sampling": data.sampling,
        "zoom": data.zoom,
        "newline": model.newline,
        "newline_in_stacks": model.newline_in_stacks,
        "regroup": list(model.vision.regroup),
    }


def processor_keys() -> dict:
    """Content of `processor_config.json`."""
    return {
        "processor_class": "DeepStackProcessor",
        "auto_map": {name: AUTO_MAP[name] for name in ("AutoProcessor", "AutoImageProcessor")},
    }


def preprocessor_keys(config) -> dict:
    """Content of `preprocessor_config.json`.

    Raises:
      ValueError: as `keys`.
    """
    _check(config)
    model, data = config.model, config.data
    return processor_keys() | {
        "image_processor_type": "DeepStackImageProcessor",
        "size": {"height": model.vision.image_size, "width": model.vision.image_size},
        "patch_size": model.vision.patch_size,
        "tilings": [list(tiling) for tiling in data.tilings],
        "aspect": data.aspect,
        "zoom": data.zoom,
        "sequence": data.sequence,
        "newline": model.newline,
    }


def _check(config):
    model, data = config.model, config.data

    def require(field, value, *allowed):
        if value not in allowed:
            raise ValueError(
                f"{field}={value!r} cannot be exported as DeepStack, {' or '.join(map(repr, allowed))} can"
            )

    require("model.encoder", model.encoder, "vit")
    require("model.vision.stack_levels", tuple(model.vision.stack_levels), ())
    whole = (model.vision.image_size // model.vision.patch_size) ** 2
    require("model.scales", tuple(model.scales), (whole,))
    require("model.projector.depth", model.projector.depth, 2)
    require("data.aspect", data.aspect, "stretch", "anyres")
    require("data.sequence", data.sequence, "whole", "grid")
    require("data.stacks", data.stacks, "samples", "zoom", "encoder")
