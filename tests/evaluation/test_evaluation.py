"""Scores, and evaluation from a workdir on another mesh."""

import pathlib

import numpy as np
import pytest

import lmm_jax as lmm
from lmm_jax import evaluation
from lmm_jax.config import ConfigError
from lmm_jax.data.prepare.datasets.digits import KINDS
from lmm_jax.evaluation.tasks import Example, digits, pages

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    lmm.train(tiny("train.steps=3", "mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2"), folder)
    return folder


@pytest.fixture(scope="module")
def model(workdir):
    return lmm.load(workdir)


def test_scores():
    def score(kind, truth, answer):
        return digits.score(Example((), "", truth, kind), answer)

    assert score("cell", "7", "7") == score("exists", "no", " no ") == 1.0
    assert score("cell", "7", "77") == score("count", "1", "") == 0.0
    assert score("read", "1 2 3 4", "1 2 3 4") == 1.0
    assert score("read", "1 2 3 4", "1 9 3") == 0.5
    assert score("read", "1 2 3 4", "0 1 2 3 4") == 0.0


def test_each_test_picture_is_asked_each_kind_once(digits_folder):
    found = list(digits.examples(digits_folder))
    assert {kind: sum(e.kind == kind for e in found) for kind in KINDS} == dict.fromkeys(KINDS, 16)
    assert not any("<image>" in e.question for e in found)
    assert len(list(digits.examples(digits_folder, limit=2))) == 10


def test_each_test_page_is_asked_a_cell_a_line_and_the_whole(pages_folder):
    found = list(pages.examples(pages_folder))
    assert all({e.kind for e in found[n : n + 3]} == {"cell", "line", "read"} for n in range(0, 48, 3))
    assert {(e.kind, len(e.answer.split())) for e in found} == {("cell", 1), ("line", 4), ("read", 16)}
    assert {e.question for e in found if e.kind == "read"} == {"read all"}
    cell, _, whole = sorted(found[:3], key=lambda e: e.kind)
    assert [pages.score(cell, answer) for answer in (cell.answer, "", whole.answer)] == [1.0, 0.0, 0.0]
    assert pages.score(whole, whole.answer[:8]) == 0.25


def test_evaluate_gives_every_kind_at_every_scale(model):
    results = evaluation.evaluate(model, ("digits",), scales=(1, 9), limit=4)
    assert list(results) == ["digits"] and list(results["digits"]) == ["1", "9"]
    values = results["digits"]["9"]
    assert {"cell", "count", "exists", "largest", "read", "n_read"} <= set(values) and values["n_read"] == 4
    assert all(0 <= values[k] <= 1 for k in ("cell", "read"))
    assert "digits tokens" in evaluation.table(results)
    with pytest.raises(ConfigError, match="task 'vqa' does not exist; choose from digits, pages"):
        evaluation.evaluate(model, ("vqa",))


def test_generate_takes_one_or_many_and_any_scale(model, digits_folder):
    pictures = [e.images[0] for e in digits.examples(digits_folder, 3) if e.kind == "read"]
    one = model.generate(images=[pictures[0]], prompt="read all", scale=9, max_new_tokens=5)
    assert isinstance(one, str)
    many = model.generate(
        images=[[p] for p in pictures], prompt=["read all"] * 3, scale=9, max_new_tokens=5, batch_size=2
    )
    assert len(many) == 3 and many[0] == one
    with pytest.raises(ValueError, match=r"16 tokens do not tile a 6×6 grid; valid scales are \[1, 4, 9, 36\]"):
        model.generate(images=[pictures[0]], prompt="read all", scale=16)
    with pytest.raises(ValueError, match="2 <image> tags in the text, 1 pictures"):
        model.generate(images=[pictures[0]], prompt="<image> <image> read all")
    assert isinstance(model.generate(prompt="how many?", max_new_tokens=2), str)  # text alone


def test_answers_do_not_depend_on_their_batch(model, digits_folder):
    examples = [e for e in digits.examples(digits_folder) if e.kind in ("cell", "line", "read")]
    together = model.generate([e.images for e in examples], [e.question for e in examples], 4, 6)
    apart = [model.generate(e.images, e.question, 4, 6) for e in examples[:4]]
    assert together[:4] == apart


def test_loading_reads_what_was_trained(workdir, model, tiny):
    assert model.scales == (1, 4, 9, 36)
    assert np.isfinite(model.params["decoder"]["table"]).all()
    with pytest.raises(FileNotFoundError, match="neither a workdir"):
        lmm.load(workdir / "nothing")
