"""What a task asks."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      images: pictures, as `Model.generate` takes them; paths are opened only when they are asked about.
      question: text.
      answers: the true answers, of which any will do.
      kind: kind of question; scores are averaged by kind and reported under its name.
    """

    images: tuple[Any, ...]
    question: str
    answers: tuple[str, ...]
    kind: str
