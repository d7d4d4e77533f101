"""Every recipe at tiny size: workdir -> folder -> transformers and back, the same numbers everywhere."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors import safe_open

import lmm_jax as lmm
from lmm_jax import sharding
from lmm_jax.config import ConfigError, check, read_config
from lmm_jax.hf.read_config import LoadError
from lmm_jax.release import export as exporter
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.start import start
from lmm_jax.training.state import init_state, make_program
from tests.release.recipes import TOKENIZER, by_default


def pieces(path, x):
    """A parameter without the padding of the vocabulary."""
    x, n = np.asarray(x), TOKENIZER.vocab_size
    return x[:n] if path == "decoder/table" else x[:, :n] if path == "decoder/head/kernel" else x


def same(ours, theirs):
    """Asserts that nested parameters are equal to the bit."""
    ours, theirs = (flatten_dict(jax.device_get(params), sep="/") for params in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert x.dtype == theirs[path].dtype
        np.testing.assert_array_equal(pieces(path, x), pieces(path, theirs[path]), path)


@pytest.mark.parametrize("recipe", by_default("llava", "convllava"))
def test_what_is_exported_loads_to_the_bit(exported, trained, tmp_path, recipe):
    workdir, folder = exported(recipe)
    ours = lmm.load(workdir).params
    same(ours, lmm.load(folder).params)
    lmm.export(workdir, tmp_path / "original", layout="llava")
    same(ours, lmm.load(tmp_path / "original").params)
    for name in (folder, tmp_path / "original"):
        assert "lmm_jax" in (name / "README.md").read_text()


def test_both_dialects_of_transformers_load(exported, transformers, tmp_path):
    """What transformers itself writes: other names, other keys, `dtype` and `rope_parameters`."""
    for recipe in ("m3", "llava_next", "convllava"):
        workdir, folder = exported(recipe)
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
        again = tmp_path / recipe
        model.save_pretrained(again)
        transformers.AutoProcessor.from_pretrained(folder, backend="pil").save_pretrained(again)
        assert not (again / "tokenizer.model").exists()  # so that tokenizer.json is read
        keys = json.loads((again / "config.json").read_text())
        assert "rope_parameters" in keys["text_config"] and "torch_dtype" not in keys
        ours, theirs = lmm.load(workdir), lmm.load(again)
        same(ours.params, theirs.params)
        assert (theirs.tokenizer.kind, theirs.stop) == ("huggingface", ours.stop)
        assert theirs.tokenizer.encode("What is it?") == ours.tokenizer.encode("What is it?")


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("text_config", "rope_parameters", {"rope_type": "longrope", "factor": 8.0}, "rope_type = 'longrope'"),
        ("text_config", "model_type", "gemma2", "model_type = 'gemma2' is not supported, 'phi3' or 'mistral'"),
        ("text_config", "sliding_window", 511, "sliding_window = 511 is not supported where a row has 512 positions"),
        ("vision_config", "model_type", "dinov2", "vision_config.model_type = 'dinov2' is not supported"),
        (None, "vision_feature_layer", [-2, -5], "names several layers"),
        (None, "vision_feature_select_strategy", "full", "vision_feature_select_strategy"),
        (None, "model_type", "paligemma", "model_type 'paligemma' is not supported"),
    ],
)
def test_a_model_of_another_kind_is_refused(exported, tmp_path, where, key, value, message):
    keys = json.loads((exported("llava")[1] / "config.json").read_text())
    (keys[where] if where else keys)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(LoadError, match=message):
        lmm.load(tmp_path)


def test_pipeline_answers(exported, transformers, tmp_path):
    _, folder = exported("llava")
    answer = transformers.pipeline("image-text-to-text", model=str(folder), processor_kwargs={"backend": "pil"})
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    (found,) = answer(text=[{"role": "user", "content": content}], max_new_tokens=4)
    assert isinstance(found["generated_text"][-1]["content"], str)


def test_shards_have_an_index_and_load_as_one(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.safetensors, "SHARD", 40_000)
    workdir = trained("llava")
    files = lmm.export(workdir, tmp_path / "out")["files"]
    assert "model.safetensors.index.json" in files and "model-00002-of-00009.safetensors" in files
    same(lmm.load(workdir).params, lmm.load(tmp_path / "out").params)


@pytest.mark.long
def test_bfloat16_stays_so(trained, tmp_path):
    workdir = trained("llava", "model.dtype=bfloat16")
    lmm.export(workdir, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "np") as f:
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"BF16"}  # noqa: SIM118 - not a dict
    model = lmm.load(tmp_path / "out")
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    again = tmp_path / "again"
    model.save(again)
    lmm.export(again, tmp_path / "twice")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "twice"))
    assert one == two


def test_a_run_starts_from_the_parts_of_others(exported, tmp_path):
    """Tower and decoder each from a folder, on another mesh; what no folder gives stays fresh."""
    workdir, folder = exported("llava")
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    config, lines = read_config(tmp_path / "config.json").copy_and_resolve_references(), []
    config.init.update({"from": "", "vision": str(folder), "language": str(folder)})
    program = make_program(config, sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4]))
    fresh = init_state(program)
    state = start(program, fresh, lines.append)
    sharding.assert_sharded(state.params, program.shardings.params, "parameters")
    taken = lmm.load(folder).params
    same(state.params, taken | {"projector": fresh.params["projector"]})
    assert "init.vision=" in lines[0] and "loaded" in lines[0] and "of the projector part" in lines[0]
    assert "of the language part" not in lines[0] and "init.language=" in lines[1]  # which has it itself
    config.init["from"] = str(workdir)
    with pytest.raises(ConfigError, match="init.from and init.vision, init.language are both set"):
        check(config)


def test_a_router_is_left_out_and_said_so(trained, tmp_path, capsys):
    """Of a run that has one nothing else changes: the folder is that of the run without it."""
    router = ("model.router.width=8", "model.router.heads=2")
    for layout in ("hf", "llava"):
        lmm.export(trained("m3", *router), tmp_path / layout, layout=layout)
        assert "the router of " in capsys.readouterr().err
        assert "has a router" in (tmp_path / layout / "README.md").read_text()
    ours, theirs = lmm.load(trained("m3", *router)).params, lmm.load(tmp_path / "hf").params
    same({name: x for name, x in ours.items() if name != "router"}, theirs)
    same(theirs, lmm.load(tmp_path / "llava").params)


def test_a_model_that_transformers_has_no_place_for_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match="model.projector.depth=3 cannot be exported"):
        lmm.export(trained("llava", "model.projector.depth=3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_original_layout_has_no_words_for_is_refused(trained, tmp_path):
    workdir = trained("deepstack_l", "model.decoder.inject_layers=(0,1,3,2)")
    with pytest.raises(ValueError, match="inject_layers=.* would be"):
        lmm.export(workdir, tmp_path / "out", layout="llava")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_export_leaves_no_folder_and_the_next_one_works(trained, tmp_path, monkeypatch):
    workdir, stream = trained("llava"), Checkpoints.stream_params

    def broken(self, step, abstract):
        for n, item in enumerate(stream(self, step, abstract)):
            if n == 5:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "stream_params", broken)
        with pytest.raises(KeyboardInterrupt):
            lmm.export(workdir, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    (tmp_path / "out.partial").mkdir()  # as a kill leaves it
    lmm.export(workdir, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    with pytest.raises(FileExistsError, match="is there already"):
        lmm.export(workdir, tmp_path / "out")


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    workdir = trained("llava", "seed=3")
    (biggest,) = sorted((workdir / "checkpoints").rglob("d/*"), key=lambda p: p.stat().st_size)[-1:]
    content = bytearray(biggest.read_bytes())
    content[len(content) // 2] ^= 1
    biggest.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint .* (is damaged|cannot be read)"):
        lmm.export(workdir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
