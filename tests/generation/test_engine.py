"""The engine: unlike requests in one batch are answered as each would be alone, and as if nothing were kept."""

import functools
import threading

import jax
import numpy as np
import pytest

from lmm_jax import sharding
from lmm_jax.data.prepared import Prepared, as_pictures
from lmm_jax.generation import engine, pictures, prefixes
from lmm_jax.generation.model import Model
from lmm_jax.training.state import init_state, make_program

NEXT = ("data.aspect=anyres", "data.tilings=((1,2),(2,1),(2,2))", "model.newline=True", "data.length=400")
ZOOM = ("data.stacks=zoom", "data.zoom=2", "data.sequence=grid", "data.tilings=((2,2),(1,2))", "data.views=25")
FAMILY = ("tied=True", "qk_norm=True", "qkv_bias=True", "head_dim=12", "rope_scaling=('linear',2.0)")
# Recipe and overrides of what differs in how pictures or the decoder are made.
VARIANTS = {
    "m3": ("m3",),
    "deepstack": ("deepstack",),
    "llava_next": ("full", *NEXT, "data.sequence=unpad"),
    "deepstack_v": ("deepstack_v", "model.vision.depth=2"),
    "deepstack_l_hd": ("deepstack", *ZOOM, "model.newline=True", "data.length=400"),
    "qwen3vl_style": ("qwen3vl_style",),
    "hybrid": ("hybrid",),
    "own_aspect": ("hybrid", "data.aspect=own", "data.canvas=(24,48)"),
    "family": ("m3", *(f"model.decoder.{field}" for field in FAMILY)),
}
TOLERANCE = 2e-5  # of log-probabilities, between programs of other shapes; 4e-6 was found


@pytest.fixture(scope="module")
def new_model(tiny, digits_folder):
    """`new_model(variant, devices)`: a model with its first values, whose answers run to their limit."""
    tokenizer = Prepared(digits_folder, "train").tokenizer

    def make(variant="m3", devices=1):
        recipe, *overrides = VARIANTS[variant]
        config = tiny(*overrides, recipe=recipe)
        program = make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))
        model = Model(program, init_state(program).params, tokenizer)
        model.engine.end = -1
        return model

    return make


@pytest.fixture(scope="module")
def model_of(new_model):
    """As `new_model`, but the same model for all tests, with its programs."""
    return functools.cache(new_model)


@pytest.fixture(scope="module")
def model(model_of):
    return model_of("m3")


@pytest.fixture(scope="module")
def shown(digits_folder):
    """Pictures."""
    data = Prepared(digits_folder, "test")
    return [as_pictures(data[row])[0] for row in range(6)]


def mixed(shown, valid, count):
    """`count` unlike requests: as lists of images, prompts, scales, limits."""
    questions = ("read all", "digit at b2?", "how many 7s are there?", "digit at <image> a1? " * 3, "how many?")
    asked = []
    for n in range(count):
        of = {3: shown[:3], 4: []}.get(n % 5, [shown[n % 6]])
        asked.append((of, questions[n % 5], valid[n % len(valid)] if n % 5 != 3 else valid[0], 2 + n % 7))
    return [list(column) for column in zip(*asked, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def logprobs_at(model, params, batch, scale, last):
    """Log-probabilities of all ids behind a position of a batch of one row, `[vocabulary]`."""
    h = model.clone(scales=(scale,)).apply({"params": params}, batch)
    return jax.nn.log_softmax(model.apply({"params": params}, h[0, 0, last], method="logits"))


def reread(model, images, prompt, scale, ids=None, count=0):
    """Log-probabilities of ids after a prompt, greedy ones if None, each by reading all before it again.

    Returns:
      ids, and of each its log-probability.
    """
    batch = model.batch(images, prompt, scale)
    count = count if ids is None else len(ids)
    length, found = int((batch["segment"] > 0).sum()), []
    for name, value in (("id", 0), ("slot", -1), ("position", 0), ("segment", 0)):
        batch[name] = np.pad(batch[name], ((0, 0), (0, 0), (0, 32)), constant_values=value)
    with model.program.use():
        for n in range(count):
            of_all = logprobs_at(model.program.model, model.params, batch, scale, length + n - 1)
            new = int(of_all.argmax()) if ids is None else ids[n]
            found.append((new, float(of_all[new])))
            at = np.s_[0, 0, length + n]
            batch["id"][at], batch["position"][at], batch["segment"][at] = new, length + n, 1
    return [new for new, _ in found], [logprob for _, logprob in found]


@pytest.mark.parametrize(
    "recipe",
    [*list(VARIANTS)[:2], *(pytest.param(name, marks=pytest.mark.long) for name in list(VARIANTS)[2:])],
)
def test_cached_answers_equal_those_of_reading_everything_again(model_of, shown, recipe):
    model = model_of(recipe)
    shown = [picture.resize((24 + 9 * n, 24)) for n, picture in enumerate(shown)]
    asked = mixed(shown, model._layout.visual.valid_scales, 5)
    answers = model.generate(*asked, return_logprobs=True)
    for answer, images, prompt, scale, limit in zip(answers, *asked, strict=True):
        ids, logprobs = reread(model, images, prompt, scale, count=limit)
        assert list(answer.ids) == ids
        np.testing.assert_allclose(answer.logprobs, logprobs, atol=TOLERANCE)
        assert answer.reason == "length" and answer.visual_tokens == model.visual_tokens(images, scale)
    assert len({answer.ids for answer in answers}) > 1


def test_what_is_asked_together_and_one_by_one_is_answered_alike_by_few_programs(new_model, shown):
    """A hundred mixed requests: as a list, in other company, in few rows, and each alone."""
    model = new_model()
    asked = mixed(shown, model.scales, 100)
    options = {"temperature": [0.0, 0.7, 1.5, 0.0] * 25, "top_k": [0, 5] * 50, "top_p": [1.0, 1.0, 0.8, 0.9] * 25}
    together = model.generate(*asked, **options, return_logprobs=True)
    programs = dict(model.engine.programs.compiled())
    assert model.generate(*asked, **options, return_logprobs=True) == together
    assert model.engine.programs.compiled() == programs  # nothing is compiled for what came before

    def alone(n):
        own = {name: values[n] for name, values in options.items()}
        return model.generate(*(column[n] for column in asked), **own, seed=n, return_logprobs=True)

    for n in (*range(0, 100, 9), 3, 4):
        found = alone(n)
        assert found.ids == together[n].ids and found.text == together[n].text, n
        np.testing.assert_allclose(found.logprobs, together[n].logprobs, atol=TOLERANCE)
    programs = dict(model.engine.programs.compiled())
    few = model.generate(*asked, **options, batch_size=3, return_logprobs=True)
    assert [answer.ids for answer in few] == [answer.ids for answer in together]
    for n in range(100):
        alone(n)
        list(model.stream(*(column[n] for column in asked), seed=n)) if n < 10 else None
    # A prompt is read in one of two lengths and many together in more, and all are decoded as 1, 4 or 128 rows.
    sizes = model.engine.programs.compiled()
    assert sizes == {
        "see": 1,
        "read": 4,
        "free": 3,
        "put": 5,
        "decode": 3,
        "read_on": 0,
        "resize": 0,
        "score": 0,
        "expect": 0,
        "density": 0,
    }


def test_rows_are_given_to_those_that_wait_while_others_go_on(model, shown, monkeypatch):
    monkeypatch.setattr(engine, "MOST_ROWS", 4)
    asked = [shown[:1]] * 8, ["read all"] * 8, 9, [40, 4, 4, 4, 4, 4, 4, 4]
    steps, decode = [], model.engine.programs.decode

    def count(state, n, *arguments):
        steps.append((n, int((state.left > 0).sum())))
        return decode(state, n, *arguments)

    monkeypatch.setattr(model.engine.programs, "decode", count)
    answers = model.generate_ids(*asked)
    assert [len(ids) for ids in answers] == asked[3] and all(ids == answers[0][:4] for ids in answers[1:])
    # The long answer takes 40 steps, during which seven short ones pass through the other three rows.
    assert sum(n for n, _ in steps[:-1]) < 40 and [rows for _, rows in steps[:2]] == [4, 4]


def test_a_picture_is_encoded_once_whatever_is_asked_of_it(model, shown, tmp_path):
    shown = [picture.rotate(90) for picture in shown]  # which no other test asks about
    before = model.engine.pictures.encoded
    shown[0].save(tmp_path / "a.png")
    shown[0].save(tmp_path / "b.png")
    for scale in (1, 9, 36):
        for image in (tmp_path / "a.png", str(tmp_path / "b.png"), (tmp_path / "a.png").read_bytes()):
            model.generate([[image], [image]], ["read all", "how many 7s?"], scale, 2)
    assert model.engine.pictures.encoded == before + 1
    model.generate([[shown[0]], [shown[1]], [shown[0]]], ["read all"] * 3, [9, 1, 36], 2)
    assert model.engine.pictures.encoded == before + 3  # what is no file is told by its pixels


def test_what_was_seen_is_kept_up_to_a_number_of_bytes(model, shown, monkeypatch):
    want = model.generate_ids([[picture] for picture in shown], ["read all"] * 6, 9, 4)
    kept = model.engine.pictures._kept
    monkeypatch.setattr(pictures, "KEPT", 2 * next(iter(kept.values())).nbytes)
    model.generate_ids([[shown[0].rotate(180)]], ["read all"], 9, 4)
    assert len(kept) == 2
    assert model.generate_ids([[picture] for picture in shown], ["read all"] * 6, 9, 4) == want and len(kept) == 2


@pytest.mark.parametrize("recipe", ["m3", "deepstack"])
def test_what_was_read_is_not_read_again(model_of, shown, recipe, monkeypatch):
    """Of a second question about a picture, and of the next turn of a chat, what is new is read alone."""
    asked = [("read all", [shown[0]]), ("digit at b2?", ()), ("and <image> this?", [shown[1]]), ("how many?", ())]

    def talk(model):
        chat = model.chat(max_new_tokens=4)
        return [chat.ask(text, images) for text, images in asked], model.generate(shown[0], "how many 7s?", None, 5)

    model, read = model_of(recipe), []
    questions = ["digit at b2?", "digit at a1?", "how many 7s?"]
    want, wanted = talk(model), model.generate([[shown[2]]] * 3, questions, None, 4)
    monkeypatch.setattr(prefixes, "REUSED", 4)  # at 128 all of this is too short to be kept
    read_on = model.engine.programs.read_on
    monkeypatch.setattr(
        model.engine.programs,
        "read_on",
        lambda batch, *others: read.append(int(batch["segment"].sum())) or read_on(batch, *others),
    )
    assert talk(model) == want
    # The pictures, of 36 positions in M3, and what was said are read once: of the five prompts only the ends are.
    assert len(read) == 4 and sum(read) < 70
    # Of a list, those that begin alike are read behind what the first one read.
    assert model.generate([[shown[2]]] * 3, questions, None, 4) == wanted and len(read) == 6


def test_log_probabilities_of_answers_are_those_of_reading_each(model, shown, monkeypatch):
    answers, prompt = ["1 2 3", "7", "9 9 9 9 9 9"], "read all"
    for _ in range(2):
        found = model.score(shown[0], prompt, answers, 9)
        for answer, logprob in zip(answers, found, strict=True):
            ids = [*model.tokenizer.encode(answer), model.tokenizer.eos]
            want = reread(model, [shown[0]], prompt, 9, ids)[1]
            np.testing.assert_allclose(logprob, sum(want), atol=TOLERANCE * len(ids))
        monkeypatch.setattr(prefixes, "REUSED", 4)  # then the prompt is taken from what was read
    assert found == model.score(shown[0], prompt, answers, 9)
    greedy = model.generate(shown[0], prompt, 9, 3, return_logprobs=True)
    assert sum(greedy.logprobs) > sum(reread(model, [shown[0]], prompt, 9, [5, 6, 7])[1])


def test_a_stream_gives_the_text_in_pieces_and_stops_alike(model, shown):
    want = model.generate(shown[0], "read all", 9, 24)
    pieces = list(model.stream(shown[0], "read all", 9, 24))
    assert "".join(pieces) == want and len(pieces) > 3
    stop = want[len(want) // 2 :][:3]
    cut = model.generate(shown[0], "read all", 9, 24, stop=stop, return_logprobs=True)
    assert cut.text == want[: want.index(stop)] and cut.reason == "stop" and len(cut.ids) < 24
    assert "".join(model.stream(shown[0], "read all", 9, 24, stop=stop)) == cut.text
    ids = model.generate(shown[0], "read all", 9, 24, return_logprobs=True).ids
    by_id = model.generate(shown[0], "read all", 9, 24, stop=ids[3], return_logprobs=True)
    assert by_id.ids == ids[: ids.index(ids[3])] and by_id.reason == "stop"
    with pytest.raises(ValueError, match="stream answers one"):
        model.stream([[shown[0]]], ["read all"])
    with pytest.raises(ValueError, match=r"^temperature=-1 "):
        model.stream(shown[0], "read all", temperature=-1)


def test_streams_of_several_threads_share_the_batch(model, shown, monkeypatch):
    want = [model.generate(picture, "read all", 9, 30, temperature=1.0, seed=n) for n, picture in enumerate(shown)]
    live, decode = [], model.engine.programs.decode

    def see(state, *arguments):
        live.append(int((state.left > 0).sum()))
        return decode(state, *arguments)

    monkeypatch.setattr(model.engine.programs, "decode", see)
    found, all_ready = {}, threading.Barrier(len(shown))

    def ask(n):
        stream = model.stream(shown[n], "read all", 9, 30, temperature=1.0, seed=n)
        all_ready.wait()
        found[n] = "".join(stream)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(shown))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(shown))] == want and max(live) > 1


def test_a_stream_that_is_left_frees_its_row(model, shown):
    stream = model.stream(shown[0], "read all", 9, 60)
    next(stream)
    stream.close()
    assert model.generate(shown[0], "read all", 9, 3)
    assert model.engine._state is None and not model.engine._rows


def test_a_fault_ends_what_is_being_answered_and_nothing_else(model, shown, monkeypatch, tmp_path):
    want = model.generate(shown[0], "read all", 9, 5)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise RuntimeError("out of memory")

        patch.setattr(model.engine.programs, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(shown[0], "read all", 9, 5)
    assert model.generate(shown[0], "read all", 9, 5) == want
    shown[1].resize((99, 99)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:400])
    good = model.stream(shown[0], "read all", 9, 5)
    with pytest.raises(ValueError, match=r"^images of prompt 2 of 2: .*cut.png"):
        model.generate([shown[:1], [tmp_path / "cut.png"]], ["read all"] * 2, 9, 5)
    assert "".join(good) == want


def test_what_cannot_fit_the_memory_is_refused_before_it_is_read(model, shown, monkeypatch):
    one = model.engine._row_bytes(engine.SHORTEST_ROW)
    monkeypatch.setattr(model.engine, "_free_bytes", 2 * one)
    assert model.generate(shown[0], "read all", 9, 3)  # one row, whatever waits
    assert len(model.generate([[]] * 3, ["read all"] * 3, 9, 3)) == 3
    monkeypatch.setattr(model.engine, "_free_bytes", 2 * one - 1)
    with pytest.raises(ValueError, match=r"^prompt takes 12 positions and max_new_tokens=3 more, whose keys .* free"):
        model.generate(shown[0], "read all", 9, 3)


def test_the_same_seed_gives_the_same_text_on_one_and_on_eight_devices(model, new_model, shown):
    """Which share out rows and heads; so does a batch of pictures."""
    asked = mixed(shown, (1, 4, 9, 36), 12)
    options = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    one, eight = (of.generate(*asked, **options) for of in (model, new_model("m3", 8)))
    assert one == eight and one != model.generate(*asked, **options | {"seed": 8})
