"""Tasks: where examples come from and how an answer is scored."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
      images: pictures, as `Model.generate` takes them.
      question: text.
      answer: the true answer.
      kind: kind of question; scores are averaged by kind.
    """

    images: tuple[Any, ...]
    question: str
    answer: str
    kind: str
