"""What a task asks."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      images: pictures, as `Model.generate` takes them; paths are opened only when they are asked about.
      question: text.
      answers: the true answers, of which any will do; () where only a server knows them.
      kind: kind of question; scores are averaged by kind and reported under its name.
      history: `(role, text)` pairs, what was said before the question: each question with its answer, perhaps a
        system turn before them. `<image>` in it and in the question stands for the next picture.
      id: as the benchmark numbers it, for submission files; "" if it does not.
      group: of questions that are no independent samples, as they are about one picture: its name; "" for those that
        share their `images`.
    """

    images: tuple[Any, ...]
    question: str
    answers: tuple[str, ...]
    kind: str
    history: tuple[tuple[str, str], ...] = ()
    id: str | int = ""
    group: str = ""
