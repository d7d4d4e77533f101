"""Many questions as one queue, answered as they come, and a run of them that goes on."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from lmm_jax.asking.ask import _identity, ask_many, ask_one, check_all
from lmm_jax.asking.questions import read_questions
from lmm_jax.data.prepared import Prepared, as_pictures
from lmm_jax.generation.model import Model


@pytest.fixture(scope="module")
def model(setup, digits_folder):
    """The digits' model with its first values."""
    s = setup(1)
    return Model(s.program, s.state.params, Prepared(digits_folder, "train").tokenizer)


@pytest.fixture(scope="module")
def folder(digits_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("asks")
    data = Prepared(digits_folder, "test")
    for row in range(3):
        as_pictures(data[row])[0].save(path / f"{row}.png")
    (path / "damaged.png").write_bytes((path / "0.png").read_bytes()[:-60])  # its header is sound
    return path


ASKED = [
    {"prompt": "read all", "image": "0.png", "scale": 4, "max_new_tokens": 3},
    {"prompt": "digit at b2?", "images": ["1.png", "2.png"], "scale": 9, "max_new_tokens": 5},
    {"id": "words", "messages": [{"role": "user", "content": "how many?"}], "temperature": 1.0, "max_new_tokens": 4},
]


def test_an_answer_at_a_chosen_scale_depends_on_how_it_was_chosen(model, folder, monkeypatch):
    chooses, fixed = questions(folder, [{"prompt": "a", "scale": "auto"}, {"prompt": "a", "scale": 9}])
    told = []
    for name in ("one", "two"):
        monkeypatch.setattr(model, "auto", types.SimpleNamespace(identity=name))
        told.append([_identity(model, question) for question in (chooses, fixed)])
    assert told[0][0] != told[1][0] and told[0][1] == told[1][1] == model.identity


def questions(folder, asked=ASKED, name="asks.jsonl", **options):
    (folder / name).write_text("\n".join(map(json.dumps, asked)))
    return read_questions(folder / name, options={"seed": 5, **options})


def lines(path):
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_answers_are_those_of_generate(model, folder, tmp_path, capsys):
    result = ask_many(model, questions(folder), tmp_path / "out.jsonl", verbose=True)
    found = lines(tmp_path / "out.jsonl")
    assert found[1]["text"] == model.generate(str(folder / "0.png"), "read all", 4, 3)
    pictures = [str(folder / "1.png"), str(folder / "2.png")]
    assert found[2]["text"] == model.generate(pictures, "digit at b2?", 9, 5)
    assert found["words"]["text"] == model.generate(None, "how many?", None, 4, temperature=1.0, seed=5 + 2)
    assert [found[id]["visual_tokens"] for id in found] == [{1: 4, 2: 18, "words": 0}[id] for id in found]
    assert found[2]["images"] == ["1.png", "2.png"] and found["words"]["messages"] == ASKED[2]["messages"]
    assert result["answers"] == 3 and result["refused"] == result["kept"] == 0 and result["visual_tokens"] == 22
    err = capsys.readouterr().err
    assert "3 answers in" in err and "22 visual tokens" in err and "decode" in err


def test_a_run_that_was_killed_goes_on_behind_what_is_there(model, folder, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    ask_many(model, questions(folder), whole)
    first, second, _ = whole.read_text().splitlines(keepends=True)
    out.write_text(first + second[:20])
    asked = []
    ask = model.request
    monkeypatch.setattr(
        model, "request", lambda images, prompt, **options: asked.append(prompt) or ask(images, prompt, **options)
    )
    assert ask_many(model, questions(folder), out)["kept"] == 1
    assert lines(out) == lines(whole) and out.read_text().startswith(first)
    assert len(out.read_text().splitlines()) == 3 and len(set(map(str, asked))) == 2
    before = out.read_bytes()
    capsys.readouterr()
    assert ask_many(model, questions(folder), out)["kept"] == 3 and out.read_bytes() == before
    assert capsys.readouterr().out == f"{out}: 3 answers, 3 of them from before\n"


def test_answers_to_others_or_of_another_model_are_not_taken(model, folder, tmp_path, setup):
    out = tmp_path / "out.jsonl"
    ask_many(model, questions(folder, ASKED[:1]), out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="line 1: 1 was asked otherwise"):
        ask_many(model, questions(folder, ASKED[:1], temperature=1.0), out)
    params = {**model.params, "projector": {**model.params["projector"]}}
    name, leaf = next(iter(params["projector"].items()))
    params["projector"][name] = (
        {k: v.at[(0,) * v.ndim].add(1) for k, v in leaf.items()}
        if isinstance(leaf, dict)
        else leaf.at[(0,) * leaf.ndim].add(1)
    )
    with pytest.raises(ValueError, match="line 1: 1 was asked otherwise"):
        ask_many(Model(model.program, params, model.tokenizer), questions(folder, ASKED[:1]), out)
    assert out.read_bytes() == before


def test_a_bad_question_is_told_before_any_is_answered_or_in_the_place_of_its_answer(model, folder, tmp_path):
    out = tmp_path / "out.jsonl"
    bad = {
        "asks.jsonl, line 2: no question": {"image": "0.png"},
        "asks.jsonl, line 2: prompt takes .* positions": {"prompt": "how many? " * 200},
        r"asks.jsonl, line 2: scale=7: .* valid scales are \[1, 4, 9, 36\]": {"prompt": "x", "scale": 7},
        r"asks.jsonl, line 2: stop=99999 .*: ids of this tokenizer are": {"prompt": "x", "stop": 99999},
    }
    for message, line in bad.items():
        asked = [ASKED[0], line]
        with pytest.raises(ValueError, match=message):
            ask_many(model, questions(folder, asked), out)
        assert not out.exists()
        result = ask_many(model, questions(folder, asked), out, skip_bad=True)
        assert (result["answers"], result["refused"]) == (1, 1)
        assert lines(out)[1]["text"] and set(lines(out)[2]) == {"id", "error"}
        result = ask_many(model, questions(folder, ASKED[:2]), out)  # it was mended
        assert (result["answers"], result["kept"]) == (2, 1) and "text" in lines(out)[2]
        assert len(out.read_text().splitlines()) == 2
        out.unlink()
    with pytest.raises(ValueError, match="line 2: no question"):
        check_all(None, questions(folder, [ASKED[0], {"image": "0.png"}]), skip_bad=False)


def test_a_damaged_picture_ends_its_question_alone(model, folder, tmp_path):
    out, asked = tmp_path / "out.jsonl", [{"prompt": "read all", "image": "damaged.png"}, *ASKED]
    with pytest.raises(ValueError, match="asks.jsonl, line 1: .*damaged.png.*; --skip-bad goes on without it"):
        ask_many(model, questions(folder, asked), out)
    result = ask_many(model, questions(folder, asked), out, skip_bad=True)
    assert (result["answers"], result["refused"]) == (3, 1) and "damaged.png" in lines(out)[1]["error"]


def test_without_a_file_answers_are_printed(model, folder, capsys):
    ask_many(model, questions(folder, ASKED[:2]))
    found = {line["id"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found.keys() == {1, 2} and found[1]["images"] == ["0.png"]


def test_one_answer_is_shown_as_it_comes_or_at_its_end(model, folder, capsys):
    picture = Image.fromarray(np.asarray(Image.open(folder / "0.png")))
    text = model.generate(picture, "read all", 4, 12)
    for streams in (True, False):
        result = ask_one(model, [picture], "read all", {"scale": 4, "max_new_tokens": 12}, streams, verbose=streams)
        out, err = capsys.readouterr()
        assert out == f"{text}\n" and result["text"] == text and result["visual_tokens"] == result["scale"] == 4
        assert bool(err) == streams
        assert {"seconds", "tokens", "reason", "prompt_positions", "first_token_seconds"} <= result.keys()
    with pytest.raises(ValueError, match="for a model that has learned to choose"):
        ask_one(model, [picture], "read all", {"scale": "auto"}, False, False)
