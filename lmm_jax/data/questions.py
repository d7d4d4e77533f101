"""The questions of a pack, which a router learns from: what it reads of each, and which answer belongs to which.

A router (`lmm_jax.models.router`) says of a question and its pictures how likely the model finds the answer at each
scale. It learns that from the losses of the answers that stand in the pack anyway. So a pack that is made for a model
with a router has three more arrays, for two questions about one picture of one grid, at two scales:

    question        [Q, I]   ids of the text of each question    4 9 7 -      8 3 - -        - = -1, padding
    question_grids  [Q, U]   the grids of its pictures           1 0          1 0
    answer          [K]      the question that each supervised   0 0 1 1 1    0 0 1 1 1     the copy at one scale,
                             position belongs to                                            then that at the other

A question is what a user said last, without the tags of pictures; its pictures are those that were shown up to there.
Answers that no picture comes before are the same at every scale; nothing is learned of them. The id that ends an
answer belongs to no question (-1): a model that knows how long answers are is always sure of it.
"""

import dataclasses

import numpy as np

from lmm_jax.data.conversation import IMAGE_TAG, ROLES, Turn, find_template
from lmm_jax.data.segments import NO_QUESTION

PADDING = -1  # behind the ids of a question


@dataclasses.dataclass(frozen=True)
class Question:
    """A question as a router reads it.

    Attributes:
      ids: `[n]` int32, of its text.
      pictures: pictures that were shown up to there.
      trained: whether an answer follows that is trained on.
    """

    ids: np.ndarray
    pictures: int
    trained: bool


def read_questions(turns, tokenizer, template, most) -> list[Question]:
    """The questions of a conversation, in order; the last may wait for its answer.

    Args:
      turns: `Turn`s or `(role, text)` pairs that `conversation.encode` takes.
      tokenizer: a `Tokenizer`.
      template: a name that `conversation.find_template` knows. One of captions leaves out what users say.
      most: ids of a question that are read; those behind are left out.
    """
    turns, captions = [Turn(*turn) for turn in turns], find_template(template).captions
    found, pictures = [], 0
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if ROLES[turn.role] == "user":
            pictures += turn.text.count(IMAGE_TAG)
            text = "" if captions else " ".join(turn.text.replace(IMAGE_TAG, " ").split())
            ids = tokenizer.encode(text)[:most] if text else []
            found.append(Question(np.array(ids, np.int32), pictures, following is not None and following.in_loss))
    return found


def pad_questions(questions, count, length) -> np.ndarray:
    """`[count, length]` int32, the ids of the first `count` questions, `PADDING` behind them."""
    out = np.full((count, length), PADDING, np.int32)
    for row, ids in zip(out, questions, strict=False):
        row[: len(ids)] = ids
    return out


@dataclasses.dataclass(frozen=True)
class PlacedQuestion:
    """A question of a pack.

    Attributes:
      ids: `[n]` int32, of its text.
      grids: numbers in the pack of the first grid of its pictures, and of the one behind the last.
    """

    ids: np.ndarray
    grids: tuple[int, int]


def question_arrays(questions, count, length, grids) -> dict[str, np.ndarray]:
    """What a router reads of the questions of a pack, see the module; those beyond `count` are left out.

    Args:
      questions: `PlacedQuestion`s.
      count, length: questions of a pack and ids of each that there is room for, Q and I.
      grids: grids of a pack, U.
    """
    shown = np.zeros((count, grids), np.int32)
    for row, question in zip(shown, questions, strict=False):
        row[slice(*question.grids)] = 1
    return {
        "question": pad_questions([question.ids for question in questions], count, length),
        "question_grids": shown,
    }


def answer_numbers(packed, segments, count) -> np.ndarray:
    """The question `[K]` int32 that each target of a pack belongs to; `NO_QUESTION` for none, or one beyond `count`.

    Args:
      packed: what `segments.pack` returned.
      segments: the segments that it was given, in that order.
      count: as of `question_arrays`.
    """
    at = packed["target_at"]
    every = packed["segment"].reshape(-1)
    out = np.full(len(at), NO_QUESTION, np.int32)
    for number, own in enumerate(segments, start=1):
        if own.question is not None:
            of_segment = (every[at] == number) & (packed["group"] > 0)
            out[of_segment] = own.question[at[of_segment] - np.argmax(every == number)]  # it lies in one piece
    return np.where(out < count, out, NO_QUESTION)
