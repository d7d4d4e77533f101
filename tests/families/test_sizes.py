"""Every size of every family has as many parameters as its publisher counts; nothing is computed but shapes."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lmm_jax as lmm
from lmm_jax import config as c
from lmm_jax import families
from lmm_jax.models.decoder import Decoder
from lmm_jax.models.encoders import make_encoder
from lmm_jax.models.lmm import build
from tests.release.recipes import CONFIGS

# Whole language models, a tied head counted once: what the hub's safetensors index says of each.
DECODERS = {
    "llama": {
        "7b": 6_738_415_616,
        "13b": 13_015_864_320,
        "3-8b": 8_030_261_248,
        "3.1-8b": 8_030_261_248,
        "3.2-1b": 1_235_814_400,
        "3.2-3b": 3_212_749_824,
        "smollm2-135m": 134_515_008,
        "smollm2-360m": 361_821_120,
        "smollm2-1.7b": 1_711_376_384,
    },
    "mistral": {"7b-v0.1": 7_241_732_096, "7b-v0.2": 7_241_732_096, "7b-v0.3": 7_248_023_552},
    "qwen2": {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "3b": 3_085_938_688, "7b": 7_615_616_512},
    "qwen3": {
        "0.6b": 596_049_920,
        "1.7b": 1_720_574_976,
        "4b": 4_022_468_096,
        "8b": 8_190_735_360,
        "14b": 14_768_307_200,
        "32b": 32_762_123_264,
    },
    "phi3": {"mini": 3_821_079_552, "medium": 13_960_238_080},
    "granite": {"3-2b": 2_533_531_648, "3-8b": 8_170_848_256},
    "granite_docling_text": {"0.5b": 386_630_656},
}
# Whole vision towers, with what no model of pictures and text reads: the vision sides of released SigLIPs, for which
# the hub counts both sides; these numbers are of transformers' class at the released sizes.
ENCODERS = {"siglip": {"b16-512": 93_520_128, "l16-384": 316_283_904, "so400m14-384": 428_225_600}}
SMOLVLM = 256_484_928  # of transformers' class at the sizes of SmolVLM-256M
GRANITE_DOCLING = 543_428_352  # without a router


def pairs(table, known):
    """`(family, size)` of families of one table, those alone of which `known` counts the parameters."""
    return [(name, size) for name in known for size in table[name].sizes]


def counted(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(tree)))


def decoder_of(family, size):
    """The decoder of a size without padding of its vocabulary."""
    config = c.base()
    c.use_family(config, family, size)
    return Decoder(**config.model.decoder.to_dict() | {"vocab_multiple": 1})


@pytest.mark.parametrize(("family", "size"), pairs(families.DECODERS, DECODERS))
def test_a_decoder_has_the_published_number_of_parameters(family, size):
    decoder = decoder_of(family, size)
    decoder.check()
    h, row = jnp.zeros((1, 1, 2, decoder.width)), jnp.zeros((1, 1, 2), jnp.int32)

    def whole(decoder, h):
        return decoder.logits(decoder(h, {"position": row, "segment": row})[0])

    shapes = jax.eval_shape(lambda: decoder.init(jax.random.key(0), h, method=whole))
    assert counted(shapes) == DECODERS[family][size]


def unread(family, vision):
    """Parameters of a SigLIP's last norm and of the head that pools the patches."""
    width, mlp = vision.width, vision.mlp_dim
    attention = 4 * (width * width + width)
    return 2 * width + width + attention + 2 * width + 2 * width * mlp + width + mlp


@pytest.mark.parametrize(("family", "size"), pairs(families.ENCODERS, ENCODERS))
def test_an_encoder_has_the_published_number_of_parameters(family, size):
    config = c.base()
    c.use_family(config, family, size)
    encoder = make_encoder(config.model)
    pixels = jnp.zeros((1, encoder.side, encoder.side, 3), jnp.uint8)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), pixels))
    assert counted(shapes) + unread(family, config.model.vision) == ENCODERS[family][size]


@pytest.mark.parametrize("name, count", [("granite_docling", GRANITE_DOCLING), ("smolvlm", SMOLVLM)])
def test_a_whole_model_has_the_parameters_of_its_class(name, count):
    config = lmm.load_config(f"{CONFIGS}/{name}.py", "model.decoder.vocab_multiple=1")
    model = build(config.model)
    side, row = model.vision.side, jnp.zeros((1, 1, 2), jnp.int32)
    batch = {"pixels": jnp.zeros((1, 1, side, side, 3), jnp.uint8), "id": row, "slot": row}
    batch |= {"position": row, "segment": row}

    def whole(model, batch):
        return model.logits(model(batch))

    assert counted(jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method=whole))) == count


def test_every_size_has_a_published_number():
    for known, table in ((DECODERS, families.DECODERS), (ENCODERS, families.ENCODERS)):
        for name, family in table.items():
            assert name not in known or set(known[name]) == set(family.sizes), name
    # Sizes of whole models' own parts are counted with these, see `test_a_whole_model_…` and test_qwen3_vl.py.
    apart = {"granite_docling", "smolvlm", "qwen3_vl_text", "qwen3_vl_vision"}
    sized = {name for table in (families.DECODERS, families.ENCODERS) for name, f in table.items() if f.sizes}
    assert sized - apart == {*DECODERS, *ENCODERS}


def keys_of(family, fields):
    """What `text_config` or `vision_config` says of a size."""
    keys = {}
    for field, key in family.keys.items():
        if field in fields:
            keys |= dict(zip(key, fields[field], strict=True)) if isinstance(key, tuple) else {key: fields[field]}
    keys |= {"head_dim": fields["head_dim"]} if fields.get("head_dim") else {}
    keys.pop("rope_theta", None)  # which shapes nothing
    return keys | {"pad_token_id": None}


@pytest.mark.long
@pytest.mark.parametrize(("family", "size"), pairs(families.DECODERS, DECODERS))
def test_transformers_counts_a_decoder_alike(transformers, family, size):
    import torch

    about = families.DECODERS[family]
    config = transformers.AutoConfig.for_model(about.model_types[0], **keys_of(about, dict(about.sizes[size])))
    with torch.device("meta"):
        if family == "granite_docling_text":
            model = transformers.AutoModel.from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(x.numel() for x in model.parameters()) == DECODERS[family][size]


@pytest.mark.long
@pytest.mark.parametrize(("family", "size"), pairs(families.ENCODERS, ENCODERS))
def test_transformers_counts_an_encoder_alike(transformers, family, size):
    import torch

    about = families.ENCODERS[family]
    keys = keys_of(about, dict(about.sizes[size]))
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**keys))
    assert sum(x.numel() for x in model.parameters()) == ENCODERS[family][size]


@pytest.mark.long
def test_transformers_counts_granite_docling_alike(transformers):
    import torch

    with torch.device("meta"):
        model = transformers.GraniteDoclingForConditionalGeneration(transformers.GraniteDoclingConfig())
    assert sum(x.numel() for x in model.parameters()) == GRANITE_DOCLING


@pytest.mark.long
def test_transformers_counts_smolvlm_alike(transformers):
    import torch

    text = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536}
    text |= {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": False,
    }
    vision = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    config = transformers.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=49190, tie_word_embeddings=False
    )
    with torch.device("meta"):
        model = transformers.SmolVLMForConditionalGeneration(config)
    assert sum(x.numel() for x in model.parameters()) == SMOLVLM
