"""Exports that are not what they should be: refused with the whole list of what does not fit; nothing is loaded."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lmm_jax as lmm
from tests.faults.rows import row
from tests.runs import begin

# Recipes of configs/digits.py and the layout that each is exported to.
EXPORTS = {"m3": "llava", "deepstack": "hf", "full": "hf"}


@pytest.fixture(scope="module")
def exports(tiny, tmp_path_factory):
    """The folder of each export."""
    folders = {}
    for recipe, layout in EXPORTS.items():
        folder = tmp_path_factory.mktemp("exports") / recipe
        begin(tiny(recipe=recipe), folder.with_name(f"{recipe}_run"))
        lmm.export(folder.with_name(f"{recipe}_run"), folder, layout=layout)
        folders[recipe] = folder
    return folders


def read(tensors) -> list[str]:
    """Names of the tensors that are read for certain: of a tower's last layers some are not used."""
    return sorted(name for name in tensors if "layers." in name and "vision" not in name)


def missing(tensors, name, random):
    del tensors[name]
    return [name]


def several_missing(tensors, name, random):
    names = [name, *random.choice(sorted(set(read(tensors)) - {name}), 2, replace=False)]
    for one in names:
        del tensors[one]
    return names


def of_another_shape(tensors, name, random):
    x = tensors[name]
    tensors[name] = np.concatenate([x, x[:1]]) if random.random() < 0.5 else x[None]
    return [name]


def of_integers(tensors, name, random):
    tensors[name] = tensors[name].astype(np.int32)
    return [name]


def swapped(tensors, name, random):
    other = random.choice([n for n in read(tensors) if tensors[n].shape != tensors[name].shape])
    tensors[name], tensors[other] = tensors[other], tensors[name]
    return [name, other]


def not_finite(tensors, name, random):
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[random.integers(tensors[name].size)] = random.choice([np.nan, np.inf])
    return [name]


CHANGES = (missing, several_missing, of_another_shape, of_integers, swapped, not_finite)


def cut(file, random):
    data = file.read_bytes()
    file.write_bytes(data[: random.integers(len(data))])


@row(25, few=3, full=42)
def test_what_does_not_fit_is_listed_and_nothing_is_loaded(trials, exports, tmp_path):
    """Each change of three exports in turn; every seventh trial cuts the file off."""

    def check(number):
        random, recipe = trials.random(number), list(exports)[number % len(exports)]
        change = (*CHANGES, cut)[number // len(exports) % (len(CHANGES) + 1)]
        folder = tmp_path / str(number)
        shutil.copytree(exports[recipe], folder)
        file = folder / "model.safetensors"
        if change is cut:
            cut(file, random)
            named = ["model.safetensors"]
        else:
            tensors = load_file(file)
            named = change(tensors, random.choice(read(tensors)), random)
            save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, file)
        try:
            lmm.load(folder)
        except (ValueError, OSError) as error:
            told = str(error)
        else:
            raise AssertionError(f"{recipe}, {change.__name__} {named}: it was loaded")
        ends = [
            name.rpartition("layers.")[2] for name in named
        ]  # layouts have other prefixes, which the list may give
        assert all(name in told for name in ends), f"{recipe}, {change.__name__} {named}: {told[:500]}"
        return f"{recipe}, {change.__name__.replace('_', ' ')}"

    trials.each(check)
