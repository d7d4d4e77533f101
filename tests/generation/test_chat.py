"""A conversation keeps what was said and shown, and is left as it was by what fails."""

import gc
import threading

import pytest
from PIL import Image

from lmm_jax.data.images import image_size
from lmm_jax.generation.chat import OPTIONS, Chat
from lmm_jax.generation.prompts import read_queries


class Model:
    """Answers by number, in pieces of a letter; checks what it is asked as `Model.generate` does."""

    def __init__(self):
        self.asked, self.fails, self.answers, self.closed = [], None, None, 0

    def generate(self, images, prompt, **options):
        return "".join(self.stream(images, prompt, **options))

    def stream(self, images, prompt, **options):
        ((query,), many) = read_queries(images, prompt)
        assert not many
        self.asked.append((query.turns, query.pictures, options))
        answer = f"answer {len(self.asked)}" if self.answers is None else self.answers
        return self._pieces(answer)

    def _pieces(self, answer):
        try:
            for n, letter in enumerate(answer):
                if self.fails and n == 3:
                    raise self.fails
                yield letter
        finally:
            self.closed += 1


@pytest.fixture
def model():
    return Model()


def picture(width):
    return Image.new("RGB", (width, 1), (width, 0, 0))


def said(chat):
    return [(turn["role"], turn["content"]) for turn in chat.messages]


def state(chat):
    return said(chat), [image_size(one) for one in chat.pictures]


def widths(pictures):
    return [image_size(one)[0] for one in pictures]


def test_each_question_goes_with_what_was_said_and_shown_before(model, tmp_path):
    picture(2).save(tmp_path / "two.png")
    chat = Chat(model, system="Be brief.")
    assert chat.ask("Hi") == "answer 1"
    assert chat.ask("What?", [tmp_path / "two.png", picture(3)]) == "answer 2"
    (tmp_path / "two.png").unlink()
    assert chat.ask("<image>And this?", picture(4)) == "answer 3"
    assert chat.ask([{"type": "text", "text": "Why?"}, {"type": "image", "image": picture(5)}]) == "answer 4"
    assert said(chat) == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "answer 1"),
        ("user", "<image>\n<image>\nWhat?"),
        ("assistant", "answer 2"),
        ("user", "<image>And this?"),
        ("assistant", "answer 3"),
        ("user", "Why?<image>\n"),
        ("assistant", "answer 4"),
    ]
    assert widths(chat.pictures) == [2, 3, 4, 5]
    assert [len(turns) for turns, _, _ in model.asked] == [2, 4, 6, 8]
    assert [len(pictures) for _, pictures, _ in model.asked] == [0, 2, 3, 4]
    assert widths(model.asked[-1][1]) == [2, 3, 4, 5]
    assert all(turns == tuple(said(chat))[: len(turns)] for turns, _, _ in model.asked)


def test_a_picture_stays_as_it_was_shown(model, tmp_path):
    mine, path = picture(4), tmp_path / "mine.png"
    mine.save(path)
    data = path.read_bytes()
    chat = Chat(model)
    chat.ask("a", [mine, path, data, Image.new("L", (7, 1))])
    mine.putpixel((0, 0), (9, 9, 9))
    picture(5).save(path)
    chat.ask("b")
    chat.ask("c")
    first, second, third = (pictures for _, pictures, _ in model.asked)
    assert first[1] == path and first[2] is data  # a message about a damaged file names it
    assert second[1] == second[2] == data and widths(second) == [4, 4, 4, 7]
    assert all(one is other for one, other in zip(second, third, strict=True))
    assert first[0] is second[0] and first[3] is second[3]
    assert first[0].getpixel((0, 0)) == (4, 0, 0) and first[3].mode == "RGB"


def test_an_image_whose_file_was_closed_can_still_be_asked_about(model, tmp_path):
    picture(4).save(tmp_path / "mine.png")
    chat = Chat(model)
    with Image.open(tmp_path / "mine.png") as mine:
        chat.ask("a", mine)
    (tmp_path / "mine.png").unlink()
    chat.ask("b")
    assert model.asked[-1][1][0].getpixel((0, 0)) == (4, 0, 0)


def test_messages_are_a_conversation_and_a_copy(model):
    chat = Chat(model)
    chat.ask("a", picture(4))
    (query,), _ = read_queries(chat.pictures, [*chat.messages, {"role": "user", "content": "b"}])
    chat.ask("b")
    assert query.turns == model.asked[-1][0] and query.sizes == ((4, 1),)
    before = state(chat)
    chat.messages.append({"role": "user", "content": "x"})
    chat.messages[0]["content"] = "x"
    chat.pictures.clear()
    assert state(chat) == before


def test_options_are_the_chats_unless_a_question_has_its_own(model):
    chat = Chat(model, temperature=0.5, scale=9)
    chat.ask("a")
    chat.ask("b", scale=36, max_new_tokens=5)
    "".join(chat.stream("c", truncate=True))
    assert [options for _, _, options in model.asked] == [
        {"temperature": 0.5, "scale": 9},
        {"temperature": 0.5, "scale": 36, "max_new_tokens": 5},
        {"temperature": 0.5, "scale": 9, "truncate": True},
    ]


@pytest.mark.parametrize("name", ["temprature", "prompt", "return_logprobs", "batch_size"])
def test_an_unknown_option_is_named_with_the_known_ones(model, name):
    sentence = rf"^{name} is no option of a question; valid are {', '.join(OPTIONS)}$"
    with pytest.raises(ValueError, match=sentence):
        Chat(model, **{name: 1})
    for ask in (Chat(model).ask, Chat(model).stream):
        with pytest.raises(ValueError, match=sentence):
            ask("a", **{name: 1})
    with pytest.raises(ValueError, match="^system=5: the text of the system turn is valid, or None"):
        Chat(model, system=5)
    assert not model.asked


REFUSED = [
    (("", ()), r"^text is empty"),
    ((5, ()), r"^text, turn 1: content is an int"),
    (("<image>", ()), r"^text: 1 <image> tags in the text, 0 pictures in images"),
    (("a", "nothere.png"), r"^images: no file nothere\.png"),
    (("a", b"x"), r"^images: cannot read a picture from 1 bytes"),
    (([{"type": "video"}], ()), r"^text, turn 1, part 1 is of type 'video'"),
]


@pytest.mark.parametrize(("question", "sentence"), REFUSED, ids=lambda x: str(x)[:30])
def test_a_question_that_is_refused_leaves_the_chat_as_it_was(model, question, sentence):
    chat = Chat(model)
    chat.ask("a", picture(2))
    before = state(chat)
    for ask in (chat.ask, chat.stream):
        with pytest.raises((ValueError, OSError), match=sentence):
            ask(*question)
    assert state(chat) == before and len(model.asked) == 1
    chat.ask("b")
    assert len(model.asked[-1][0]) == 3


def test_an_image_that_is_damaged_behind_its_header_is_refused(model, tmp_path):
    Image.effect_noise((64, 64), 99).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    chat = Chat(model)
    with pytest.raises(ValueError, match=r"^images: cannot read a picture from .*cut\.png"):
        chat.ask("a", Image.open(tmp_path / "cut.png"))
    assert state(chat) == ([], []) and not model.asked


@pytest.mark.parametrize("error", [ValueError("too long"), OSError("gone"), KeyboardInterrupt()], ids=repr)
def test_an_answer_that_fails_leaves_the_chat_as_it_was(model, error):
    chat = Chat(model)
    chat.ask("a", picture(2))
    before = state(chat)
    model.fails = error
    with pytest.raises(type(error)):
        chat.ask("b", picture(3))
    assert state(chat) == before
    if not isinstance(error, KeyboardInterrupt):
        with pytest.raises(type(error)):
            "".join(chat.stream("b", picture(3)))
        assert state(chat) == before
    model.fails = None
    assert chat.ask("c") == f"answer {len(model.asked)}" and widths(model.asked[-1][1]) == [2]


def test_a_stream_is_the_answer_and_kept_when_it_ends(model):
    chat = Chat(model)
    stream = chat.stream("a", picture(2))
    pieces = [next(stream)]
    assert state(chat) == ([], [])
    pieces += stream
    assert pieces == list("answer 1")
    assert state(chat) == ([("user", "<image>\na"), ("assistant", "answer 1")], [(2, 1)])


def test_of_a_stream_that_is_left_what_was_said_is_kept(model):
    want = [("user", "<image>\na"), ("assistant", "an")], [(2, 1)]
    chat = Chat(model)
    stream = chat.stream("a", picture(2))
    assert [next(stream), next(stream)] == ["a", "n"]
    stream.close()
    assert state(chat) == want and model.closed == 1 and list(stream) == []
    chat = Chat(model)
    for n, _ in enumerate(chat.stream("a", picture(2))):
        if n == 1:
            break
    gc.collect()
    assert state(chat) == want and model.closed == 2
    chat, model.fails = Chat(model), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("a", picture(2)))
    assert said(chat)[1] == ("assistant", "ans") and model.closed == 3


def test_of_a_stream_that_said_nothing_nothing_is_kept(model):
    chat = Chat(model)
    stream = chat.stream("a", picture(2))
    stream.close()
    assert state(chat) == ([], [])
    model.answers = "  \n"
    assert chat.ask("a", picture(2)) == "".join(chat.stream("a", picture(2))) == "  \n"
    model.answers = ""
    assert chat.ask("a") == "" and list(chat.stream("a")) == [] and state(chat) == ([], [])


def test_another_question_ends_a_stream_that_is_open(model):
    chat = Chat(model)
    first = chat.stream("a")
    next(first)
    with pytest.raises(ValueError, match="^text is empty"):
        chat.ask(" ")
    assert next(first) == "n"
    second = chat.stream("b")
    assert list(first) == [] and said(chat) == [("user", "a"), ("assistant", "an")]
    next(second)
    assert chat.ask("c") == "answer 3"
    assert [text for _, text in said(chat)] == ["a", "an", "b", "a", "c", "answer 3"]
    assert model.asked[-1][0][-2:] == (("assistant", "a"), ("user", "c"))


def test_a_chat_that_is_cleared_keeps_its_system_turn_alone(model):
    chat = Chat(model, system="Be brief.", scale=9)
    chat.ask("a", picture(2))
    stream = chat.stream("b", picture(3))
    next(stream)
    chat.clear()
    assert list(stream) == [] and state(chat) == ([("system", "Be brief.")], [])
    chat.ask("c")
    assert model.asked[-1] == ((("system", "Be brief."), ("user", "c")), (), {"scale": 9})


def test_two_questions_at_once_are_not_mixed(model):
    chat, running, go_on = Chat(model), threading.Event(), threading.Event()

    def pieces():
        running.set()
        go_on.wait(60)
        yield "slow"

    model._pieces = lambda answer: pieces()
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(chat.stream("a")))
    thread.start()
    assert running.wait(60)
    for other in (lambda: chat.ask("b"), lambda: chat.stream("b"), chat.clear):
        with pytest.raises(ValueError, match="^this chat is being answered in another thread; ask a chat one thing"):
            other()
    go_on.set()
    thread.join(60)
    assert answers == ["slow"] and said(chat) == [("user", "a"), ("assistant", "slow")]


def test_an_answer_to_what_is_no_longer_the_conversation_is_not_kept(model):
    chat = Chat(model)
    chat.ask("a")
    generate = model.generate

    def meanwhile(**arguments):
        model.generate = generate
        chat.ask("c")
        return "late"

    model.generate = meanwhile
    with pytest.raises(ValueError, match="^the conversation went on while this was answered; ask a chat one thing"):
        chat.ask("b")
    assert [text for _, text in said(chat)] == ["a", "answer 1", "c", "answer 2"]
