"""What `Model.generate` is asked: the arguments of a user are checked, and become conversations with their pictures.

Whatever is wrong with an argument is a ValueError or an OSError whose sentence begins with the argument's name. All
of it is known before a picture is decoded and before the model runs.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from PIL import Image

from lmm_jax.data.conversation import IMAGE_TAG, ROLES
from lmm_jax.data.images import image_size
from lmm_jax.data.prepare.keys import CALLS, IMAGES, KNOWN, MEDIA, NAME, PARTS, REFUSED_PARTS, REFUSED_ROLES
from lmm_jax.data.prepare.picture_names import file_name
from lmm_jax.data.prepare.picture_names import read_pictures as read_names
from lmm_jax.data.prepare.refused import Refused
from lmm_jax.generation.arguments import kind, shown

A_PICTURE = "a picture is a path, a PIL.Image or the bytes of a file"
A_PART = 'a part is {"type": "text", "text": …}, {"type": "image"}, or {"type": "image", "image": …} with a picture'
A_PROMPT = 'a prompt is a str, or a conversation: a list of {"role": …, "content": …}'
REFUSED_KEYS = {**MEDIA, **CALLS}  # of a turn
REMOTE = re.compile(r"\s*(https?|ftps?|wss?)://", re.IGNORECASE)  # what a browser would fetch


@dataclasses.dataclass(frozen=True)
class Query:
    """A conversation that waits for its answer.

    Attributes:
      name: what to call it in a message: "prompt", or "prompt 2 of 3".
      turns: `(role, text)` pairs with the roles of `ROLES`' values; the last is a user's.
      pictures: paths, bytes or `PIL.Image`s, one for each `<image>` in what users say, in order; not decoded yet.
        Those that parts of a turn carried stand among those of `images`.
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
      prompt: str, a conversation (a list of dicts with "role" and "content", the last one a user's), or a list of
        strs and conversations. Content is text, or a list of parts:

            {"type": "text", "text": "What is it?"}
            {"type": "image"}                           the next of `images`
            {"type": "image", "image": "cat.jpg"}       a picture of its own: whatever is one in `images`

        The key may also be `path`, `url` or `image_url`, with the URL of a file or a data URL too; nothing is
        fetched from elsewhere. A part of an image is `<image>` and a line break in the text of its turn, as in rows
        that are trained on. In the text of a user `<image>` always stands for the next of `images`, whoever typed it,
        in a part as elsewhere: there are as many of them and of parts without a picture as there are `images`, else
        the prompt is refused. Pictures with neither tag nor part come before the first question.
      captions: whether the prompt may be empty, since the model describes pictures without being asked.

    Raises:
      ValueError, OSError: what is wrong with which of the two.
    """
    if isinstance(prompt, str) or _is_conversation(prompt):
        return [_query("prompt", prompt, "images", images, captions)], False
    if not isinstance(prompt, list | tuple):
        raise ValueError(f"prompt is {kind(prompt)}; {A_PROMPT}, or a list of prompts")
    count = len(prompt)
    if images is None:
        images = [None] * count
    elif not isinstance(images, list | tuple):
        raise ValueError(
            f"images is {kind(images)} for a list of {count} prompts; give a list with the pictures of each prompt"
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


def read_turn(content, images) -> Query:
    """What a user says next in a conversation, called "text" in messages: text or parts, with their pictures.

    Args:
      content, images: as of one prompt of `read_queries`. Pictures with neither tag nor part come before the text.
    """
    return _query("text", [{"role": "user", "content": content}], "images", images, captions=False)


def read_pictures(name, images) -> tuple:
    """The pictures of one prompt, whose files exist; `images` as of `read_queries`, called `name` in messages."""
    if images is None:
        return ()
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        return (_picture(name, images),)
    if not isinstance(images, list | tuple):
        raise ValueError(f"{name} is {kind(images)}; {A_PICTURE}, and several are a list")
    return tuple(_picture(f"{name}[{n}]", image) for n, image in enumerate(images))


def read_sizes(name, pictures) -> tuple[tuple[int, int], ...]:
    """`(width, height)` of pictures by their headers; ValueError names the one that has none."""
    try:
        return tuple(image_size(picture) for picture in pictures)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _query(name, prompt, images_name, images, captions):
    said = _turns(name, prompt, captions)
    turns = [(role, text) for role, text, _ in said]
    places = [own for *_, owns in said for own in owns]
    given = read_pictures(images_name, images)
    free = sum(own is None for own in places)
    if not places and given:
        first = next(n for n, (role, _) in enumerate(turns) if role == "user")
        turns[first] = ("user", f"{IMAGE_TAG}\n" * len(given) + turns[first][1])
        places = [None] * len(given)
    elif free != len(given):
        raise ValueError(_unlike(name, prompt, free, images_name, given))
    following = iter(given)
    named = [(images_name, next(following)) if own is None else own for own in places]
    sizes = [read_sizes(picture_name, [picture])[0] for picture_name, picture in named]
    return Query(name, tuple(turns), tuple(picture for _, picture in named), tuple(sizes))


def _unlike(name, prompt, free, images_name, given):
    """The sentence for more or fewer places than pictures."""
    plain = isinstance(prompt, str) or all(isinstance(turn["content"], str) for turn in prompt)
    of_parts = "" if plain else " and image parts without a picture of their own"
    or_none = ", or leave out the tags, which puts the pictures first" if plain else ""
    return (
        f"{name}: {free} <image> tags{of_parts} in the text, {len(given)} pictures in {images_name}; give as many"
        f"{or_none}"
    )


def _turns(name, prompt, captions):
    """`(role, text, owns)` of each turn of a prompt, the last a user's; see `_content` for the latter."""
    if isinstance(prompt, str):
        turns = [("user", *_content(name, "user", prompt))]
    elif _is_conversation(prompt):
        turns = [_turn(f"{name}, turn {n}", turn) for n, turn in enumerate(prompt, start=1)]
    else:
        raise ValueError(f"{name} is {kind(prompt)}; {A_PROMPT}")
    role, text, _ = turns[-1]
    if role != "user":
        raise ValueError(f"{name}: the last turn has role '{role}'; the model answers a user, so end with a user's")
    if not text.strip() and not captions:
        raise ValueError(f"{name} is empty; say what is asked")
    for _, text, _ in turns:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: the text is not valid Unicode ({error})") from error
    return turns


def _turn(name, turn):
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = f"none of {', '.join(ROLES)}"
        if role is None and "type" in turn:
            raise ValueError(f"{name} is a part and no turn; parts are the content of a turn, a list of them")
        refused = isinstance(role, str) and role in REFUSED_ROLES
        raise ValueError(f"{name}: role {shown(role)}{_reason(REFUSED_ROLES, role) if refused else ''} is {known}")
    for key in (key for key, value in turn.items() if not _is_nothing(value)):
        if key in REFUSED_KEYS:
            raise ValueError(f"{name} has the key '{key}'{_reason(REFUSED_KEYS, key)}; leave it out")
        if key in IMAGES or key in NAME:
            raise ValueError(
                f"{name} has the key '{key}'; pictures are parts of a turn's content, or tags in it that stand for "
                "those in images"
            )
    return ROLES[role], *_content(name, ROLES[role], turn.get("content"))


def _content(name, role, content):
    """`(text, owns)` of what is said in a turn.

    `owns` has an entry for each `<image>` in the text of a user: None where it stands for the next of `images`, else
    `(name, picture)` of the part that it is.
    """
    if isinstance(content, list | tuple):
        parts = [_part(f"{name}, part {n}", role, part) for n, part in enumerate(content, start=1)]
        text, owns = "".join(text for text, _ in parts), [own for _, owns in parts for own in owns]
        if role == "user" and text.count(IMAGE_TAG) != len(owns):
            raise ValueError(f"{name}: where two of its parts meet there is an <image>; write a tag into one part")
        return text, owns
    if not isinstance(content, str):
        raise ValueError(
            f"{name}: content is {kind(content)}; it is text, in which <image> stands for the next of images, or a "
            f"list of parts; {A_PART}"
        )
    return content, [None] * (content.count(IMAGE_TAG) if role == "user" else 0)


def _part(name, role, part):
    """`(text, owns)` of one part, see `_content`."""
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {kind(part)}; {A_PART}")
    names = [key for key in NAME if part.get(key) is not None]
    text = part.get("text")
    type_ = part.get("type")
    if type_ is None:  # Qwen's are {"text": …} and {"image": …}
        type_ = "image" if names and text is None else "text"
    if not isinstance(type_, str) or type_ not in PARTS:
        reason = _reason(REFUSED_PARTS, type_) if isinstance(type_, str) and type_ in REFUSED_PARTS else ""
        raise ValueError(f"{name} is of type {shown(type_)}{reason}; valid types are {', '.join(PARTS)}")
    unknown = [key for key, value in part.items() if key not in KNOWN["part"] and not _is_nothing(value)]
    if unknown:
        raise ValueError(f"{name} has the key {shown(unknown[0])}, which is not known; {A_PART}")
    if type_ == "text":
        if names or not isinstance(text, str):
            found = f"has the key '{names[0]}'" if names else f"its text is {kind(text)}"
            raise ValueError(f"{name} is of type 'text', but {found}; {A_PART}")
        return _content(name, role, text)
    if text is not None:
        raise ValueError(f"{name} is of type '{type_}', but has the key 'text'; {A_PART}")
    if role != "user":
        raise ValueError(f"{name} is a picture in a turn of role '{role}'; pictures are shown by a user")
    if len(names) > 1:
        raise ValueError(f"{name} has the keys {' and '.join(names)}; a part has one picture, so leave one out")
    own = (name, _own_picture(name, part[names[0]])) if names else None
    return f"{IMAGE_TAG}\n", [own]


def _own_picture(name, value):
    """The picture that a part carries: what one of `images` may be, or one of the wrappings of other libraries."""
    if isinstance(value, Mapping) and "url" in value and value.keys() <= {"url", "detail"}:
        value = value["url"]  # OpenAI's; the detail of a picture is the scale of the call
    elif isinstance(value, Mapping) and value.keys() <= {"bytes", "path"}:
        (value,) = _names(name, dict(value))  # as `datasets` has them
    return _picture(name, value)


def _reason(table, key):
    reason, _ = table[key]
    return f" ({reason}, which the models here do not take)"


def _is_nothing(value):
    """Whether a key is as good as absent: of None, or an empty text, list or object."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def _is_conversation(prompt):
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(turn, Mapping) for turn in prompt)


def _picture(name, image):
    """`image`, if it is of a kind that can be opened, and is there; of a data URL its bytes, of a file's its path."""
    if isinstance(image, str):
        (image,) = _names(name, image)
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"{name} is {kind(image)}; {A_PICTURE}")
    if isinstance(image, str):
        image = file_name(image)
        if REMOTE.match(image):
            raise ValueError(f"{name} is the URL {image[:200]}; nothing is fetched: download it and name the file")
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


def _names(name, value):
    """What `read_names` makes of a value of one picture; ValueError begins with `name`."""
    try:
        return read_names(value, name)
    except Refused as error:
        raise ValueError(error.detail) from error
