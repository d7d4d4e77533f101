"""What a Hugging Face folder of DeepStack ships, run by transformers: against recorded numbers, and against ours."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import ExifTags, Image
from safetensors.numpy import save_file

import lmm_jax as lmm
from lmm_jax import hf, sharding
from lmm_jax.data.conversation import find_template
from lmm_jax.data.images import open_picture
from lmm_jax.data.packing import Capacity
from lmm_jax.data.tokenizer.sentencepiece import SentencePiece
from lmm_jax.families import ORIGINAL, WHOLES
from lmm_jax.hf.names import tensors, transformers_name
from lmm_jax.hf.processor import preprocessor_config, processor_config
from lmm_jax.hf.write_config import architecture, own_keys
from lmm_jax.training.state import make_program
from tests.greedy import greedy_ids
from tests.opened import pack_layout
from tests.parity.test_deepstack import ACTIVATIONS, LOSS, DeepStack, variants

ROOT = pathlib.Path(__file__).parents[2]
DEEPSTACK = WHOLES["deepstack"]
OURS = 2e-5  # between the two programs in float32; 7e-6 was found


def write_folder(folder, config, params, model, tokenizer=None):
    """Writes a model as a Hugging Face folder; `<image>` and `<pad>` are the ids behind the vocabulary."""
    vision, decoder = config.model.vision, config.model.decoder
    blocks = range(vision.depth + 1)[vision.level]
    about = {
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": decoder.vocab_size + 2,
            "hidden_size": decoder.width,
            "intermediate_size": decoder.mlp_dim,
            "num_hidden_layers": decoder.depth,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "rms_norm_eps": decoder.norm_eps,
            "rope_theta": decoder.rope_theta,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": blocks,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "vision_feature_layer": -1,
        "image_token_index": decoder.vocab_size,
        "pad_token_id": decoder.vocab_size + 1,
        "torch_dtype": "float32",
    }
    flat, weights = flatten_dict(params, sep="/"), {}
    for t in tensors(config.model, {path: x.shape for path, x in flat.items()}):
        array = t.to_theirs(flat[t.path] if t.layer is None else flat[t.path][t.layer])
        if t.path in ("decoder/table", "decoder/head/kernel"):
            array = array[: decoder.vocab_size]
            array = np.concatenate([array, *[array.mean(0, keepdims=True)] * 2])  # which greedy decoding never takes
        weights[transformers_name(t.name, DEEPSTACK)] = array
    after = transformers_name(ORIGINAL.tower + "vision_model.post_layernorm.", DEEPSTACK)
    weights |= {after + "weight": np.ones(vision.width, "f"), after + "bias": np.zeros(vision.width, "f")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files = {
        "config.json": about | own_keys(config, DEEPSTACK),
        "processor_config.json": processor_config(config, DEEPSTACK),
        "preprocessor_config.json": preprocessor_config(config, DEEPSTACK),
    }
    if tokenizer is not None:
        added = {
            tokenizer.vocab_size + i: {"content": p, "special": True} for i, p in enumerate(("<image>", "<pad>"))
        }
        settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "pad_token": "<pad>"}
        files["tokenizer_config.json"] = settings | {"bos_token": "<s>", "added_tokens_decoder": added}
        (folder / "tokenizer.model").write_bytes(tokenizer.model)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    for name in DEEPSTACK.code:
        shutil.copyfile(pathlib.Path(hf.__file__).parent / "deepstack" / name, folder / name)
    return folder


class Shipped:
    """A folder's model in transformers; everything goes in and comes out as numpy."""

    def __init__(self, transformers, folder):
        self.model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        assert not any(info.values()), info
        assert type(self.model).__name__ == "DeepStackForConditionalGeneration"
        assert type(self.model.config).__name__ == "DeepStackConfig"
        self.folder, self.model = folder, self.model.eval()
        self.image = self.model.config.image_token_id
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        assert type(processor).__name__ == "DeepStackImageProcessor"
        self.see = processor

    def inputs(self, rows, pictures, side="right"):
        """Of rows of ids, negative ones their pictures, in turn: what `forward` takes."""
        import torch

        seen = self.see([p for of in pictures for p in of], return_tensors="pt") if any(pictures) else {}
        counts = iter([self.see.tokens(*t) for t in seen["image_tilings"].tolist()] if seen else [])
        opened = [[x for i in ids for x in ([self.image] * next(counts) if i < 0 else [int(i)])] for ids in rows]
        most = max(map(len, opened))
        pads = [[0] * (most - len(row)) for row in opened]
        join = (lambda row, pad: row + pad) if side == "right" else (lambda row, pad: pad + row)
        ids = [join(row, pad) for row, pad in zip(opened, pads, strict=True)]
        real = [join([1] * len(row), pad) for row, pad in zip(opened, pads, strict=True)]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real), **seen}

    def logits(self, inputs, **more):
        """Logits of each row's real positions."""
        import torch

        with torch.no_grad():
            out = self.model(**inputs, **more).logits.numpy()
        return [row[real] for row, real in zip(out, inputs["attention_mask"].numpy().astype(bool), strict=True)]

    def search(self, inputs, tokens, **more):
        """What `generate` returns; not sampled, and none ends a row."""
        return self.model.generate(**inputs, do_sample=False, eos_token_id=None, max_new_tokens=tokens, **more)

    def generate(self, inputs, tokens, **more):
        """`[B, tokens]` new ids."""
        return self.search(inputs, tokens, **more)[:, -tokens:].numpy()


def differ(ours, theirs, vocabulary):
    """The largest difference of rows of logits."""
    return max(np.abs(a[..., :vocabulary] - b[..., :vocabulary]).max() for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def recorded(golden, tmp_path_factory, transformers):
    """`recorded(case, **keys)`: a model of the golden set, ours, and as transformers reads its folder."""

    @functools.cache
    def make(case="deepstack_l", **keys):
        tmp = tmp_path_factory.mktemp(case)
        ours = DeepStack(golden / "deepstack", tmp, case, **keys)
        (tmp / "hf").mkdir()
        return ours, Shipped(transformers, write_folder(tmp / "hf", ours.config, ours.params, ours.model))

    return make


CASES = {"deepstack_l": "L", "deepstack_l_hd": "HD", "deepstack_v": "V"}


@pytest.mark.parametrize("case", CASES)
def test_recorded_pixels_logits_loss_and_tokens(recorded, golden, transformers, case):
    """Pictures of different shapes in one batch; through the cache, without one, and in chunks that cut a picture."""
    import torch

    ours, theirs = recorded(case)
    z, rows = ours.z, [ids for ids, _ in ours.rows]
    with np.load(golden / "deepstack/preprocess.npz") as pixels:
        seen = theirs.see([p for of in ours.pictures for p in of])
        for i, (found, tiling) in enumerate(zip(seen["pixel_values"], seen["image_tilings"], strict=True)):
            want = pixels[f"{CASES[case]}/image{i}/pixel_values"]
            np.testing.assert_array_equal(tiling, pixels[f"{CASES[case]}/image{i}/grid_wh"])
            np.testing.assert_allclose(found[: len(want)], want, atol=1e-6)
            assert not found[len(want) :].any()
    mask = z["attention_mask_expanded"].astype(bool)
    want = [row[real] for row, real in zip(z["logits"], mask, strict=True)]
    inputs = theirs.inputs(rows, ours.pictures)
    found = theirs.logits(inputs)
    assert differ(found, want, ours.vocabulary) < ACTIVATIONS
    labels = torch.tensor(z["labels_expanded"])
    with torch.no_grad():
        loss = theirs.model(**inputs, labels=labels).loss
    more = np.concatenate([z["logits"], *[z["logits"].mean(-1, keepdims=True)] * 2], -1)  # the folder's two pieces
    want = torch.nn.functional.cross_entropy(torch.tensor(more)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    np.testing.assert_allclose(loss, want, atol=LOSS)
    out = ours.forward(ours.batch()).logits[:, 0]
    assert differ(found, [row[real] for row, real in zip(out, mask, strict=True)], ours.vocabulary) < OURS
    left = theirs.inputs(rows, ours.pictures, "left")
    assert differ(theirs.logits(left), found, ours.vocabulary) < OURS
    want = np.stack([z["greedy_sample0"], z["greedy_sample1"]])
    chunks = [{"prefill_chunk_size": 11}] if transformers.__version__ >= "5" else []  # 4 cannot cut a picture
    for how in ({}, {"use_cache": False}, *chunks):
        np.testing.assert_array_equal(theirs.generate(left, want.shape[1], **how), want, str(how))


def test_recorded_layers_and_samplings(recorded, golden):
    """Before the first layer, before layers apart, and past the last one."""
    for name in variants(golden):
        what = name.removeprefix("variant_")
        if what.startswith("start"):
            start, interval = what.removeprefix("start").split("_interval")
            keys = {"deepstack_start_id": int(start), "deepstack_interval": int(interval)}
        elif what.startswith("sampling"):
            keys = {"deepstack_sampling": what.split("_")[1]}
        else:  # truncation, which is not the model's
            continue
        ours, theirs = recorded(**keys)
        mask = ours.z["attention_mask_expanded"].astype(bool)
        want = [row[real] for row, real in zip(ours.z[f"{name}/logits"], mask, strict=True)]
        found = theirs.logits(theirs.inputs([ids for ids, _ in ours.rows], ours.pictures))
        assert differ(found, want, ours.vocabulary) < ACTIVATIONS, name


@pytest.mark.parametrize("side", ["right", "left"])
def test_recorded_text_beside_a_picture(recorded, golden, side):
    ours, theirs = recorded()
    with np.load(golden / "deepstack/edge_cases.npz") as e:
        real = e["mixed/attention_mask"].astype(bool)
        rows = [ids[r] for ids, r in zip(e["mixed/input_ids"], real, strict=True)]
        mask = e["mixed/attention_mask_expanded"].astype(bool)
        want = [row[r] for row, r in zip(e["mixed/fixed_logits"], mask, strict=True)]
    found = theirs.logits(theirs.inputs(rows, [[], ours.pictures[0]], side))
    assert differ(found, want, ours.vocabulary) < ACTIVATIONS


def test_recorded_second_picture_of_a_row(recorded, golden):
    ours, theirs = recorded()
    pictures = [p for of in ours.pictures for p in of]
    with np.load(golden / "deepstack/edge_cases.npz") as e:
        found = theirs.logits(theirs.inputs(e["twoimg/input_ids"], [pictures]))
        assert differ(found, e["twoimg/fixed_logits"], ours.vocabulary) < ACTIVATIONS


@pytest.mark.parametrize("case", CASES)
def test_beams_see_the_pictures_of_their_row(recorded, case):
    """A text, a row of two pictures, a row of one: a beam's score is what its tokens have without beams."""
    import torch

    ours, theirs = recorded(case)
    (a,), (b,) = ours.pictures
    text = [i for i in ours.rows[0][0] if i >= 0]
    rows, pictures, new = [text, [*ours.rows[0][0], *ours.rows[1][0]], ours.rows[1][0]], [[], [a, b], [a]], 6
    inputs = theirs.inputs(rows, pictures, "left")
    out = theirs.search(inputs, new, num_beams=3, return_dict_in_generate=True, output_scores=True)
    assert (out.sequences[:, -new:].numpy() != theirs.generate(inputs, new)).any()
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1)
    found = theirs.logits(inputs | {"input_ids": out.sequences, "attention_mask": real})
    for logits, tokens, score in zip(found, out.sequences[:, -new:], out.sequences_scores, strict=True):
        each = torch.tensor(logits[-new - 1 : -1]).log_softmax(-1).gather(1, tokens[:, None])
        np.testing.assert_allclose(each.mean(), score, atol=OURS)


# Two layouts that no golden set has, of models with grouped queries.
TINY = (
    "data.template=vicuna_v1",
    "model.dtype=float32",
    "model.scales=(16,)",
    "model.vision.image_size=28",
    "model.vision.patch_size=7",
    "model.vision.width=16",
    "model.vision.heads=2",
    "model.vision.mlp_dim=32",
    "model.vision.depth=3",
    "model.decoder.vocab_size=1200",
    "model.decoder.width=32",
    "model.decoder.heads=4",
    "model.decoder.kv_heads=2",
    "model.decoder.mlp_dim=64",
    "model.decoder.depth=4",
)
LAYOUTS = {
    "l": ("data.aspect=anyres", "data.sampling=1d", "model.decoder.inject_layers=(3,0,2,1)"),
    "hd": (
        "model.newline_in_stacks=False",
        "data.tilings=((2,1),(1,1),(1,2))",
        "model.decoder.inject_layers=(0,2,1,9)",
    ),
}
PROMPTS = (  # and the pictures of each
    ("Are <image>and <image>alike?", (0, 1)),
    ("How many are there?", ()),
    ("<image>\nColour of b2?", (2,)),
)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = ((60, 37), (25, 90), (41, 44))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


class Drawn:
    """One of LAYOUTS with drawn parameters; every prompt of PROMPTS is a pack of its own, all of one shape."""

    def __init__(self, name, tokenizer, pictures):
        self.config = config = lmm.load_config(f"{ROOT}/configs/deepstack.py:recipe={name}", *TINY, *LAYOUTS[name])
        program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
        self.model, self.tokenizer, rng = program.model, tokenizer, np.random.default_rng(1)
        shapes = flatten_dict(nn.unbox(program.boxed), sep="/")
        drawn = {path: rng.normal("scale" in path, 0.2, x.shape).astype(np.float32) for path, x in shapes.items()}
        self.params, self.scale = unflatten_dict(drawn, sep="/"), config.model.scales[0]
        self.pictures = [[pictures[i] for i in of] for _, of in PROMPTS]
        sizes = [[p.size for p in of] for of in self.pictures]
        views = max(sum(map(int, pack_layout(config).visual.views_of(of))) for of in sizes if of)
        layout = pack_layout(config, Capacity(1, 0, views, 0))
        self.segments = [
            layout.segments([("user", text)], of, tokenizer, (self.scale,))[0]
            for (text, _), of in zip(PROMPTS, sizes, strict=True)
        ]
        fitted = pack_layout(config, Capacity(1, max(map(len, self.segments)), views, 0))
        packs = [
            fitted.assemble([segment], [(p.size, fitted.see(p)) for p in of])
            for segment, of in zip(self.segments, self.pictures, strict=True)
        ]
        self.batch = {key: np.stack([pack[key] for pack in packs]) for key in packs[0]}

    def logits(self):
        run = jax.jit(lambda p, b: self.model.apply({"params": p}, b, method=lambda m, b: m.logits(m(b))))
        out = np.asarray(run(self.params, self.batch))[:, 0]
        return [row[: len(segment)] for row, segment in zip(out, self.segments, strict=True)]

    def greedy(self, tokens):
        return greedy_ids(self.model, self.params, self.batch, self.scale, tokens)


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request, golden, tmp_path_factory, transformers, pictures):
    """Our model, its folder in transformers, and that folder's processor."""
    ours = Drawn(request.param, SentencePiece((golden / "m3/tokenizer.model").read_bytes(), legacy=True), pictures)
    folder = tmp_path_factory.mktemp(request.param)
    write_folder(folder, ours.config, ours.params, ours.model, ours.tokenizer)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return ours, Shipped(transformers, folder), processor


def prompt(text):
    form = find_template("vicuna_v1")
    return form.opening.format(system=form.system) + text + form.user[1]


def test_the_processor_gives_our_ids_and_pixels_and_the_model_our_logits_and_tokens(both):
    ours, theirs, processor = both
    assert type(processor).__name__ == "DeepStackProcessor"
    texts = [prompt(text) for text, _ in PROMPTS]
    pictures = [p for of in ours.pictures for p in of]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="left", return_tensors="pt")
    mean, std = np.float32(ours.model.vision.mean), np.float32(ours.model.vision.std)
    visual, seen = pack_layout(ours.config), iter(inputs["pixel_values"].numpy())
    for ids, real, segment in zip(inputs["input_ids"], inputs["attention_mask"], ours.segments, strict=True):
        ids = ids[real.bool()].numpy()
        np.testing.assert_array_equal(ids == theirs.image, segment.slot >= 0)
        np.testing.assert_array_equal(ids[segment.slot < 0], segment.id[segment.slot < 0])
    for picture in pictures:
        want = np.moveaxis((visual.see(picture) / np.float32(255) - mean) / std, -1, 1)
        np.testing.assert_allclose(next(seen)[: len(want)], want, atol=1e-6)
    vocabulary = ours.config.model.decoder.vocab_size
    assert differ(theirs.logits(inputs), ours.logits(), vocabulary) < OURS
    np.testing.assert_array_equal(theirs.generate(inputs, 6), ours.greedy(6))


def test_pictures_of_any_kind(both, tmp_path):
    """Turned by their EXIF header, transparent, grey, an array, a path, in nested lists: the pixels are ours."""
    ours, theirs, _ = both
    levels = np.random.default_rng(2).integers(0, 256, (50, 31, 4), np.uint8)
    upright, exif = Image.fromarray(levels[..., :3]), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    upright.save(tmp_path / "turned.png", exif=exif)
    given = [Image.open(tmp_path / "turned.png"), Image.fromarray(levels), Image.fromarray(levels[..., 0])]
    layout = pack_layout(ours.config)
    want = [layout.see(open_picture(picture)) for picture in [*given, tmp_path / "turned.png", upright]]
    seen = theirs.see([[*given, str(tmp_path / "turned.png")], [np.asarray(upright)]])["pixel_values"]
    vision = ours.model.vision
    for found, views in zip(seen, want, strict=True):
        found = (np.moveaxis(found[: len(views)], 1, -1) * np.array(vision.std) + vision.mean) * 255
        np.testing.assert_array_equal(np.rint(found), views)


@pytest.mark.parametrize("recipe", ["l", "hd", "v"])
def test_tiles_and_tokens_of_any_size(recorded, recipe):
    """At the recipes' own sizes, of small and large pictures, where tilings tie and where they do not."""
    config = lmm.load_config(f"{ROOT}/configs/deepstack.py:recipe={recipe}")
    see = type(recorded()[1].see)(**preprocessor_config(config, DEEPSTACK))
    visual, rng = pack_layout(config).visual, np.random.default_rng(3)
    sizes = np.exp(rng.uniform(np.log(8), np.log(4000), (1000, 2))).astype(int)
    tilings = [see.tiling(*size) for size in sizes.tolist()]
    assert [tuple(t) for t in tilings] == [visual.tiling(*size) for size in sizes.tolist()]
    np.testing.assert_array_equal([see.tokens(*t) for t in tilings], visual.tokens(sizes, 576))


def test_what_transformers_saves_it_reads_again(both, transformers, tmp_path):
    ours, theirs, processor = both
    theirs.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again).__name__ == "DeepStackProcessor"
    given = {"images": ours.pictures[2], "text": prompt(PROMPTS[2][0]), "return_tensors": "pt"}
    inputs, inputs_again = processor(**given), again(**given)
    for name in ("pixel_values", "image_tilings"):
        np.testing.assert_array_equal(inputs_again[name], inputs[name])
    counts = [(x["input_ids"] == theirs.image).sum() for x in (inputs_again, inputs)]
    assert counts[0] == counts[1]
    np.testing.assert_array_equal(Shipped(transformers, tmp_path).logits(inputs), theirs.logits(inputs))


def test_text_and_pictures_must_match(both):
    _, _, processor = both
    picture = Image.new("RGB", (30, 30))
    for images, text in ((None, "a <image>"), ([picture], "a"), ([picture], ["<image>", "<image>"])):
        with pytest.raises(ValueError, match="<image> tokens"):
            processor(images=images, text=text)
    with pytest.raises(ValueError, match="truncat"):
        processor(images=[picture], text="<image>", truncation=True, max_length=5)


def test_pipeline(both, transformers):
    ours, theirs, processor = both
    run = transformers.pipeline("image-text-to-text", model=str(theirs.folder), trust_remote_code=True)
    (text, _), (picture,) = PROMPTS[2], ours.pictures[2]
    out = run(
        images=picture,
        text=prompt(text),
        max_new_tokens=6,
        return_full_text=False,
        generate_kwargs={"eos_token_id": None},
    )
    new = theirs.generate(processor(images=picture, text=prompt(text), return_tensors="pt"), 6)
    want = processor.decode(new[0], skip_special_tokens=True)
    assert out[0]["generated_text"].strip() == want.strip() != ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("data.stacks=copies",), "data.stacks='copies'"),
        (("data.sequence=blank",), "data.sequence='blank'"),
        (("data.aspect=pad", "data.tilings=((2,2),)"), "data.aspect='pad'"),
        (("model.scales=(4,16)",), "model.scales=(4, 16)"),
        (("model.projector.depth=1",), "model.projector.depth=1"),
        (
            ("model.vision.stack_levels=(1,)", "model.decoder.inject_layers=(0,1,2,3,4)"),
            "model.vision.stack_levels=(1,)",
        ),
    ],
)
def test_what_the_code_does_not_reproduce_is_refused(change, message):
    config = lmm.load_config(f"{ROOT}/configs/deepstack.py", *TINY, *change)
    with pytest.raises(ValueError) as error:
        architecture(config)
    assert message in str(error.value)


def test_config_keys_are_plain_json():
    config = lmm.load_config(f"{ROOT}/configs/deepstack.py:recipe=v", *TINY, "model.vision.regroup=(1,2)")
    found = json.loads(json.dumps(own_keys(config, DEEPSTACK)))
    assert found == own_keys(config, DEEPSTACK)
    assert (found["regroup"], found["inject_layers"], found["stacks"]) == ([1, 2], [], "encoder")
