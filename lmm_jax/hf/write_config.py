"""`config.json` of an exported model: what `hf.read_config` reads, from our config."""

from lmm_jax import families
from lmm_jax.data.conversation import names_key, stop_id
from lmm_jax.families import ORIGINAL
from lmm_jax.hf.names import decoder_family, encoder_family, projector_family
from lmm_jax.hf.read_config import PIXELS, TEMPLATE_KEY, made_with, pixel_patches, select_strategy
from lmm_jax.hf.rope import written_rope
from lmm_jax.hf.stacking import stacking_keys
from lmm_jax.hf.tokenizer_json import added_ids
from lmm_jax.models.encoders import make_encoder

SEQUENCES_OF_STACKS = ("blank", "samples", "whole+samples")  # of what is stacked, put into the sequence instead


def architecture(config) -> families.kinds.Whole:
    """The family of transformers' classes that computes what a model of ours does.

    Raises:
      ValueError: none does; the message names the field, of the family that is nearest.
    """
    model = config.model
    encoder, decoder = encoder_family(model), decoder_family(model)
    if not decoder.architecture:
        raise ValueError(f"model.families.decoder='{decoder.name}': transformers has no class for a {decoder.title}")
    _check_fields(model)
    _require("model.reduction", model.reduction, "pool")
    if not model.families.projector:
        _require("model.projector.depth", model.projector.depth, 2)
    whole_grid = max(own_scales(model))
    if max(model.scales) != whole_grid:
        raise ValueError(
            f"model.scales={tuple(model.scales)}: transformers gives a view all of its {whole_grid} tokens"
        )
    candidates = [
        whole
        for whole in families.WHOLES.values()
        if encoder.name in whole.encoders
        and model.families.projector == whole.projector
        and made_with(whole, decoder)
    ]
    if not candidates:
        raise ValueError(
            f"model.families.vision='{encoder.name}', model.families.projector='{model.families.projector}', "
            f"model.families.decoder='{decoder.name}': no class of transformers is made with them"
        )
    multipliers = model.decoder.multipliers
    if multipliers and multipliers[3] != 1:
        candidates = [whole for whole in candidates if whole.divides_logits]
        if not candidates:
            raise ValueError(
                f"model.decoder.multipliers={tuple(multipliers)}: no class of transformers with this encoder divides "
                "logits; with 1.0 as the last one can be exported, and answers are the same"
            )
    faults = {whole.name: _faults(whole, config, whole_grid) for whole in candidates}
    # The nearest is the one that goes wrong last: a family names what it is told by first.
    nearest = min(candidates, key=lambda whole: [fault is not None for fault in faults[whole.name]])
    wrong = [fault for fault in faults[nearest.name] if fault is not None]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: nearest among transformers' classes is {nearest.architecture}")
    return nearest


def _faults(whole, config, whole_grid):
    """What keeps a family from computing the model: a sentence for each condition in order, None where it holds."""
    conditions = dict(whole.accepts)
    if not whole.nested:
        conditions["model.scales"] = ((whole_grid,),)
    values = {field: get_field(config, field) for field in conditions}
    return [
        None if values[field] in allowed else f"{field}={values[field]!r} cannot be exported, {_listing(allowed)} can"
        for field, allowed in conditions.items()
    ]


def _listing(allowed):
    return f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(map(repr, allowed))


def _check_fields(model):
    """Raises ValueError for a field of encoder or decoder that is not as the family fixes it."""
    held = [("vision", encoder_family(model), None), ("decoder", decoder_family(model), None)]
    if model.families.projector:
        family = projector_family(model)
        held.append(("projector", family, family.fields))
        own = {field: x for field, x in model.level_projector.items() if x is not None}
        for field, value in {**family.fields, **family.level_fields}.items():
            if (found := own.get(field, model.projector[field])) != value:
                raise ValueError(f"model.level_projector.{field}={found!r}: a {family.title} has {value!r}")
    else:
        for field, value in families.PLAIN_PROJECTOR.items():
            if model.projector[field] != value:
                raise ValueError(f"model.projector.{field}={model.projector[field]!r}: the usual one has {value!r}")
    if model.decoder.rope_axes and not decoder_family(model).axes_key:
        raise ValueError(
            f"model.decoder.rope_axes={tuple(model.decoder.rope_axes)}: positions of a "
            f"{decoder_family(model).title} have one axis"
        )
    for part, family, fields in held:
        for field, value in (family.fields if fields is None else fields).items():
            if model[part][field] != value:
                raise ValueError(f"model.{part}.{field}={model[part][field]!r}: a {family.title} has {value!r}")


def transformers_keys(config, tokenizer, whole) -> dict:
    """`config.json` of a family of `architecture`, in the words of transformers 4, which 5 reads too."""
    model, data = config.model, config.data
    decoder, encoder = decoder_family(model), encoder_family(model)
    image, pad, rows = added_ids(tokenizer, model.decoder.vocab_size, whole.image_piece)
    text = _decoder(config) | {
        "model_type": decoder.model_types[0],
        "architectures": [decoder.architecture],
        "vocab_size": rows,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stop_id(tokenizer, data.template),
        "pad_token_id": pad,
    }
    of_llava = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": select_strategy(encoder),
        "image_seq_length": max(model.scales),
    }
    keys = own_keys(config, whole) | {
        "text_config": text,
        "vision_config": tower_keys(config, blocks_built(config)) | _projector_keys(model, of_tower=True),
        **_projector_keys(model, of_tower=False),
        **(of_llava if whole.llava_keys else {}),
        **{key: allowed[0] for key, allowed in whole.constants.items()},
        whole.image_key: image,
        **{
            key: ids[0]
            for key, piece in whole.piece_keys.items()
            if isinstance((ids := tokenizer.markup(piece))[0], int)
        },
        "pad_token_id": pad,
        "tie_word_embeddings": model.decoder.tied,
        "torch_dtype": model.dtype,
        TEMPLATE_KEY: data.template,
        **names_key(data.template),
    }
    if tuple(model.scales) != tuple(own_scales(model)):
        keys[ORIGINAL.keys["scales"]] = list(model.scales)
    if whole.tilings_key:
        keys[whole.tilings_key] = tiling_pixels(config)
    if whole.shrink_key:
        keys[whole.shrink_key] = f"anyres_max_{data.shrink}"
    return keys


def own_keys(config, whole) -> dict:
    """The keys of `config.json` that say which class a model is of, and hold fields of our config as they are."""
    keys = {"architectures": [whole.architecture], "model_type": whole.model_type}
    if whole.auto_map:
        keys["auto_map"] = dict(whole.auto_map)
    keys |= {key: get_field(config, field) or None for key, field in whole.optional.items()}
    return keys | {key: listed(get_field(config, field)) for key, field in whole.fields.items()}


def own_scales(model) -> list[int]:
    """The scales that a model's class gives a view: all of its tokens, by each path of the projector, ascending."""
    return sorted((make_encoder(model).grid // factor) ** 2 for factor in model.projector.shuffle)


def _projector_keys(model, of_tower):
    """What the keys of the encoder, or else of the whole model, say of a projector that has a family."""
    family = families.PROJECTORS.get(model.families.projector)
    if family is None or family.of_tower != of_tower:
        return {}
    shuffle = model.projector.shuffle
    keys = {family.shuffle_key: shuffle[0]}
    keys |= {family.finer_key: len(shuffle) > 1} if family.finer_key else {}
    return keys | ({family.width_key: model.decoder.width} if family.width_key else {})


def original_keys(config) -> tuple[dict, dict | None]:
    """`config.json` of the original layout, and that of the vision tower if no released one is meant.

    Raises:
      ValueError: a field that the layout has no word for.
    """
    model, data, of = config.model, config.data, ORIGINAL.keys
    encoder = encoder_family(model)
    _check_fields(model)
    _require("model.reduction", model.reduction, "pool")
    _require("data.shrink", data.shrink, 0)
    _require("data.tiled_alone", data.tiled_alone, False)
    keys = _decoder(config) | {
        "architectures": [ORIGINAL.architecture],
        "model_type": ORIGINAL.model_type,
        "vocab_size": model.decoder.vocab_size,
        of["length"]: data.length,
        ORIGINAL.told_by: "linear" if model.projector.depth == 1 else f"mlp{model.projector.depth}x_gelu",
        **{key: allowed[0] for key, allowed in ORIGINAL.constants.items()},
        of["trains tower"]: True,
        of["aspect"]: data.aspect,
        "torch_dtype": model.dtype,
        TEMPLATE_KEY: data.template,
        **names_key(data.template),
    }
    if encoder.level:
        level, depth = (model.vision[field] for field in encoder.level)
        keys[of["level"]], tower = level, tower_keys(config, depth)
    else:
        keys[of["level"]], tower = -1, tower_keys(config)
    named = [name for name, about in encoder.towers.items() if about.items() <= tower.items()]
    keys[of["tower"]] = named[0] if named else "vision_tower"
    if len(model.scales) > 1:
        keys[of["scales"]] = list(model.scales)
    if data.stacks or data.sequence in SEQUENCES_OF_STACKS:
        keys |= stacking_keys(config)
    elif data.tilings:
        side = model.vision.image_size
        merges = {sequence: merge for merge, sequence in ORIGINAL.merges.items()}
        keys[of["tilings"]] = [[columns * side, rows * side] for columns, rows in data.tilings]
        keys[of["merge"]] = merges[data.sequence]
    return keys, None if named else tower


def picture_keys(config) -> dict:
    """Keys of `preprocessor_config.json` that every image processor of transformers reads: side and normalisation."""
    vision = config.model.vision
    side = vision.image_size
    return {
        "image_processor_type": encoder_family(config.model).image_processor,
        "crop_size": {"height": side, "width": side},
        "size": {"shortest_edge": side},
        "image_mean": list(vision.mean),
        "image_std": list(vision.std),
    }


def pixel_keys(config) -> dict:
    """Keys of an image processor that keeps the sizes of pictures, see `read_config.pixel_patches`."""
    return {"size": {key: config.data[field] for field, key in PIXELS.items()}} | pixel_patches(config.model)


def tower_keys(config, depth=None) -> dict:
    """`config.json` of the vision tower, of `depth` blocks if its family numbers them."""
    family, vision = encoder_family(config.model), config.model.vision
    keys = {"model_type": family.model_types[0]}
    keys |= {key: listed(vision[field]) for field, key in family.keys.items()}
    keys |= {key: len(vision[field]) for key, field in family.counts.items()}
    keys |= {key: vision[field][-1] for key, field in family.lasts.items()}
    if family.levels_key:
        keys[family.levels_key] = [level - 1 for level in vision.stack_levels]
    keys |= {key: allowed[0] for key, allowed in family.constants.items() if allowed[0] is not None}
    if depth is not None:
        keys[family.keys[family.level[1]]] = depth
    return keys


def blocks_built(config) -> int | None:
    """Blocks of the encoder up to the hidden state that is read, those that have weights; None if all are."""
    level = encoder_family(config.model).level
    if not level:
        return None
    state, depth = (config.model.vision[field] for field in level)
    return range(depth + 1)[state]


def get_field(config, name):
    """A field of a config by its dotted name, lists as tuples."""
    for part in name.split("."):
        config = config[part]
    return tuple(config) if isinstance(config, list) else config


def tiling_pixels(config) -> list[list[int]]:
    """(height, width) in pixels of each tiling, as transformers' classes say it."""
    side = config.model.vision.image_size
    return [[rows * side, columns * side] for columns, rows in config.data.tilings]


def _decoder(config):
    family, decoder = decoder_family(config.model), config.model.decoder
    keys = {}
    for field, key in family.keys.items():
        named = zip(key, decoder[field], strict=True) if isinstance(key, tuple) else [(key, decoder[field])]
        keys |= {} if field == "vocab_size" else dict(named)
    keys |= written_rope(decoder.rope_theta, tuple(decoder.rope_scaling), tuple(decoder.rope_axes), family)
    keys |= {key: allowed[0] for key, allowed in family.constants.items() if allowed[0] is not None}
    if decoder.head_dim:
        keys["head_dim"] = decoder.head_dim
    if family.window:
        keys |= {family.window: None} | ({family.window_switch: False} if family.window_switch else {})
    return keys | {
        "max_position_embeddings": config.data.length,
        "torch_dtype": config.model.dtype,
    }


def listed(value):
    """Tuples as JSON's lists."""
    return list(map(listed, value)) if isinstance(value, list | tuple) else value


def _require(field, value, *allowed):
    if value not in allowed:
        raise ValueError(f"{field}={value!r} cannot be exported, {' or '.join(map(repr, allowed))} can")
