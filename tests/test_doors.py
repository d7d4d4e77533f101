"""Each door of the house, walked through by a toy that lives here alone.

A newcomer is one class, module or value and a line in a table. Nothing else of the package is touched: here the line
is set for a test and taken away again. Each toy is planned, and where it is part of the model trained for five steps,
interrupted after three; it answers, it is evaluated; and where nobody else has a class for it, exporting says so in a
sentence. The others are trained too with --long.
"""

import dataclasses
import io
import json
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

import lmm_jax as lmm
from lmm_jax import config as c
from lmm_jax import families, reduction
from lmm_jax.data.prepare import datasets, folder
from lmm_jax.data.tokenizer import TOKENIZERS, Tokenizer
from lmm_jax.evaluation.tasks import TASKS, Example
from lmm_jax.families.llama import LLAMA
from lmm_jax.generation.answer import Answer
from lmm_jax.generation.model import Model
from lmm_jax.hf.names import tensors, transformers_name
from lmm_jax.hf.processor import preprocessor_config
from lmm_jax.hf.write_config import architecture, transformers_keys
from lmm_jax.models import encoders
from lmm_jax.models.encoders.convnext import space_to_depth
from lmm_jax.models.layers import Dense, normalise
from lmm_jax.ranges import whole
from lmm_jax.reduction import Reduction
from lmm_jax.sharding import make_mesh
from lmm_jax.training import start
from lmm_jax.training.loop import Preempted
from lmm_jax.training.state import init_state, make_program
from tests.runs import asked_to_stop, begin


def trained(config, workdir):
    """Three steps of a run until it is asked to stop, and two more of the same."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.update(steps=5, save_every=5, log_every=1)
    with asked_to_stop(3), pytest.raises(Preempted, match="step 3 is saved"):
        lmm.train(config, workdir)
    assert lmm.train(config, workdir)["step"] == 5
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]  # resumed, not begun again
    assert all(np.isfinite(row["loss"]) for row in rows)


def planned(config, workdir):
    """A run's plan, its first pack, and its workdir as it would be before the first step."""
    assert (begin(config, workdir).packs[0]["group"] > 0).any()


def by_default(one, *others):
    """Ways to begin a run, of which the others need --long."""
    return [one, *(pytest.param(other, marks=pytest.mark.long) for other in others)]


def asked(workdir, task="digits", scale=None, data=None):
    """An answer and a score of a run's model; returns the model."""
    model = lmm.load(workdir)
    picture = Image.new("RGB", (24, 24), "red")
    # As many new tokens, and questions at a time, as the evaluation of a mosaic: the same programs do for both.
    new = TASKS[task].MAX_NEW_TOKENS
    answers = model.generate([[picture]] * 5, ["read all"] * 5, scale=scale, max_new_tokens=new)
    assert all(isinstance(answer, str) for answer in answers) and len(set(answers)) == 1
    scales = (scale or max(model.scales),)
    found = lmm.evaluate(model, tasks=(task,), scales=scales, data=data, limit=1)
    assert set(found[task]) == {str(scale) for scale in scales} and len(found[task][str(scales[0])]) >= 2
    return model


def changed(config, change):
    """A copy of a config that `change` was applied to."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        change(config)
    c.check(config)
    return config.lock()


class Patches(nn.Module):
    """An encoder of two linear layers over patches."""

    image_size: int = 24
    patch_size: int = 4
    width: int = 8
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    dtype: str = "float32"

    level_strides, extra_views, inject_blocks, any_shape = (), 0, (), False
    RANGES = {"width": whole(1, 64)}  # noqa: RUF012

    def check(self):
        if self.image_size % self.patch_size:
            raise ValueError("model.vision: image_size is no multiple of patch_size")

    @property
    def side(self):
        return self.image_size

    @property
    def stride(self):
        return self.patch_size

    @property
    def grid(self):
        return self.image_size // self.patch_size

    @nn.compact
    def __call__(self, pixels, extent=None):
        x = space_to_depth(normalise(pixels, self.mean, (0.5,) * 3), self.patch_size)
        x = Dense((self.width,), ("pixels",), ("embed",), True, self.dtype, name="up")(x)
        return (Dense((self.width,), ("embed",), ("mlp",), True, self.dtype, name="down")(nn.gelu(x)),)


def test_an_encoder(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, "patches", Patches)

    def change(config):
        c.use_encoder(config, "patches")
        config.model.vision.mean = (0.25, 0.5, 0.75)

    trained(changed(tiny(recipe="full"), change), tmp_path / "run")
    model = asked(tmp_path / "run")
    assert model.program.model.vision.mean == (0.25, 0.5, 0.75)
    for layout in ("hf", "llava"):
        with pytest.raises(ValueError, match=r"families\.vision='' is no published family.*model\.encoder='patches'"):
            lmm.export(tmp_path / "run", tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


class EveryOther(Reduction):
    """Keeps the first cell of each square window instead of the average of all."""

    def valid(self, side):
        return [m * m for m in range(1, side + 1) if side % m == 0]

    def shape(self, rows, columns, side, scale):
        self.check(side, scale)
        k = side // round(scale**0.5)
        return rows // k, columns // k

    def __call__(self, grids, scale, side):
        h, w = self.shape(*grids.shape[-3:-1], side, scale)
        k = side // round(scale**0.5)
        return grids[..., : h * k : k, : w * k : k, :].reshape(*grids.shape[:-3], h * w, grids.shape[-1])


def test_a_reduction(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(reduction.REDUCTIONS, "every other", EveryOther())
    config = tiny("model.scales=(9,)", recipe="full")
    trained(changed(config, lambda config: config.model.update(reduction="every other")), tmp_path / "run")
    model = asked(tmp_path / "run")
    batch = model.batch([Image.effect_noise((24, 24), 99)], "read all", 9)
    bank, whole = jax.jit(
        lambda params: [
            model.program.model.apply({"params": params}, batch["pixels"], scales=(scale,), method="visual_tokens")[0]
            for scale in (9, 36)
        ]
    )(model.params)
    np.testing.assert_array_equal(bank[0], np.asarray(whole[0]).reshape(6, 6, -1)[::2, ::2].reshape(9, -1))
    with pytest.raises(ValueError, match="model.reduction='every other'"):
        lmm.export(tmp_path / "run", tmp_path / "out")


class Characters(Tokenizer):
    """A character an id, behind three control ids; what is not among the letters is unknown."""

    kind, FILES = "characters", ("characters.txt",)
    bos, eos, unk = 0, 1, 2

    def __init__(self, letters):
        self.letters = letters
        self.vocab_size = 3 + len(letters)

    @property
    def fingerprint(self):
        return f"characters {self.letters}"

    def encode(self, text, prefix=True):
        return [3 + self.letters.find(x) if x in self.letters else self.unk for x in text]

    def markup(self, text):
        head, *rest = text.split("</s>")
        return [x for part in [[head], *([self.eos, part] for part in rest)] for x in part if x != ""]

    def decode(self, ids):
        return "".join(self.letters[i - 3] for i in map(int, ids) if 3 <= i < self.vocab_size)

    def piece(self, i):
        return ["<s>", "</s>", "<unk>"][i] if i < 3 else self.letters[i - 3]

    def save(self, folder):
        (epath.Path(folder) / self.FILES[0]).write_text(self.letters)

    @classmethod
    def load(cls, path):
        path = epath.Path(path)
        return cls((path / cls.FILES[0] if path.is_dir() else path).read_text())


@pytest.fixture
def rows(tmp_path):
    """A JSON file of twelve conversations, and their pictures beside it."""
    rows = []
    for n in range(12):
        Image.new("RGB", (24, 24), (20 * n, 255 - 20 * n, 99)).save(tmp_path / f"{n}.png")
        turns = [{"from": "human", "value": "<image>\nhow red?"}, {"from": "gpt", "value": str(20 * n)}]
        rows.append({"id": str(n), "image": f"{n}.png", "conversations": turns})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


@pytest.mark.parametrize("begun", by_default(planned, trained))
def test_a_tokenizer(tiny, rows, tmp_path, monkeypatch, begun):
    monkeypatch.setitem(TOKENIZERS, "characters", Characters)
    Characters("0123456789abcdefghijklmnopqrstuvwxyz? \n").save(tmp_path)
    folder.prepare_rows(
        rows, None, tmp_path / "data", tmp_path / "characters.txt", template="qa", workers=0, max_refused=0.0
    )
    config = tiny(recipe="full")
    begun(changed(config, lambda config: config.data.update(path=str(tmp_path / "data"))), tmp_path / "run")
    model = asked(tmp_path / "run", data=config.data.path)
    assert type(model.tokenizer) is Characters and model.tokenizer.decode(model.tokenizer.encode("7 red")) == "7 red"
    with pytest.raises(ValueError, match="characters"):
        lmm.export(tmp_path / "run", tmp_path / "out")


# A LLaMA under other names: all that its publisher changed.
ALPACA = dataclasses.replace(
    LLAMA,
    name="alpaca",
    title="Alpaca",
    model_types=("alpaca",),
    architecture="",
    keys=LLAMA.keys | {"width": "d_model"},
    tensors={path: (name.replace("model.", "wool."), kind) for path, (name, kind) in LLAMA.tensors.items()},
    aliases=((r"^language_model\.wool\.", "wool."),),
    prompts={"woolly": dataclasses.replace(LLAMA.prompts["vicuna_v1"], system="Answer woollily.")},
    types="alpaca",
    prompt_rules=(("", "woolly"),),
)


@pytest.mark.parametrize("begun", by_default(planned, trained))
def test_a_family(tiny, tmp_path, monkeypatch, begun):
    """Begun under its name, its weights written as its publisher would, read back, and tuned from there."""
    monkeypatch.setitem(families.DECODERS, "alpaca", ALPACA)

    def change(config):
        c.use_family(config, "alpaca")

    config = changed(tiny(recipe="full"), change)
    begun(config, tmp_path / "run")
    model = asked(tmp_path / "run")
    published = publish(model, tmp_path / "published")
    again = lmm.load(published)
    assert again.program.config.model.families.decoder == "alpaca"
    assert again.program.config.data.template == "woolly"
    ours, theirs = (flatten_dict(m.params, sep="/") for m in (model, again))
    pieces = model.tokenizer.vocab_size
    for path, x in ours.items():
        rows = slice(pieces) if path == "decoder/table" else slice(None)
        rows = (slice(None), slice(pieces)) if path == "decoder/head/kernel" else rows
        np.testing.assert_array_equal(x[rows], theirs[path][rows])
    tuned = changed(config, lambda config: config.init.update(language=str(published)))
    program = make_program(tuned, make_mesh({}, jax.devices()[:1]))
    start.check(program)
    lines = []
    tuning = start.start(program, init_state(program), lines.append)
    assert "loaded" in lines[0]
    np.testing.assert_array_equal(tuning.params["decoder"]["norm"]["scale"], ours["decoder/norm/scale"])
    with pytest.raises(ValueError, match="families.decoder='alpaca': transformers has no class"):
        lmm.export(tmp_path / "run", tmp_path / "out")


def publish(model, path):
    """A folder as the publisher of a LLaVA on Alpaca would write it."""
    config, llava = model.program.config, families.WHOLES["llava"]
    llava = dataclasses.replace(llava, names=(("wool.", "language_model.wool."), *llava.names))
    path.mkdir()
    flat, weights = flatten_dict(jax.device_get(model.params), sep="/"), {}
    for t in tensors(config.model, {name: x.shape for name, x in flat.items()}):
        array = flat[t.path] if t.layer is None else flat[t.path][t.layer]
        weights[transformers_name(t.name, llava)] = t.to_theirs(array)
    save_file(weights, path / "model.safetensors")
    keys = transformers_keys(config, model.tokenizer, llava)
    del keys["lmm_jax_template"]
    (path / "config.json").write_text(json.dumps(keys))
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(config, llava)))
    model.tokenizer.save(path)
    return path


@pytest.mark.parametrize("begun", by_default(planned, trained))
def test_a_task(tiny, tmp_path, monkeypatch, begun):
    """A module with a folder of its own, several right answers, and a score of all answers at once."""
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    (tmp_path / "questions.txt").write_text("is it red?|yes|red\nis it blue?|no|blue")

    def examples(folder, split, limit):
        for line in (folder / f"{split}.txt").read_text().splitlines()[:limit]:
            question, *answers = line.split("|")
            yield Example((str(folder / "red.png"),), question, tuple(answers), "colour")

    def score_all(pairs):
        return {"answered": sum(answer in example.answers for example, answer in pairs) / len(pairs)}

    task = types.SimpleNamespace(
        FILES="questions.txt and pictures",
        SPLIT="questions",
        MAX_NEW_TOKENS=4,
        PROMPT="{question}",
        examples=examples,
        score_all=score_all,
    )
    monkeypatch.setitem(TASKS, "colours", task)
    begun(tiny(recipe="full"), tmp_path / "run")
    model = asked(tmp_path / "run", task="colours", data={"colours": tmp_path})
    red = Answer("red", (), (), "end", 37, 36, 36)
    monkeypatch.setattr(Model, "answers", lambda _, requests: ((request, red) for request in requests))
    found = lmm.evaluate(model, tasks=("colours",), scales=(36,), data={"colours": tmp_path})
    assert found == {"colours": {"36": {"answered": 0.5, "n_colour": 2}}}


@pytest.mark.parametrize("begun", by_default(planned, trained))
def test_a_data_set(tiny, tmp_path, monkeypatch, begun):
    """Squares of one colour: two splits, from a folder that says which colours."""

    def check(source):
        return [] if source and (epath.Path(source) / "colours.txt").exists() else [f"{source} has no colours.txt"]

    def records(source, split, rows):
        colours = (epath.Path(source) / "colours.txt").read_text().split()
        for n in range(rows):
            picture = io.BytesIO()
            Image.new("RGB", (24, 24), colours[n % len(colours)]).save(picture, "png")
            asked = {"role": "user", "text": "<image>\ncolour", "kind": "colour"}
            said = {"role": "assistant", "text": colours[n % len(colours)], "kind": "colour"}
            yield {"id": f"{split}-{n}", "images": [picture.getvalue()], "turns": [asked, said]}

    squares = types.SimpleNamespace(ROWS={"train": 16, "test": 4}, check=check, records=records)
    monkeypatch.setitem(datasets.DATASETS, "squares", squares)
    with pytest.raises(ValueError, match="has no colours.txt"):
        folder.prepare_dataset("squares", tmp_path / "data", source=tmp_path)
    assert not (tmp_path / "data").exists()
    (tmp_path / "colours.txt").write_text("red green blue")
    counts = folder.prepare_dataset("squares", tmp_path / "data", source=tmp_path)
    assert (counts["rows"], counts["images"]) == (20, 20)
    config = tiny(recipe="full")
    begun(changed(config, lambda config: config.data.update(path=str(tmp_path / "data"))), tmp_path / "run")
    model = asked(tmp_path / "run")
    assert architecture(model.program.config).name == "llava"
