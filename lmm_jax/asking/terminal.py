"""A conversation on the terminal, or of questions that are piped in, one a line."""

import contextlib
import os
import shlex
import sys

from lmm_jax import errors, interrupts
from lmm_jax.generation.model import AUTO
from lmm_jax.generation.prompts import read_pictures, read_sizes

HELP = """\
/image FILE…   show pictures with the next question; without a FILE, take back those that wait
/scale N       visual tokens of a picture from now on, in the earlier turns too; auto if the model is to choose;
               without N, say how many
/clear         forget what was said and shown
/help          say this again
/quit          end, as Ctrl-D does
//…            a question that begins with /
Ctrl-C stops an answer; what was said until then is kept. Twice at the prompt, it ends the chat.\
"""


class Terminal:
    """A `Chat` between a model and whoever types, or what is piped in.

    Answers go to stdout. Everything else goes to stderr, so that a pipe has the answers alone. What is wrong with a
    line is told in a sentence, and the chat goes on.
    """

    def __init__(self, model, system, options):
        """For a `Model`, the text of a system turn or None, and options of `Model.generate` for every question."""
        self._model, self._chat = model, model.chat(system, **options)
        self._scale, self._images = model.check_budget(options.get("scale")), []
        self._commands = {
            "image": self._image,
            "scale": self._set_scale,
            "clear": self._clear,
            "help": lambda rest: _say(HELP),
        }

    def run(self):
        """Answers until the input ends, or `/quit`; KeyboardInterrupt after two Ctrl-C at the prompt."""
        typed = sys.stdin.isatty() and sys.stdout.isatty()
        if typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - arrow keys and history for `input`
            _say(f"{self._budget()}. /help says what can be typed, Ctrl-D ends.")
        if hasattr(sys.stdin, "reconfigure"):  # what is no UTF-8 is refused like other text that cannot be used
            sys.stdin.reconfigure(errors="surrogateescape")
        for line in _typed() if typed else map(str.strip, sys.stdin):
            if line.split(maxsplit=1)[:1] == ["/quit"]:
                return
            try:
                self.take(line)
            except KeyboardInterrupt:
                if not typed:
                    raise
                interrupts.obeyed()
                print(flush=True)
            except Exception as error:  # every one that is no fault of ours is told as the command tells it
                told = errors.explain(error)
                if told is None:
                    raise
                _say(f"lmm: {told[0]}{self._waiting()}")

    def take(self, line):
        """Does what a line says, or answers it."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self._commands:
                known = ", ".join(f"/{command}" for command in (*self._commands, "quit"))
                raise ValueError(f"there is no /{name}; known are {known}, and //… is a question that begins with /")
            self._commands[name](rest.strip())
        elif line:
            self._ask(line.removeprefix("/"))

    def _ask(self, text):
        before = len(self._chat.messages)
        try:
            for piece in self._chat.stream(text, self._images, scale=self._scale):
                print(piece, end="", flush=True)
            print(flush=True)
            self._images = []
        finally:
            if len(self._chat.messages) > before:  # it was kept, with its pictures, although it did not end
                self._images = []

    def _image(self, rest):
        if not rest:
            self._images = []
            _say("no picture waits for the next question")
            return
        try:
            names = shlex.split(rest)
        except ValueError as error:
            raise ValueError(
                f"/image: {error}; a name with a quote in it stands in quotes of the other kind"
            ) from error
        pictures = read_pictures("/image", [os.path.expanduser(name) for name in names])
        read_sizes("/image", pictures)
        self._images += pictures
        told = ""
        if self._scale != AUTO:
            told = f", {self._model.visual_tokens(self._images, self._scale)} visual tokens together"
        _say(f"{len(self._images)} for the next question{told}")

    def _set_scale(self, rest):
        if rest:
            self._scale = self._model.check_budget(int(rest) if rest.isdecimal() else rest)
        trained = ", ".join(map(str, sorted(self._model.scales)))
        _say(f"{self._budget()}; trained: {trained}")

    def _budget(self):
        return "auto, the model chooses" if self._scale == AUTO else f"{self._scale} visual tokens a picture"

    def _clear(self, rest):
        self._chat.clear()
        self._images = []
        _say("forgotten")

    def _waiting(self):
        n = len(self._images)
        what = "the picture waits" if n == 1 else f"the {n} pictures wait"
        return f" ({what} for the next question; /image alone takes it back)" if n else ""


def _typed():
    """Lines that are typed at the prompt, until Ctrl-D; the second of two Ctrl-C raises KeyboardInterrupt."""
    again = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if again:
                raise
            interrupts.obeyed()
            again = True
            _say("Ctrl-C once more ends the chat, as Ctrl-D does")
            continue
        again = False
        yield line.strip()


def _say(text):
    print(text, file=sys.stderr, flush=True)
