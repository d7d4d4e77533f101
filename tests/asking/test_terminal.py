"""A conversation on the terminal: what can be typed, and what Ctrl-C does."""

import io
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from lmm_jax.asking.terminal import Terminal
from tests.asking.talker import Talker


def talk(monkeypatch, capsys, *lines, auto=None, **options):
    """What is printed when `lines` are piped in: the lines of stdout and of stderr."""
    content = "\n".join(lines).encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    Terminal(Talker(auto=auto), None, options).run()
    out, err = capsys.readouterr()
    return [line.strip() for line in out.splitlines()], err.splitlines()


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a 'picture'.png"
    Image.new("RGB", (4, 4)).save(path)
    return path


def test_a_line_is_a_question_and_what_was_said_goes_with_the_next(monkeypatch, capsys):
    out, err = talk(monkeypatch, capsys, "one", "", "//two", "/quit", "three")
    assert out == ["1 turns, 0 pictures at 9: one", "3 turns, 0 pictures at 9: /two"] and err == []


def test_pictures_go_with_the_next_question_and_scales_with_all_that_follow(monkeypatch, capsys, picture):
    lines = [f'/image "{picture}"', "/scale 1", "one", "two", "/clear", "three", "/scale"]
    out, err = talk(monkeypatch, capsys, *lines, scale=9)
    assert out == [
        "1 turns, 1 pictures at 1: one",
        "3 turns, 1 pictures at 1: two",
        "1 turns, 0 pictures at 1: three",
    ]
    assert err == [
        "1 for the next question, 9 visual tokens together",
        "1 visual tokens a picture; trained: 1, 9",
        "forgotten",
        "1 visual tokens a picture; trained: 1, 9",
    ]


def test_a_model_that_has_learned_to_is_left_the_choice_of_the_scale(monkeypatch, capsys, picture):
    out, err = talk(
        monkeypatch, capsys, f'/image "{picture}"', "one", "/scale 1", "/scale auto", "two", auto=True, scale="auto"
    )
    assert out == ["1 turns, 1 pictures at auto: one", "3 turns, 1 pictures at auto: two"]
    assert err == [
        "1 for the next question",
        "1 visual tokens a picture; trained: 1, 9",
        "auto, the model chooses; trained: 1, 9",
    ]


def test_what_is_wrong_is_a_sentence_and_the_chat_goes_on(monkeypatch, capsys, picture):
    wrong = ["/image nothing.png", "/image 'x", "/scale 7", "/scale auto", "/sclae 9", "\udcff"]
    out, err = talk(monkeypatch, capsys, "one", *wrong, f'/image "{picture}"', "fail", "two", "/image", "three")
    assert out == [
        "1 turns, 0 pictures at 9: one",
        "3 turns, 1 pictures at 9: two",  # nothing is kept of what failed, and its picture waits
        "5 turns, 1 pictures at 9: three",
    ]
    for line, message in zip(
        err,
        [
            "lmm: /image[0]: no file nothing.png",
            "lmm: /image: No closing quotation",
            "lmm: scale=7 (an int): valid scales are [1, 9]",
            "lmm: scale='auto' (a str): valid scales are [1, 9]",
            "lmm: there is no /sclae; known are /image, /scale, /clear, /help, /quit",
            "lmm: text: the text is not valid Unicode",
            "1 for the next question",
            "lmm: this='fail' (a str): True or False is valid (the picture waits for the next question",
            "no picture waits for the next question",
        ],
        strict=True,
    ):
        assert line.startswith(message), line


def test_a_fault_ends_the_chat(monkeypatch, capsys):
    with pytest.raises(RuntimeError, match="a fault"):
        talk(monkeypatch, capsys, "bug")


class Typist:
    """Somebody at a terminal, where a chat runs in a process of its own."""

    def __init__(self, pause):
        code = (
            "import sys\nfrom lmm_jax import cli, verbs\nfrom lmm_jax.asking.terminal import Terminal\n"
            "from tests.asking.talker import Talker\n"
            f"def show(args):\n    Terminal(Talker({pause}), None, {{}}).run()\n    print('ended')\n"
            "verbs.show = show\nsys.exit(cli.main(['show', 'config']))"
        )
        self._terminal, end = pty.openpty()
        # A process cannot handle what it was started to ignore, as these tests are where they run in the background.
        command = ["env", "--default-signal=INT", sys.executable, "-c", code]
        root, pipes = pathlib.Path(__file__).parents[2], dict.fromkeys(("stdin", "stdout", "stderr"), end)
        self.process = subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)
        os.close(end)
        self._seen = ""

    def see(self, text):
        """Waits until `text` comes; what came before it."""
        assert self._comes(text, 60), self._seen
        before, _, self._seen = self._seen.partition(text)
        return before

    def _comes(self, text, seconds):
        until = time.monotonic() + seconds
        while text not in self._seen:
            if not select.select([self._terminal], [], [], max(0, until - time.monotonic()))[0]:
                return False
            self._seen += os.read(self._terminal, 1000).decode()
        return True

    def type(self, text):
        os.write(self._terminal, text.encode())

    def interrupt(self):
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_at_the_prompt(self, text):
        """Presses Ctrl-C and waits until `text` comes.

        Python's readline prints the prompt a moment before it waits for keys, and a signal in between shows with the
        next key alone. Nobody types as fast as that, and who sees nothing happen presses again.
        """
        self.see("> ")
        for _ in range(6):
            self.interrupt()
            if self._comes(text, 10):
                break
        self.see(text)


def test_ctrl_c_stops_an_answer_any_number_of_times_and_twice_at_the_prompt_ends():
    typist = Typist(pause=0.5)
    typist.see("> ")
    for number in range(3):
        typist.type(f"question-{number}-and-more\n")
        typist.see("pictures at 9:")
        typist.interrupt()
        assert "more" not in typist.see("> ")
    time.sleep(1.5)  # longer than `interrupts.GRACE`
    typist.interrupt()
    typist.see("Ctrl-C once more ends the chat")
    typist.see("> ")
    typist.type("last\n")
    assert "7 turns" in typist.see("pictures at 9: last")  # what was said of the others was kept
    for what in ("Ctrl-C once more ends the chat", "stopped by Ctrl-C"):
        typist.interrupt_at_the_prompt(what)
    assert typist.process.wait(30) == 130


def test_ctrl_d_ends_a_chat():
    typist = Typist(pause=0.0)
    typist.see("> ")
    typist.type("\x04")
    typist.see("ended")
    assert typist.process.wait(30) == 0
