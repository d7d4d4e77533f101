"""Turns to token ids, with what is supervised known by construction."""

import dataclasses

import numpy as np

IMAGE = -200  # stands in the ids where a picture's visual tokens go
IMAGE_TAG = "<image>"


@dataclasses.dataclass(frozen=True)
class Template:
    """Text around each turn.

    Attributes:
      system: before the first turn.
      user: before and after a user's text.
      assistant: before and after an assistant's text; the end piece follows it.
    """

    system: str = ""
    user: tuple[str, str] = ("", "")
    assistant: tuple[str, str] = ("", "")


# Bare questions and answers, told apart by the end piece alone.
TEMPLATES = {"qa": Template()}


def encode(turns, tokenizer, template):
    """Encodes a conversation; each turn is tokenised once, so the mask cannot drift from the ids.

    Args:
      turns: `(role, text)` pairs, roles alternating "user", "assistant"; a last user turn is left open, for the
        model to answer. `<image>` in a user's text stands for the next picture.
      tokenizer: a `Tokenizer`.
      template: name in `TEMPLATES`.

    Returns:
      ids `[n]` int32, `IMAGE` for each picture, and supervised `[n]` bool: answers and their end pieces.

    Raises:
      ValueError: an unknown template or role, roles out of turn, or an empty answer.
    """
    if template not in TEMPLATES:
        raise ValueError(f"data.template: no template '{template}'; known are {sorted(TEMPLATES)}")
    form = TEMPLATES[template]
    ids = [tokenizer.bos, *(tokenizer.encode(form.system) if form.system else ())]
    supervised = [False] * len(ids)
    for n, (role, text) in enumerate(turns):
        if role != ("user", "assistant")[n % 2]:
            raise ValueError(f"turn {n + 1} has role '{role}', expected '{('user', 'assistant')[n % 2]}'")
        if role == "user":
            new = _encode_user(form.user[0] + text + form.user[1], tokenizer)
        elif text.strip():
            new = [*tokenizer.encode(form.assistant[0] + text + form.assistant[1]), tokenizer.eos]
        else:
            raise ValueError(f"turn {n + 1}: empty answer")
        ids += new
        supervised += [role == "assistant"] * len(new)
    return np.array(ids, np.int32), np.array(supervised)


def _encode_user(text, tokenizer):
    head, *rest = text.split(IMAGE_TAG)
    ids = tokenizer.encode(head) if head.strip() else []
    for part in rest:
        ids.append(IMAGE)
        ids += tokenizer.encode(part.strip()) if part.strip() else []
    return ids
