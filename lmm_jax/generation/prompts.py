"""What `Model.generate` is asked: the arguments of a user are checked, and become conversations with their pictures.

Whatever is wrong with an argument is a ValueError or an OSError whose sentence begins with the argument's name. All
of it is known before a picture is decoded and before the model runs.
"""

import dataclasses
import operator
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image

from lmm_jax.data.conversation import IMAGE_TAG, ROLES
from lmm_jax.data.images import image_size

A_PICTURE = "a picture is a path, a PIL.Image or the bytes of a file"
A_PROMPT = 'a prompt is a str, or a conversation: a list of {"role": …, "content": …}'


@dataclasses.dataclass(frozen=True)
class Query:
    """A conversation that waits for its answer.

    Attributes:
      name: what to call it in a message: "prompt", or "prompt 2 of 3".
      turns: `(role, text)` pairs with the roles of `ROLES`' values; the last is a user's.
      pictures: paths, bytes or `PIL.Image`s, one for each `<image>` in what users say, in order; not decoded yet.
      sizes: `(width, height)` of each, pixels.
    """

    name: str
    turns: tuple[tuple[str, str], ...]
    pictures: tuple[Any, ...]
    sizes: tuple[tuple[int, int], ...]

    def without_oldest_turn(self):
        """This without the first question, its answer and its pictures; None if there is but one question.

        A system turn stays.
        """
        first = int(self.turns[0][0] == "system")
        if len(self.turns) - first < 3:
            return None
        gone = self.turns[first][1].count(IMAGE_TAG)
        turns = (*self.turns[:first], *self.turns[first + 2 :])
        return Query(self.name, turns, self.pictures[gone:], self.sizes[gone:])


def read_queries(images, prompt, captions=False) -> tuple[list[Query], bool]:
    """The queries of a user, and whether they came as a list, so that a list is to be returned.

    Args:
      images: of one prompt a picture, a list of them, or None; of a list of prompts None, or a list that has for each
        prompt what one prompt takes.
      prompt: str, a conversation (a list of dicts with "role" and "content", both text, the last one a user's), or a
        list of strs and conversations. Pictures without an `<image>` tag in the text come before the first question.
      captions: whether the prompt may be empty, since the model describes pictures without being asked.

    Raises:
      ValueError, OSError: what is wrong with which of the two.
    """
    if isinstance(prompt, str) or _is_conversation(prompt):
        return [_query("prompt", prompt, "images", images, captions)], False
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt is {_kind(prompt)}; {A_PROMPT}, or a list of prompts")
    count = len(prompt)
    if images is None:
        images = [None] * count
    elif not isinstance(images, list | tuple):
        raise ValueError(
            f"images is {_kind(images)} for a list of {count} prompts; give a list with the pictures of each prompt"
        )
    elif len(images) != count:
        raise ValueError(
            f"images has {len(images)} entries for {count} prompts; give one for each, [] for a prompt without "
            "pictures, or no images at all"
        )
    names = [(f"prompt {n} of {count}", f"images[{n - 1}]") for n in range(1, count + 1)]
    return [
        _query(name, one, images_name, of, captions)
        for (name, images_name), one, of in zip(names, prompt, images, strict=True)
    ], True


def read_pictures(name, images) -> tuple:
    """The pictures of one prompt, whose files exist; `images` as of `read_queries`, called `name` in messages."""
    if images is None:
        return ()
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return (_picture(name, images),)
    if not isinstance(images, list | tuple):
        raise ValueError(f"{name} is {_kind(images)}; {A_PICTURE}, and several are a list")
    return tuple(_picture(f"{name}[{n}]", image) for n, image in enumerate(images))


def read_sizes(name, pictures) -> tuple[tuple[int, int], ...]:
    """`(width, height)` of pictures by their headers; ValueError names the one that has none."""
    try:
        return tuple(image_size(picture) for picture in pictures)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def read_number(name, value, valid="a whole number of 1 or more is valid") -> int:
    """A whole number of 1 or more; ValueError says what `name` is instead, and what is valid."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ValueError(f"{name}={reprlib.repr(value)} ({_kind(value)}): {valid}")
    return number


def read_numbers(name, value, count, many) -> list[int]:
    """`count` whole numbers, from one that holds for all or, where `many`, a list; errors as of `read_number`."""
    if not many or not isinstance(value, list | tuple):
        return [read_number(name, value)] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} prompts; give one number, or one for each")
    return [read_number(f"{name}[{n}]", one) for n, one in enumerate(value)]


def read_flag(name, value) -> bool:
    """True or False; ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={reprlib.repr(value)} ({_kind(value)}): True or False is valid")
    return value


def _query(name, prompt, images_name, images, captions):
    turns = _turns(name, prompt, captions)
    pictures = read_pictures(images_name, images)
    asked = [n for n, (role, _) in enumerate(turns) if role == "user"]
    tags = sum(turns[n][1].count(IMAGE_TAG) for n in asked)
    if not tags and pictures:
        role, text = turns[asked[0]]
        turns[asked[0]] = (role, f"{IMAGE_TAG}\n" * len(pictures) + text)
    elif tags != len(pictures):
        raise ValueError(
            f"{name}: {tags} <image> tags in the text, {len(pictures)} pictures in {images_name}; give as many, or "
            "leave out the tags, which puts the pictures first"
        )
    return Query(name, tuple(turns), pictures, read_sizes(images_name, pictures))


def _turns(name, prompt, captions):
    """`(role, text)` pairs of a prompt, the last a user's."""
    if isinstance(prompt, str):
        turns = [("user", prompt)]
    elif _is_conversation(prompt):
        turns = [_turn(f"{name}, turn {n}", turn) for n, turn in enumerate(prompt, start=1)]
    else:
        raise ValueError(f"{name} is {_kind(prompt)}; {A_PROMPT}")
    role, text = turns[-1]
    if role != "user":
        raise ValueError(f"{name}: the last turn has role '{role}'; the model answers a user, so end with a user's")
    if not text.strip() and not captions:
        raise ValueError(f"{name} is empty; say what is asked")
    for _, text in turns:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: the text is not valid Unicode ({error})") from error
    return turns


def _turn(name, turn):
    role, text = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name}: role {reprlib.repr(role)} is none of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise ValueError(
            f"{name}: content is {_kind(text)}; it is text, in which <image> stands for the next of images"
        )
    return ROLES[role], text


def _is_conversation(prompt):
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(turn, Mapping) for turn in prompt)


def _picture(name, image):
    """`image`, if it is of a kind that can be opened, and is there."""
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"{name} is {_kind(image)}; {A_PICTURE}")
    if not os.fspath(image).strip():
        raise ValueError(f"{name} is an empty name; {A_PICTURE}")
    path = epath.Path(image)
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as error:  # a name that no file can have, or a folder that may not be read
        raise OSError(f"{name}: {error}") from error
    if folder:
        raise IsADirectoryError(f"{name}: {image} is a folder; name a picture in it")
    if not exists:
        raise FileNotFoundError(f"{name}: no file {image}")
    return image


def _kind(value):
    """What a value is, for a message: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
