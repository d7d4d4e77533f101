"""What comes back: saved anew by transformers or peft, in the hub's cache, in other types, or not whole."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, read_config
from lmm_jax.hf import load, safetensors
from lmm_jax.hf.read_config import LoadError, read_model_config
from lmm_jax.hf.snapshot import model_folder
from lmm_jax.training.start import check
from lmm_jax.training.state import make_program
from tests.release.test_export import same

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))


def prompt_ids(model):
    """Ids of a prompt with a picture, and the slots of its visual tokens."""
    batch = model.batch([PICTURE], "What is it?")
    return batch["id"].tolist(), batch["slot"].tolist()


def saved_anew(transformers, folder, out, change=lambda model: model):
    """What transformers makes of a folder: model and processor loaded, changed, and saved."""
    remote = {"trust_remote_code": True} if (folder / "modeling_deepstack.py").exists() else {}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, **remote)
    change(model).save_pretrained(out)
    transformers.AutoProcessor.from_pretrained(folder, backend="pil", **remote).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    "recipe",
    ["deepstack_l", *(pytest.param(r, marks=pytest.mark.long) for r in ("llava", "llava_next", "convllava", "m3"))],
)
def test_what_transformers_saves_anew_comes_back_to_the_bit_with_the_same_prompt(
    exported, transformers, tmp_path, recipe
):
    """By default of the code that a folder ships; tensors of the others stand in `test_export`."""
    workdir, folder = exported(recipe)
    ours, again = lmm.load(workdir), lmm.load(saved_anew(transformers, folder, tmp_path / "again"))
    same(ours.params, again.params)
    assert prompt_ids(ours) == prompt_ids(again) and ours.scales == again.scales


@pytest.mark.long
def test_a_lora_that_peft_merged_comes_back(exported, transformers, tmp_path):
    """What was tuned differs, and nothing else."""
    import torch

    peft = pytest.importorskip("peft")

    def tune(model):
        settings = peft.LoraConfig(
            r=2, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False
        )
        torch.manual_seed(0)
        return peft.get_peft_model(model, settings).merge_and_unload()

    _, folder = exported("llava")
    again = saved_anew(transformers, folder, tmp_path / "again", tune)
    before, after = (flatten_dict(jax.device_get(lmm.load(path).params), sep="/") for path in (folder, again))
    others = {path for path in before if not np.array_equal(before[path], after[path])}
    assert others == {"decoder/layers/q/kernel", "decoder/layers/down/kernel"}


@pytest.fixture
def llava(exported, tmp_path):
    """A copy of an exported LLaVA."""
    return shutil.copytree(exported("llava")[1], tmp_path / "llava")


def as_type(folder, kind, said):
    """Stores a folder's weights in another type, and lets its config say one."""
    kind = np.dtype(getattr(ml_dtypes, kind, kind))
    weights = load_file(folder / "model.safetensors")
    save_file({name: x.astype(kind) for name, x in weights.items()}, folder / "model.safetensors")
    keys = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(keys | {"torch_dtype": said}))


@pytest.mark.parametrize(
    ("stored", "said", "held", "computed"),
    [
        ("float16", "float16", "float32", "float32"),
        ("float16", "bfloat16", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float32", "float16", "float32", "float32"),
        ("float64", "float32", "float32", "float32"),
    ],
)
def test_nothing_that_is_stored_is_lost(llava, capsys, stored, said, held, computed):
    as_type(llava, stored, said)
    model = lmm.load(llava)
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {held}
    assert model.program.config.model.dtype == computed
    assert f"stored in {stored}, held in {held}, computed in {computed}" in capsys.readouterr().err
    weights = load_file(llava / "model.safetensors")["language_model.model.norm.weight"]
    np.testing.assert_array_equal(model.params["decoder"]["norm"]["scale"], weights.astype(held))
    assert (f"{stored}, held in {held}" in load.report(model.table)) == (stored != held)
    halved = lmm.load(llava, dtype="bfloat16")
    assert {str(x.dtype) for x in jax.tree.leaves(halved.params)} == {"bfloat16"}
    assert halved.program.config.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"torch_dtype": "int8"}, "torch_dtype = 'int8' is not supported, 'bfloat16' or 'float16'"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"vision_feature_layer": []}, r"vision_feature_layer = \[\] names several layers"),
        ({"vision_feature_layer": [-1, 2]}, "names several layers"),
        ({"vision_feature_layer": 0}, "vision_feature_layer = 0 is no hidden state behind one of the 3 blocks"),
        ({"vision_feature_layer": 4}, "vision_feature_layer = 4 .*1 to 3, or -3 to -1, is supported"),
        ({"vision_feature_layer": True}, "vision_feature_layer = True"),
        (
            {"vision_feature_select_strategy": "full", "vision_config": {"model_type": "dinov2"}},
            "vision_config.model_type = 'dinov2' is not supported",
        ),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": 9}},
            "text_config.sliding_window|sliding_window = 9 is not supported where a row has 131072 positions",
        ),
        ({"text_config": {"rope_scaling": {"factor": 2.0}}}, "rope_scaling = {'factor': 2.0} has no rope_type"),
    ],
)
def test_messages_name_file_key_and_value(llava, keys, message):
    file = llava / "config.json"
    found = json.loads(file.read_text())
    for key, value in keys.items():
        found[key] = found[key] | value if isinstance(value, dict) and key in found else value
    if "text_config" in keys:
        found["text_config"].pop("max_position_embeddings")
    file.write_text(json.dumps(found))
    with pytest.raises(LoadError, match=message) as error:
        lmm.load(llava)
    assert str(file) in str(error.value)


def test_a_window_that_is_no_shorter_than_a_row_is_none(llava):
    """Of a model, whose row is what its folder says, and of a run, whose row is `data.length`."""
    file = llava / "config.json"
    keys = json.loads(file.read_text())
    keys["text_config"] |= {"model_type": "mistral", "sliding_window": 512}
    file.write_text(json.dumps(keys | {"lmm_jax_template": "vicuna_v1"}))
    config = read_model_config(llava)
    assert config.data.length == 512
    load.check_part(llava, "language", config.model, 512)
    with pytest.raises(
        LoadError, match="sliding_window = 512 is not supported where a row has 513 positions.*data.length"
    ):
        load.check_part(llava, "language", config.model, 513)


NEEDED = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.model")


@pytest.mark.parametrize("how", ["gone", "empty"])
@pytest.mark.parametrize("name", NEEDED)
def test_whatever_is_missing_is_said_before_a_weight_is_read(llava, monkeypatch, name, how):
    (llava / "processor_config.json").unlink()
    for other in ("tokenizer.json", "tokenizer_config.json"):
        (llava / other).unlink()
    (llava / name).unlink()
    if how == "empty":
        (llava / name).write_bytes(b"")
    monkeypatch.setattr(safetensors.Folder, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises((ValueError, OSError)) as error:
        lmm.load(llava)
    assert str(llava) in str(error.value) and "\n" not in str(error.value)
    # Of weights any file will do, of a tokenizer one of several kinds.
    assert name in str(error.value) or (how == "gone" and name in ("model.safetensors", "config.json"))


def test_a_shard_that_is_missing_is_said_before_a_weight_is_read(llava, monkeypatch):
    weights = load_file(llava / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
    (llava / "model.safetensors").unlink()
    (llava / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: weights[name] for name in halves["a.safetensors"]}, llava / "a.safetensors")
    monkeypatch.setattr(safetensors.Folder, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match="b.safetensors, which is not there"):
        lmm.load(llava)
    (llava / "b.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="b.safetensors is not a sound safetensors file"):
        lmm.load(llava)


def test_a_folder_without_an_image_processor_is_refused(llava):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (llava / name).unlink()
    with pytest.raises(LoadError, match="neither preprocessor_config.json nor processor_config.json.*copy the file"):
        lmm.load(llava)


def cache(folder, out, hashes=("abc",), main="abc"):
    """A folder as Hugging Face's cache keeps it: blobs, and snapshots that link to them."""
    repo = out / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, repo / "blobs" / str(number))
        for name in hashes:
            (repo / "snapshots" / name).mkdir(parents=True, exist_ok=True)
            (repo / "snapshots" / name / path.name).symlink_to(f"../../blobs/{number}")
    if main:
        (repo / "refs").mkdir()
        (repo / "refs/main").write_text(main)
    return repo


def test_the_hub_s_cache_is_followed_to_its_snapshot(exported, tmp_path, monkeypatch):
    workdir, folder = exported("llava")
    repo = cache(folder, tmp_path / "hub")
    monkeypatch.setenv("HOME", str(tmp_path))
    want = lmm.load(folder).params
    for path in ("~/hub/models--org--name", repo / "snapshots/abc"):
        same(want, lmm.load(path).params)
    config = read_config(workdir / "config.json").copy_and_resolve_references()
    config.init.update({"from": "", "language": str(repo), "vision": "~/hub/models--org--name"})
    check(make_program(config, sharding.make_mesh({}, jax.devices()[:1])))
    (repo / "blobs/elsewhere").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_bytes((folder / "model.safetensors").read_bytes())
    (repo / "snapshots/abc/model.safetensors").unlink()
    (repo / "snapshots/abc/model.safetensors").symlink_to("../../blobs/elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        lmm.load(repo)
    os.remove(tmp_path / "secret")
    with pytest.raises(ValueError, match="model.safetensors is a link to a file that is not there"):
        lmm.load(repo)


@pytest.mark.parametrize(
    ("hashes", "main", "message"),
    [
        (("abc", "def"), "", r"2 snapshots and no .*refs/main; name one of snapshots/: \['abc', 'def'\]"),
        (("abc",), "def", "refs/main names the snapshot 'def', which is not there"),
    ],
)
def test_a_cache_of_which_no_snapshot_is_meant_is_refused(exported, tmp_path, hashes, main, message):
    repo = cache(exported("llava")[1], tmp_path, hashes, main)
    with pytest.raises((ValueError, OSError), match=message):
        lmm.load(repo)
    assert model_folder(cache(exported("llava")[1], tmp_path / "alone", ("def",), "")).name == "def"


def test_the_name_of_a_model_on_the_hub_is_answered_with_how_to_download_it(exported):
    with pytest.raises(FileNotFoundError, match="hf download org/name --local-dir name"):
        lmm.load("org/name")
    config = read_config(exported("llava")[0] / "config.json").copy_and_resolve_references()
    config.init.update({"from": "", "language": "org/name"})
    with pytest.raises(ConfigError, match="init.language=org/name: there is no such folder.*hf download org/name"):
        check(make_program(config, sharding.make_mesh({}, jax.devices()[:1])))
