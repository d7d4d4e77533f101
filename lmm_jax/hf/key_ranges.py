"""What each key of a model's files may be, a table for each part of them.

A table is asked by `read_config.Keys.hold` before anything is made of a value. A key that a field of ours is read
from has the range of that field, in `lmm_jax.fields` or of the encoder's module; the others have theirs here. Which
keys there are is asked of the family.
"""

from lmm_jax.data.images import MAX_PIXELS
from lmm_jax.families import ORIGINAL
from lmm_jax.fields import all_fields
from lmm_jax.models.encoders import encoder_ranges
from lmm_jax.ranges import COLOUR, SPREAD, Range, each, either, flag, number, text, whole

MOST_ID = 1 << 24  # of a piece; what is greater is a mistake
MOST_LISTED = 4_096  # entries of a list, such as the sizes that pictures are tiled to
FACTOR = number(0, 1e6, above=True)
WORD = text("a word")
NAME = Range(str, "a text", lambda x: type(x) is str)
PIXELS = whole(1, MAX_PIXELS)  # of a picture
SIDE = whole(1, 65_536)
SIDES = either(
    Range(
        dict,
        f"sides or numbers of pixels by name, each a whole number from 1 to {MAX_PIXELS:,} or null",
        lambda x: type(x) is dict and len(x) < 16 and all(n is None or PIXELS.holds(n) for n in x.values()),
    ),
    SIDE,
)
PART = Range(dict, "an object of keys and values", lambda x: type(x) is dict)
LEVEL = either(whole(-1_000, 1_000), each(whole(-1_000, 1_000), most=64))
LISTED_SIZES = each(each(SIDE, 2, 2), 1, MOST_LISTED, what=f"a list of up to {MOST_LISTED} pairs of sides in pixels")
SIZES = either(
    LISTED_SIZES,
    Range(str, "such a list as text", lambda x: type(x) is str and len(x) <= 32 * MOST_LISTED),
)
TIED = {"tie_word_embeddings": flag()}
# Of rotary positions, in a part of their own or among the keys of a decoder.
ROPE = {
    "rope_type": WORD,
    "type": WORD,
    "original_max_position_embeddings": whole(1),
    "partial_rotary_factor": number(0, 1, above=True),
    "mscale": number(0, 1e6),
    "mscale_all_dim": number(0, 1e6),
    "truncate": flag(),
    "mrope_section": each(whole(1, 65_536), 3, 3),
    "mrope_interleaved": flag(),
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), FACTOR
    ),
}
_PROCESSOR = {
    **dict.fromkeys(("image_processor_type", "feature_extractor_type", "aspect"), WORD),
    **dict.fromkeys(
        (
            *("do_center_crop", "do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad"),
            *("do_rescale", "do_resize", "default_to_square", "use_square_size"),
        ),
        flag(),
    ),
    **dict.fromkeys(("size", "crop_size"), SIDES),
    **dict.fromkeys(("patch_size", "temporal_patch_size", "merge_size"), SIDE),
    **dict.fromkeys(("min_pixels", "max_pixels"), PIXELS),
    "image_mean": COLOUR,
    "image_std": SPREAD,
    "rescale_factor": number(0, 1, above=True),
    "resample": whole(0, 16),
}


def of_decoder(family) -> dict[str, Range]:
    """What the keys of a family of decoders may be."""
    fields = all_fields("vit")
    out = {
        "model_type": WORD,
        "_name_or_path": NAME,
        "head_dim": fields["model.decoder.head_dim"].valid,
        "max_position_embeddings": fields["data.length"].valid,
        "layer_types": each(WORD, most=1_000),
        **dict.fromkeys(("rope_parameters", "rope_scaling"), PART),
        **TIED,
        **ROPE,
    }
    for field, key in family.keys.items():
        parts = isinstance(key, tuple)
        out |= dict.fromkeys(key, FACTOR) if parts else {key: fields[f"model.decoder.{field}"].valid}
    if family.window:
        out[family.window] = whole()
    if family.window_switch:
        out[family.window_switch] = flag()
    return out


def of_rope() -> dict[str, Range]:
    """What the keys of a decoder's rotary positions may be, where they are a part of their own."""
    return ROPE | {"rope_theta": all_fields("vit")["model.decoder.rope_theta"].valid}


# Of `adapter_config.json`.
ADAPTER = {
    "r": whole(1, 65_536),
    "lora_alpha": FACTOR,
    "lora_dropout": number(0, 1),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"), flag()),
    **dict.fromkeys(("peft_type", "bias"), WORD),
}


def of_encoder(family) -> dict[str, Range]:
    """What the keys of a family of encoders may be."""
    ranges = encoder_ranges(family.encoder)
    return {
        "model_type": WORD,
        "num_channels": whole(1, 64),
        **{key: ranges[field] for field, key in family.keys.items()},
        **dict.fromkeys(family.counts, whole(1, 64)),
        **dict.fromkeys(family.lasts, whole(1, 1_000_000)),
        **dict.fromkeys(family.positives, number(-1e6, 1e6)),
        **({family.levels_key: each(whole(0, 1_000), most=64, distinct=True)} if family.levels_key else {}),
    }


def of_projector(family) -> dict[str, Range]:
    """What the keys of a family of projectors may be, whichever part of a model they stand in."""
    keys = {family.shuffle_key: whole(1, 64), family.finer_key: flag(), family.width_key: whole(1, 1_000_000)}
    return {key: valid for key, valid in keys.items() if key}


def of_model(whole_family, encoder) -> dict[str, Range]:
    """What the keys of a whole model may be, beside those of its parts.

    Args:
      whole_family: of `families.WHOLES`, or None of the original layout.
      encoder: name in `models.encoders.ENCODERS` of the module that computes its tower.
    """
    out = {
        "model_type": WORD,
        "architectures": each(WORD, most=64),
        **dict.fromkeys(("_name_or_path", "lmm_jax_template", "lmm_jax_task"), NAME),
        **dict.fromkeys(("torch_dtype", "dtype", "vision_feature_select_strategy"), WORD),
        **dict.fromkeys(("image_token_index", "image_token_id"), whole(0, MOST_ID)),
        **dict.fromkeys(("text_config", "vision_config"), PART),
        "vision_feature_layer": LEVEL,
        ORIGINAL.told_by: WORD,
        **_of_original(),
        **TIED,
    }
    if whole_family is None:
        return out
    fields = all_fields(encoder)
    named = whole_family.optional | whole_family.fields
    out |= {key: fields[field].valid for key, field in named.items()}
    out |= {whole_family.tilings_key: SIZES} if whole_family.tilings_key else {}
    out |= {whole_family.shrink_key: WORD} if whole_family.shrink_key else {}
    return out


def _of_original():
    """What the keys of the original layout may be; other layouts may have some of them."""
    keys, stacking, fields = ORIGINAL.keys, ORIGINAL.stacking, all_fields("vit")
    return {
        **dict.fromkeys((keys["tower"], keys["tower, by other code"], keys["aspect"], keys["merge"]), WORD),
        keys["level"]: LEVEL,
        keys["tilings"]: SIZES,
        keys["scales"]: each(whole(1, 1_000_000), 1, 64, distinct=True),
        keys["length"]: fields["data.length"].valid,
        keys["trains tower"]: flag(),
        stacking.crops: whole(1, 64),
        stacking.sampling: WORD,
        **dict.fromkeys((stacking.first, stacking.interval), whole(0, 1_000)),
        stacking.doubled: flag(),
        stacking.words: Range(str, "words with + between them", lambda x: type(x) is str and len(x) < 1_000),
    }


def of_processor(whole_family, encoder) -> dict[str, Range]:
    """What the keys of an image processor may be; arguments as of `of_model`."""
    if whole_family is None:
        return _PROCESSOR
    fields, tiles = all_fields(encoder), whole(1, MOST_LISTED)
    named = {key: fields[field].valid for key, field in whole_family.picture_fields.items()}
    counts = (whole_family.fewest_tiles_key, whole_family.most_tiles_key)
    more = {key: tiles for key in counts if key}
    more |= {whole_family.tile_key: SIDES} if whole_family.tile_key else {}
    more |= {whole_family.tilings_key: SIZES} if whole_family.tilings_key else {}
    return _PROCESSOR | more | named
