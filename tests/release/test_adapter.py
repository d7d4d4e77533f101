"""Adapters out to PEFT and back in: a folder of ours in PEFT, one of PEFT's here, the same logits."""

import functools
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, read_config, save_config
from lmm_jax.hf import peft as ours
from lmm_jax.hf.read_config import LoadError
from lmm_jax.hf.write_config import architecture
from lmm_jax.release.verify import _logits_of
from lmm_jax.training import adapters, start
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.state import abstract_params, init_state, make_program
from tests.release.recipes import CONFIGS, DECODER, RECIPES, TOKENIZER

PATHS = ("decoder/layers", "projector", "vision/blocks_*")
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """`adapted(recipe, paths, base)`: a workdir whose adapters do something, beside the base that it began with."""

    @functools.cache
    def make(recipe="llava", paths=PATHS, base=None):
        workdir = tmp_path_factory.mktemp("adapted")
        config = read_config(trained(recipe) / "config.json").copy_and_resolve_references()
        with config.unlocked():
            config.lora.update(rank=4, alpha=6.0, paths=paths)
            parts = {"from": str(trained(recipe))}
            if base is not None:
                parts = dict.fromkeys(("vision", "language", "projector"), str(base))
            config.init.update({"from": None} | parts)
            config.init.new = ()
            config.optimizer.groups = ()
        program = make_program(config, sharding.make_mesh({"fsdp": 2}, jax.devices()[:2]))
        state, left = start.begin(program, init_state(program), lambda _: None)
        params, rng = flatten_dict(state.params, sep="/"), np.random.default_rng(1)
        for path, x in params.items():
            if path.endswith(adapters.B):
                params[path] = jax.device_put(rng.normal(0, 0.1, x.shape).astype(np.float32), x.sharding)
        save_config(config, workdir / "config.json")
        TOKENIZER.save(workdir)
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(state.replace(params=unflatten_dict(params, sep="/")), {}, left)
        return workdir

    return make


def flat(model):
    return {path: np.asarray(x) for path, x in flatten_dict(jax.device_get(model.params), sep="/").items()}


def near(first, second, most=1e-6):
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    for path, x in first.items():
        rows = slice(TOKENIZER.vocab_size) if path == "decoder/table" else slice(None)
        columns = (..., slice(TOKENIZER.vocab_size)) if path == "decoder/head/kernel" else rows
        np.testing.assert_allclose(x[columns], second[path][columns], atol=most, err_msg=path)


def logits_of_both(model, theirs, folder, transformers):
    """Ours and theirs `[T, vocabulary]` of one question about a picture."""
    import torch

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    processor = transformers.AutoProcessor.from_pretrained(str(folder), backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[picture], text=prompt, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs).logits[0, :, : TOKENIZER.vocab_size].numpy()
    batch = model.batch([picture], QUESTION)
    return _logits_of(model)(batch)[: len(found), : TOKENIZER.vocab_size], found


@pytest.mark.long
def test_a_checkpoint_holds_adapters_alone_and_merges_alike_everywhere(adapted, exported, tmp_path):
    workdir, base = adapted(), lmm.load(exported("llava")[0])
    merged = lmm.load(workdir)
    assert max(np.abs(x - flat(base)[path]).max() for path, x in flat(merged).items()) > 1e-3
    lmm.export(workdir, tmp_path / "merged")
    near(merged, lmm.load(tmp_path / "merged"))
    near(merged, lmm.load(adapted(base=exported("llava")[1])))  # whose base is read from a model's folder
    lmm.export(adapted(base=exported("llava")[1]), tmp_path / "again")
    near(merged, lmm.load(tmp_path / "again"))


@pytest.mark.long
def test_peft_loads_our_adapters(adapted, exported, transformers, tmp_path):
    peft = pytest.importorskip("peft")
    workdir, (_, folder) = adapted(), exported("llava")
    found = lmm.export(workdir, tmp_path / "adapter", adapter=True)
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    count = sum(".lora_A." in name for name, _ in theirs.named_parameters())
    assert count == 4 * 7 + 3 * 6 + 2  # decoder, the blocks that are read, projector
    here, there = logits_of_both(lmm.load(workdir), theirs, folder, transformers)
    np.testing.assert_allclose(here, there, atol=1e-4)
    plain, _ = logits_of_both(lmm.load(folder), theirs, folder, transformers)
    assert np.abs(plain - there).max() > 1e-2
    near(lmm.load(workdir), lmm.load(folder, adapter=tmp_path / "adapter"))
    with pytest.raises(FileExistsError):
        lmm.export(workdir, tmp_path / "adapter", adapter=True)


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_we_load_peft_s_adapters(exported, transformers, tmp_path, options):
    peft = pytest.importorskip("peft")
    import torch

    workdir, folder = exported("llava")
    base = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    modules = ["q_proj", "v_proj", "down_proj", "linear_1"]  # of the tower too, with its block that is not read
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, **options)).eval()
    torch.manual_seed(0)
    for name, x in theirs.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(x, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    here, there = logits_of_both(lmm.load(folder, adapter=tmp_path / "adapter"), theirs, folder, transformers)
    np.testing.assert_allclose(here, there, atol=1e-4)
    near(lmm.load(workdir, adapter=tmp_path / "adapter"), lmm.load(folder, adapter=tmp_path / "adapter"))

    config = read_config(workdir / "config.json").copy_and_resolve_references()
    paths = ("decoder/layers/q", "decoder/layers/v", "decoder/layers/down", "projector/linear_0", "vision/blocks_0/q")
    with config.unlocked():
        config.lora.update(rank=4, alpha=12.0 if options else 6.0, paths=(*paths, "vision/blocks_0/v"))
        config.init.update({"from": str(workdir), "lora": str(tmp_path / "adapter"), "new": ()})
        config.optimizer.groups = ()
    program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    state, _ = start.begin(program, init_state(program), lambda _: None)
    plain = make_program(adapters.plain_config(config), program.mesh)
    found = flatten_dict(adapters.merge(state.params, plain.shardings.params), sep="/")
    for path, x in flat(lmm.load(workdir, adapter=tmp_path / "adapter")).items():
        np.testing.assert_allclose(x, found[path], atol=1e-6, err_msg=path)  # merged on other devices
    with config.unlocked():
        config.lora.alpha = 5.0
    with pytest.raises(ConfigError, match=r"its adapters are scaled by (6|12) / 4, those of this run by 5 / 4"):
        start.check(make_program(config, program.mesh))
    with config.unlocked():
        config.lora.paths = paths
    with pytest.raises(ConfigError, match=r"adapts other layers than lora.paths: vision/blocks_0/v there alone"):
        start.check(make_program(config, program.mesh))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of adapters on all linear layers of the decoder, and how to read it after a change of its config."""
    folder, (file, small, _) = tmp_path_factory.mktemp("written"), RECIPES["llava"]
    config = lmm.load_config(f"{CONFIGS}/{file}", *small, *DECODER)
    program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    shapes = {path: x.shape for path, x in flatten_dict(abstract_params(program), sep="/").items()}
    layers = [f"decoder/layers/{name}" for name in ("q", "o", "up")]
    found, whole = {}, architecture(config)
    for module, _, _, (outputs, inputs) in ours.modules(config.model, whole, shapes, layers):
        found[ours.tensor_name(module, "A")] = np.ones((4, inputs), np.float32)
        found[ours.tensor_name(module, "B")] = np.ones((outputs, 4), np.float32)
    save_file(found, folder / ours.WEIGHTS)
    with config.unlocked():
        config.lora.rank = 4
    keys = ours.config_keys(config.lora, 6.0, ["q_proj"], None)

    def read(folder=folder, **changed):
        (folder / ours.CONFIG).write_text(json.dumps(keys | changed))
        return ours.adapter_fields(folder, config.model, shapes)

    assert read() == {"rank": 4, "alpha": 6.0, "paths": tuple(sorted(layers))}
    return folder, read


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "all"),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["multi_modal_projector"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("layers_to_transform", [0, 1]),
        ("trainable_token_indices", [3]),
        ("lora_bias", True),
        ("init_lora_weights", "pissa"),
        ("alora_invocation_tokens", [1]),
        ("a_key_of_tomorrow", "on"),
        ("r", 0),
        ("lora_alpha", "much"),
    ],
)
def test_what_we_do_not_reproduce_is_refused_by_file_key_and_value(written, key, value):
    folder, read = written
    with pytest.raises(LoadError) as refused:
        read(**{key: value})
    assert str(folder / ours.CONFIG) in str(refused.value) and f"{key} = {value!r}" in str(refused.value)


def test_tensors_of_another_kind_are_refused_by_name(written, tmp_path):
    folder, read = written
    for change, message in (
        (lambda x: x.pop(next(n for n in x if ".layers.2." in n)), r"has no lora_A for layers \[2\] of 4"),
        (lambda x: x.update({"base_model.model.lm_head.weight": np.zeros(3, "f")}), "is no part of a plain adapter"),
        (lambda x: x.update({next(iter(x)): np.zeros((3, 5), "f")}), "expected .* for r = 4"),
        (
            lambda x: x.update({"base_model.model.a.b.lora_A.weight": np.zeros((4, 5), "f")}),
            "adapts no layer",
        ),
        (lambda x: x.clear(), "holds no adapter"),
    ):
        other = tmp_path / "other"
        shutil.copytree(folder, other, dirs_exist_ok=True)
        found = load_file(folder / ours.WEIGHTS)
        change(found)
        save_file(found, other / ours.WEIGHTS)
        with pytest.raises(LoadError, match=message):
            read(other)


@pytest.mark.long
def test_what_a_folder_of_adapters_cannot_hold_is_refused(adapted, trained, tmp_path):
    with pytest.raises(ValueError, match=r"trained no adapters \(lora.rank=0\)"):
        lmm.export(trained("llava"), tmp_path / "out", adapter=True)
    with pytest.raises(ValueError, match="vision/patches is no linear layer of its own in LlavaForConditional"):
        lmm.export(adapted("llava", ("vision",)), tmp_path / "out", adapter=True)
    with pytest.raises(ValueError, match="leave these out"):
        lmm.export(adapted(), tmp_path / "out", layout="llava", adapter=True)
    assert not (tmp_path / "out").exists()
