"""A conversation with a model: what was said, and the pictures that were shown, go with each further question."""

import contextlib
import dataclasses
import threading
import weakref
from typing import Any

from etils import epath
from PIL import Image

from lmm_jax.data.images import open_picture
from lmm_jax.generation.prompts import read_turn

# Arguments of `Model.generate` that a question may have.
OPTIONS = (
    "scale",
    "max_pixels",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "stop",
    "seed",
    "truncate",
)


class Chat:
    """A conversation, made by `Model.chat`.

    A question and its answer are kept together, once the answer is there:

    - A question that fails leaves the chat as it was: one that is refused, or whose answer ends with an error.
    - Of an answer that is streamed and not read to its end (closed, left by `break`, or interrupted by Ctrl-C) what
      was said until then is kept; where nothing was said yet, nothing is.
    - An answer without text is returned and not kept, since no template has a place for an empty turn.

    A conversation that no longer fits into the model's length is refused as by `Model.generate`. The option
    `truncate=True` leaves out its oldest questions when the model is asked; `messages` has them nevertheless.

    A chat answers one question at a time. Another question, or `clear`, closes a stream that is still open.
    """

    def __init__(self, model, system=None, **defaults):
        """A conversation without any turn.

        Args:
          model: what answers: `generate(images=…, prompt=…, **options)` returns a text, and `stream` of the same a
            generator of its pieces.
          system: text of the system turn; None takes what the model's template has.
          defaults: options of all questions, of `OPTIONS`; see `Model.generate`.

        Raises:
          ValueError: an unknown option, or a system turn that is no text.
        """
        if system is not None and not isinstance(system, str):
            raise ValueError(f"system={system!r}: the text of the system turn is valid, or None")
        _check_options(defaults)
        self._model, self._defaults = model, defaults
        self._system = () if system is None else (("system", system),)
        self._turns, self._pictures = (), ()
        self._stream = lambda: None  # a weak reference, as a stream that nobody else holds is closed by that
        self._lock = threading.RLock()  # again by a stream that is closed as garbage meanwhile

    @property
    def messages(self) -> list[dict[str, str]]:
        """What was said, the system turn first: a conversation as `Model.generate` takes it, with `pictures`.

        Each `<image>` in what the user said stands for the next of them.
        """
        return [{"role": role, "content": text} for role, text in (*self._system, *self._turns)]

    @property
    def pictures(self) -> list:
        """The pictures that were shown, as `Model.generate` takes them: the bytes of files, or `PIL.Image`s."""
        return list(self._pictures)

    def ask(self, text, images=(), **options) -> str:
        """Answers the next question.

        Args:
          text: what the user says: text, or a list of parts; see `Model.generate`.
          images: the pictures that this question shows: one, or a list of them. They are kept, so that for later
            questions their files are not read again. Without `<image>` tags they come before the text.
          options: of `OPTIONS`; they replace the defaults of the chat for this question.

        Raises:
          ValueError, OSError: as `Model.generate`; the chat is as it was before.
        """
        question = self._question(text, images, options)
        answer = self._model.generate(**question.arguments)
        self._keep(question, answer)
        return answer

    def stream(self, text, images=(), **options):
        """As `ask`, but returns a generator of the pieces of the answer; joined they are the answer."""
        question = self._question(text, images, options)
        stream = self._follow(question, self._model.stream(**question.arguments))
        self._stream = weakref.ref(stream)
        return stream

    def clear(self):
        """Forgets all turns but the system's, and all pictures."""
        self._close_stream()
        with self._lock:
            self._turns, self._pictures = (), ()

    def _question(self, text, images, options):
        _check_options(options)
        query = read_turn(text, images)
        shown = [_own(picture) for picture in query.pictures]
        kept = [epath.Path(own).read_bytes() if _is_path(own) else own for own in shown]
        self._close_stream()
        with self._lock:
            turns, pictures = self._turns, self._pictures
        said = (*turns, query.turns[0])
        prompt = [{"role": role, "content": text} for role, text in (*self._system, *said)]
        arguments = {"images": [*pictures, *shown], "prompt": prompt, **self._defaults, **options}
        return _Question(turns, said, (*pictures, *kept), arguments)

    def _follow(self, question, pieces):
        said = []
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    said.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            self._keep(question, "".join(said))
            raise
        self._keep(question, "".join(said))

    def _keep(self, question, answer):
        """Appends a question and its answer to the turns before it."""
        if not answer.strip():
            return
        with self._lock:
            if self._turns is not question.before:
                raise ValueError("the conversation went on while this was answered; ask a chat one thing at a time")
            self._turns, self._pictures = (*question.turns, ("assistant", answer)), question.pictures

    def _close_stream(self):
        stream = self._stream()
        if stream is None:
            return
        if stream.gi_running:
            raise ValueError("this chat is being answered in another thread; ask a chat one thing at a time")
        stream.close()


@dataclasses.dataclass(frozen=True)
class _Question:
    """A question that waits for its answer.

    Attributes:
      before: `(role, text)` of the turns before it, without the system's.
      turns: with it.
      pictures: of those, to be kept with the answer. They are the ones of `arguments`, with the bytes of files in
        place of their names, which a message about a damaged one tells better.
      arguments: of `Model.generate`.
    """

    before: tuple[tuple[str, str], ...]
    turns: tuple[tuple[str, str], ...]
    pictures: tuple[Any, ...]
    arguments: dict[str, Any]


def _check_options(options):
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{name} is no option of a question; valid are {', '.join(OPTIONS)}")


def _own(picture):
    """A picture that stays as it is, whatever becomes of the user's: an image is decoded and copied."""
    if not isinstance(picture, Image.Image):
        return picture
    try:
        opened = open_picture(picture)
    except ValueError as error:
        raise ValueError(f"images: {error}") from error
    return opened.copy() if opened is picture else opened


def _is_path(picture):
    return not isinstance(picture, bytes | Image.Image)
