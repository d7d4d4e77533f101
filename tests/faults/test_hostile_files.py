"""Files that somebody else made to do harm: refused by a sentence, soon, and nothing of them is run."""

import json
import pathlib
import shutil
import sys
import time

import pytest

import lmm_jax as lmm
from lmm_jax.config import base, read_config, save_config
from lmm_jax.data.images import image_size, open_picture
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import Prepared
from lmm_jax.data.tokenizer.sentencepiece import train_tokenizer
from tests.faults import hostile
from tests.faults.rows import row
from tests.release.recipes import LINES

MOST_SECONDS = 5.0  # of a refusal, on a machine that does other things too


@pytest.fixture(scope="module")
def sound(golden, tmp_path_factory):
    """Folders that load as they are: a model, a run's config, prepared rows."""
    folder = tmp_path_factory.mktemp("sound")
    about = json.loads((golden / "m3/config.json").read_text())
    keys = about["text"] | about["mm"] | {"matryoshka_vis_token_scale": about["scales"], "mm_vision_tower": "tower"}
    keys |= {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "image_aspect_ratio": "pad"}
    (folder / "model/tower").mkdir(parents=True)
    (folder / "model/config.json").write_text(json.dumps(keys))
    (folder / "model/tower/config.json").write_text(json.dumps(about["vision"] | {"model_type": "clip_vision_model"}))
    shutil.copyfile(golden / "m3/weights.safetensors", folder / "model/model.safetensors")
    (folder / "model/tokenizer.model").write_bytes(train_tokenizer(LINES, 120))
    (folder / "run").mkdir()
    save_config(base(), folder / "run/config.json")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (folder / "rows.json").write_text(json.dumps([{"id": f"r{n}", "messages": turns} for n in range(3)]))
    prepare_rows(folder / "rows.json", None, folder / "prepared", workers=0)
    assert lmm.load(folder / "model") and read_config(folder / "run/config.json")
    assert len(Prepared(folder / "prepared", "train")) == 3
    return folder


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """The file that appears if anything of a hostile folder runs."""
    touched, modules = tmp_path / "touched", tmp_path / "modules"
    modules.mkdir()
    (modules / "canary.py").write_text("import os, pathlib\npathlib.Path(os.environ['CANARY']).touch()\n")
    monkeypatch.setenv(hostile.CANARY, str(touched))
    monkeypatch.syspath_prepend(modules)
    yield touched
    sys.modules.pop("canary", None)


def load_and_ask(folder):
    """A model with pieces behind its table loads, and says so; what has them is refused."""
    lmm.load(folder).generate(prompt="<x>", max_new_tokens=1)


def refused(trials, sound, canary, tmp_path, cases, kind, read):
    """Every trial is a case: refused in a sentence, in time, with nothing run and nothing outside changed."""

    def check(number):
        name, change = list(cases.items())[number]
        outside, folder = tmp_path / str(number) / "outside", tmp_path / str(number) / kind
        outside.mkdir(parents=True)
        shutil.copytree(sound / kind, folder)
        shutil.copyfile(sound / "model/model.safetensors", outside / "model.safetensors")
        change(folder)
        before, begin = sorted(outside.rglob("*")), time.monotonic()
        try:
            read(folder)
        except (ValueError, OSError) as error:
            assert str(error).strip() and not isinstance(error, UnicodeError), f"{name}: {error!r}"
        else:
            raise AssertionError(f"{name}: it was taken")
        assert time.monotonic() - begin < MOST_SECONDS, f"{name}: it took too long"
        assert not canary.exists() and "canary" not in sys.modules, f"{name}: it was run"
        assert sorted(outside.rglob("*")) == before, f"{name}: something outside has changed"
        return name

    trials.each(check)


@row(26, few=len(hostile.MODELS), full=len(hostile.MODELS))
def test_a_hostile_model_is_refused(trials, sound, canary, tmp_path):
    refused(trials, sound, canary, tmp_path, hostile.MODELS, "model", load_and_ask)


@row(26, few=len(hostile.WORKDIRS), full=len(hostile.WORKDIRS))
def test_a_hostile_workdir_is_refused(trials, sound, canary, tmp_path):
    refused(
        trials, sound, canary, tmp_path, hostile.WORKDIRS, "run", lambda folder: read_config(folder / "config.json")
    )


@row(26, few=len(hostile.PREPARED), full=len(hostile.PREPARED))
def test_a_hostile_prepared_folder_is_refused(trials, sound, canary, tmp_path):
    refused(trials, sound, canary, tmp_path, hostile.PREPARED, "prepared", lambda folder: Prepared(folder, "train"))


@row(26, few=len(hostile.PICTURES), full=len(hostile.PICTURES))
def test_a_hostile_picture_is_refused(trials, canary, tmp_path):
    def check(number):
        name, data = list(hostile.PICTURES.items())[number]
        path = tmp_path / f"{number}.png"
        path.write_bytes(data)
        for picture in (data, path):
            begin = time.monotonic()
            with pytest.raises(ValueError, match="cannot read a picture from"):
                open_picture(picture)
            assert time.monotonic() - begin < 2.0, f"{name}: it took too long"
        return name

    trials.each(check)
    for device in ("/dev/zero", "/dev/stdin"):
        if pathlib.Path(device).exists() and not pathlib.Path(device).is_file():
            with pytest.raises(ValueError, match="no file but"):
                image_size(device)
    assert not canary.exists()


def test_there_are_a_hundred_hostile_files_and_twenty_workdirs():
    assert len(hostile.MODELS) + len(hostile.PREPARED) + len(hostile.PICTURES) >= 100
    assert len(hostile.WORKDIRS) >= 20
