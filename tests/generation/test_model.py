"""A model answers: one prompt or many, at any scale, the same in any batch and after it was saved and loaded."""

import dataclasses
import types

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

import lmm_jax as lmm
from lmm_jax import free_memory
from lmm_jax.data.prepared import Prepared, as_pictures
from lmm_jax.generation.auto import CASCADE, Auto, Way
from lmm_jax.generation.model import Model
from lmm_jax.training.checkpoint import Checkpoints

QUESTIONS = ("read all", "digit at b2?", "how many 7s are there?")


@pytest.fixture(scope="module")
def model(setup, digits_folder):
    """The digits' model with its first values."""
    s = setup(1)
    return Model(s.program, s.state.params, Prepared(digits_folder, "train").tokenizer)


@pytest.fixture(scope="module")
def pictures(digits_folder):
    data = Prepared(digits_folder, "test")
    return [as_pictures(data[row])[0] for row in range(6)]


def test_generate_takes_one_or_many_and_any_scale(model, pictures):
    one = model.generate(images=[pictures[0]], prompt="read all", scale=9, max_new_tokens=5)
    assert isinstance(one, str) and one
    many = model.generate(
        images=[[p] for p in pictures[:3]], prompt=["read all"] * 3, scale=9, max_new_tokens=5, batch_size=2
    )
    assert len(many) == 3 and many[0] == one
    with pytest.raises(ValueError, match=r"16 tokens do not tile a 6×6 grid; valid scales are \[1, 4, 9, 36\]"):
        model.generate(images=[pictures[0]], prompt="read all", scale=16)
    with pytest.raises(ValueError, match="2 <image> tags in the text, 1 pictures"):
        model.generate(images=[pictures[0]], prompt="<image> <image> read all")
    assert isinstance(model.generate(prompt="how many?", max_new_tokens=2), str)  # text alone


def test_answers_do_not_depend_on_their_batch(model, pictures):
    """Prompts of several lengths, with one picture, two or none."""
    asked = [([p], question) for p, question in zip(pictures, QUESTIONS, strict=False)]
    asked += [([pictures[3]], "digit <image> at a1?"), (pictures[4:6], "alike?"), ([], "how many?")]
    images, prompts = map(list, zip(*asked, strict=True))
    together = model.generate_ids(images, prompts, 4, 6)
    assert together == [model.generate_ids([of], [prompt], 4, 6)[0] for of, prompt in asked]
    assert len({tuple(ids) for ids in together}) > 1


def test_the_positions_of_pictures_are_counted_as_they_stand_in_the_prompt(model, pictures):
    for scale in (1, 4, 9, 36):
        batch = model.batch(pictures[:2], "<image> and <image>", scale)
        assert (batch["slot"] >= 0).sum() == model.visual_tokens(pictures[:2], scale) == 2 * scale
    assert model.visual_tokens(pictures[:1]) == 36  # of the largest scale that was trained


def test_a_model_loads_in_another_dtype_and_with_another_layout_of_its_prompts(model, pictures, tmp_path):
    model.save(tmp_path / "run")
    half = lmm.load(tmp_path / "run", "bfloat16", "mistral")
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert half.program.model.decoder.dtype == "bfloat16" and half.program.config.data.template == "mistral"
    assert isinstance(half.generate(pictures[0], "read all", 9, 3), str)
    for wrong in ({"dtype": "int8"}, {"template": "nothing"}, {"template": "chatml"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
            lmm.load(tmp_path / "run", **wrong)


def test_what_is_saved_loads_to_the_bit_and_answers_alike(model, pictures, tmp_path):
    model.save(tmp_path / "saved")
    again = lmm.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(model.params), jax.device_get(again.params))
    assert again.scales == model.scales == (1, 4, 9, 36) and again.engine.end == model.engine.end
    asked = [[p] for p in pictures[:2]], ["read all"] * 2
    assert again.generate_ids(*asked, 9, 5) == model.generate_ids(*asked, 9, 5)
    with pytest.raises(FileNotFoundError, match="neither a workdir"):
        lmm.load(tmp_path / "nothing")


@pytest.fixture
def unasked(model, monkeypatch):
    """The model, which must not run."""

    def never(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(model.engine.programs, "decode", never)
    return model


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", (None, 5, b"text", "", " ", [5], [{"role": "bot", "content": "x"}], "<image> <image> <image>")),
        ("images", (5, True, "nothere.png", ["nothere.png"], [[]], [5], np.zeros((4, 4, 3), np.uint8), "", b"no")),
        ("scale", ("9", "auto", True, 0, -1, 2.5, 16, 10**9, (9,), np.nan, [9])),
        ("temperature", (-1, np.nan, np.inf, "1", True, [1.0], None)),
        ("top_k", (-1, 2.5, "9", True, [3])),
        ("top_p", (0, -1, 1.5, np.nan, "1", [0.5])),
        ("repetition_penalty", (0, -1, np.inf, "1", None)),
        ("seed", (-1, 2.5, 2**32, "9", None)),
        ("stop", ("", 5.5, {}, ["a", ""], -1, 10**6, b"x")),
        ("return_logprobs", (None, 1, "yes")),
        ("max_new_tokens", (0, -1, True, 2.5, "9", 10**9, [3], (), np.inf)),
        ("batch_size", (0, -1, True, 2.5, "9", [3])),
        ("truncate", (None, 1, "yes")),
    ],
)
def test_an_argument_that_cannot_be_used_is_named_before_the_model_runs(unasked, pictures, name, values):
    good = {"images": pictures[:1], "prompt": "read all", "scale": 9, "max_new_tokens": 4}
    for value in values:
        with pytest.raises((ValueError, OSError), match=name) as caught:
            unasked.generate(**good | {name: value})
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^scale='9' \(a str\): valid scales are \[1, 4, 9, 36\]"):
        unasked.visual_tokens(pictures[0], "9")
    with pytest.raises(ValueError, match=r"max_new_tokens has 1 entries for 2 prompts"):
        unasked.generate(None, ["a", "b"], max_new_tokens=[4])


def test_a_damaged_picture_is_named(model, tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 99).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^images of prompt 2 of 2: cannot read a picture from .*half.png: "):
        model.generate([whole, tmp_path / "half.png"], ["read all", "read all"])


def test_a_prompt_past_the_trained_length_is_refused_with_what_to_do(unasked, pictures):
    assert unasked.length == 120
    taken = 120 - unasked.room(pictures[0], "read all", 36)
    assert taken == 1 + 36 + 2  # the begin, the picture, the words
    with pytest.raises(ValueError) as caught:
        unasked.generate(pictures[0], "read all", 36, 120 - taken + 1)
    assert str(caught.value) == (
        "prompt takes 39 positions, 36 of them of 1 picture, and 82 new tokens behind it (max_new_tokens), but the "
        "model was trained on 120 positions (data.length): give fewer pictures, or a smaller scale than 36, or a "
        "shorter prompt, or max_new_tokens of at most 81"
    )
    with pytest.raises(ValueError, match="prompt 2 of 2 takes 147 positions, 144 of them of 4 pictures, and 1 "):
        unasked.generate([pictures[:1], pictures[:4]], ["read all", "read all"])
    with pytest.raises(ValueError, match=r"takes \d+ positions and 1 new token behind it .*: give a shorter prompt$"):
        unasked.generate(prompt="read all " * 80)
    with pytest.raises(ValueError, match="or nothing else, as truncate=True leaves out whole turns before the last"):
        unasked.generate(prompt="read all " * 80, truncate=True)


def test_an_answer_ends_where_the_trained_length_does(model, pictures, monkeypatch):
    """Without a number the answer has the room that there is; with one it has exactly that."""
    monkeypatch.setattr(model.engine, "end", -1)
    pair, words = pictures[:2], "read all " * 16
    room = model.room(pair, words, 36)
    assert 1 < room < 20
    assert [len(ids) for ids in model.generate_ids([pair], [words], 36)] == [room]
    assert [len(ids) for ids in model.generate_ids([pair, []], [words, "a"], 36, [room, 7])] == [room, 7]
    assert len(model.generate_ids([[]], ["a"], 36)[0]) == 64


def test_truncation_leaves_out_the_oldest_questions(model, pictures):
    """What is left is asked as if the rest had never been said; a conversation that fits stays whole."""
    turns = [
        *({"role": "user", "content": "<image><image>read all"}, {"role": "assistant", "content": "1 2 3 4 5"}),
        *({"role": "user", "content": "<image>read all"}, {"role": "assistant", "content": "6 7 8 9 1"}),
        {"role": "user", "content": "digit at b2?"},
    ]
    with pytest.raises(ValueError, match="3 pictures.*or truncate=True, which leaves out the oldest turns"):
        model.generate(pictures[:3], turns, 36, 4)

    def ask(images, turns, scale):
        return model.generate(images, turns, scale, 4, return_logprobs=True, truncate=True)

    assert ask(pictures[:3], turns, 36) == ask(pictures[2:3], turns[2:], 36)
    whole = ask(pictures[:3], turns, 9)
    assert whole == model.generate(pictures[:3], turns, 9, 4, return_logprobs=True)
    assert whole.prompt_positions > ask(pictures[2:3], turns[2:], 9).prompt_positions


def test_a_picture_may_be_a_path_or_bytes(model, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    want = model.generate([pictures[0]], "read all", 9, 5)
    path = tmp_path / "a.png"
    for images in (pictures[0], path, str(path), [str(path)], path.read_bytes()):
        assert model.generate(images, "read all", 9, 5) == want
    assert model.generate([path, [path]], ["read all"] * 2, 9, 5) == [want, want]
    assert model.visual_tokens(str(path), 4) == 4


def test_what_a_model_takes_is_said_before_it_is_read_and_refused_if_it_cannot_fit(
    model, tmp_path, monkeypatch, capsys
):
    model.save(tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(free_memory, "of_host", lambda: 1000)
    monkeypatch.setattr(Checkpoints, "restore_params", lambda *_: pytest.fail("read before it was refused"))
    with pytest.raises(ValueError, match=r"this model cannot fit: [\d,]+ parameters, .* free"):
        lmm.load(tmp_path / "run")
    monkeypatch.undo()
    lmm.load(tmp_path / "run")
    assert f"loading {tmp_path / 'run'}: " in capsys.readouterr().err


def test_a_router_is_understood_whatever_the_order_of_the_scales(model):
    """`Auto` and result files have budgets ascending; the router's logits are in the order of the config."""
    config = {"model": {"router": {"tokens": 4}}}
    asked = types.SimpleNamespace(
        scales=(9, 1, 4),
        program=types.SimpleNamespace(config=ml_collections.ConfigDict(config)),
        tokenizer=model.tokenizer,
        _layout=model._layout,
        engine=types.SimpleNamespace(expect=lambda pictures, question: np.array([0.9, 0.1, 0.4])),
    )
    query = types.SimpleNamespace(turns=[("user", "read all")], pictures=(), sizes=())
    assert Model._expect(asked, query) == [0.1, 0.4, 0.9]


@pytest.fixture
def climbs(model, monkeypatch):
    """Makes the model choose: from 1 over 4 to 9 tokens, whatever is answered."""
    promise = {(a, s): (5.0 if s > a else 0.0, 0.0, 0.0, 0.0) for a in (1, 4, 9) for s in (1, 4, 9) if s >= a}
    way = Way(1, True, 0.001)  # of budgets that promise the same the smallest is the cheapest
    auto = Auto((1, 4, 9), promise, {}, {}, {CASCADE: way}, CASCADE)
    monkeypatch.setattr(model, "auto", auto)
    return auto


def test_auto_answers_as_the_budget_that_it_ends_at_and_counts_all_that_it_tried(model, pictures, climbs):

    def told(answer):
        return answer.text, answer.ids, answer.scale, answer.visual_tokens, answer.prompt_positions

    options = {"max_new_tokens": 6, "return_logprobs": True}
    seen = model.engine.pictures.encoded
    auto = model.generate(pictures[:1], "read all", scale="auto", **options)
    assert model.engine.pictures.encoded <= seen + 1
    fixed = model.generate(pictures[:1], "read all", scale=9, **options)
    assert (auto.text, auto.ids, auto.reason) == (fixed.text, fixed.ids, fixed.reason)
    assert (auto.scale, auto.visual_tokens, fixed.visual_tokens) == (9, 1 + 4 + 9, 9)
    assert auto.prompt_positions == fixed.prompt_positions
    # A list of unlike budgets, a stream and a queue go up alike, and text alone has nothing to choose.
    many = model.generate([pictures[:1], pictures[1:2], None], ["read all"] * 3, scale=["auto", 4, "auto"], **options)
    assert (
        told(many[0]) == told(auto) and [answer.scale for answer in many] == [9, 4, 9] and many[2].visual_tokens == 0
    )
    assert "".join(model.stream(pictures[:1], "read all", scale="auto", max_new_tokens=6)) == auto.text
    queue = [model.request([p], "read all", "auto", 6) for p in pictures[:5]]
    found = dict(model.answers(iter(queue), at_a_time=2))
    assert told(found[queue[0]]) == told(auto) and {answer.visual_tokens for answer in found.values()} == {14}
    chat = model.chat(scale="auto", max_new_tokens=6)
    assert chat.ask("read all", images=pictures[:1]) == auto.text


def test_auto_stays_where_the_answer_promises_enough(model, pictures, climbs, monkeypatch):
    stays = {pair: (9.0, 0.0, 0.0, 0.0) for pair in climbs.of_answer}
    monkeypatch.setattr(model, "auto", dataclasses.replace(climbs, of_answer=stays))
    answer = model.generate(pictures[:1], "read all", scale="auto", max_new_tokens=6, return_logprobs=True)
    assert (answer.scale, answer.visual_tokens) == (1, 1)
    assert answer.text == model.generate(pictures[:1], "read all", scale=1, max_new_tokens=6)


def test_auto_is_refused_by_a_model_that_has_not_learned_to_choose(unasked, pictures):
    with pytest.raises(
        ValueError, match=r"scale='auto' is for a model that has learned .*--fit-auto`, which this one"
    ):
        unasked.generate(pictures[:1], "read all", scale="auto")
    with pytest.raises(ValueError, match=r"scale\[1\]='auto' is for a model that has learned"):
        unasked.generate([pictures[:1]] * 2, ["read all"] * 2, scale=[9, "auto"])


def test_what_was_fitted_to_another_step_is_not_used(model, climbs, tmp_path, capsys):
    model.save(tmp_path / "saved")
    dataclasses.replace(climbs, step=0).save(tmp_path / "saved")
    assert lmm.load(tmp_path / "saved").auto == dataclasses.replace(climbs, step=0)
    dataclasses.replace(climbs, step=5).save(tmp_path / "saved")
    capsys.readouterr()
    assert lmm.load(tmp_path / "saved").auto is None
    assert "auto.json was fitted to step 5 and this is step 0: scale='auto' needs" in capsys.readouterr().err
    with_router = dataclasses.replace(
        climbs,
        step=0,
        of_router=dict.fromkeys((1, 4, 9), (0.0,) * 4),
        of_both=dict.fromkeys(climbs.of_answer, (0.0,) * 7),
    )
    with_router.save(tmp_path / "saved")
    assert lmm.load(tmp_path / "saved").auto is None
    assert "was fitted to a model with a router, which this one has not" in capsys.readouterr().err
    of_other = {pair: weights for pair, weights in climbs.of_answer.items() if 4 not in pair}
    of_other = {tuple(7 if s == 9 else s for s in pair): weights for pair, weights in of_other.items()}
    dataclasses.replace(climbs, step=0, scales=(1, 7), of_answer=of_other).save(tmp_path / "saved")
    assert lmm.load(tmp_path / "saved").auto is None
    assert "auto.json was fitted to another model (scale=7: " in capsys.readouterr().err
    (tmp_path / "saved" / "auto.json").write_text("{}")
    assert lmm.load(tmp_path / "saved").auto is None  # or it could not be fitted again
    assert "auto.json is not what `lmm evaluate --fit-auto` writes" in capsys.readouterr().err
