"""Many questions for one model: from a file, or the same one about every picture of a folder.

    {"id": "a", "prompt": "What is it?", "image": "cat.jpg", "scale": 9, "max_new_tokens": 20}
    {"messages": [{"role": "user", "content": "And what is <image>?"}], "images": ["dog.jpg"]}

A line that cannot be used is told by file and line. All that can be known of it without a model is known here, before
minutes are spent on loading one.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from lmm_jax.data.prepare.keys import IMAGES, NAME, PICTURE_FILE
from lmm_jax.data.prepare.picture_names import read_pictures, safe_path
from lmm_jax.data.prepare.refused import Refused
from lmm_jax.generation.arguments import SEEDS, kind, read_flag, read_number, read_sampling, shown
from lmm_jax.generation.chat import OPTIONS
from lmm_jax.generation.prompts import read_queries

PROMPTS = ("prompt", "messages")
KEYS = ("id", *PROMPTS, *IMAGES, *OPTIONS)
SHOWN = 200  # characters of a picture's data URL, or of another long text, that are repeated in an answer


@dataclasses.dataclass
class Question:
    """One of many.

    Attributes:
      id: str or int; no two of a file have equal ones.
      where: what to call it in a message: "asks.jsonl, line 3".
      said: `{"prompt": …, "images": […]}` or `{"messages": …, "images": […]}`, as the user said it.
      prompt, images: arguments of `Model.generate`.
      options: further ones, those of `chat.OPTIONS` that were given.
      error: why it cannot be asked; "" if nothing is known against it.
    """

    id: str | int
    where: str
    said: dict[str, Any]
    prompt: Any = ""
    images: Any = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""


def check_options(options):
    """Checks options of `chat.OPTIONS` as far as that is possible without a model; ValueError names the wrong one."""
    options = dict(options)
    options.pop("scale", None)
    read_flag("truncate", options.pop("truncate", False))
    if options.get("max_new_tokens") is not None:
        read_number("max_new_tokens", options["max_new_tokens"])
    options.pop("max_new_tokens", None)
    if options.get("max_pixels") is not None:
        read_number("max_pixels", options["max_pixels"])
    options.pop("max_pixels", None)
    read_sampling(1, False, 2**31, **options)


def read_questions(path, images=None, follow_links=False, shown_to_all=(), options=None) -> list[Question]:
    """The questions of a file: JSONL, or text with one question a line if its name ends in `.txt`.

    Args:
      path: of the file; empty lines are none.
      images: folder that the names of pictures are relative to, and lead into; that of the file if None.
      follow_links: see `picture_names.safe_path`.
      shown_to_all: pictures of every question of a text file.
      options: those of every question that does not have its own. Question number i from 0 has seed + i.

    Raises:
      ValueError, OSError: the file cannot be read, or holds no question; `shown_to_all` for JSONL.
    """
    path = epath.Path(path)
    plain, name = path.suffix.lower() == ".txt", path.name
    if shown_to_all and not plain:
        raise ValueError(
            f"--image goes with --prompt, or with a text file; the lines of {name} name their own pictures"
        )
    folder = os.path.dirname(os.path.abspath(path)) if images is None else os.fspath(images)
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"--images: no folder {folder}")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"--prompts: no file {path}") from None
    questions, places = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        read = _plain if plain else _item
        question = _read(number, where, line, lambda text, q, read=read: read(text, q, folder, follow_links))
        if plain:
            question.images = list(shown_to_all)
            question.said["images"] = [str(picture) for picture in shown_to_all]
        other = places.setdefault(str(question.id), number)
        if other != number:
            question.error = (
                question.error or f"id {shown(question.id)} is that of line {other}, too; give each its own"
            )
        questions.append(question)
    if not questions:
        raise ValueError(f"--prompts: {path} holds no question")
    _complete(questions, options or {})
    return questions


def questions_about(folders, prompt, options=None) -> list[Question]:
    """The same question about every picture of some folders and of the folders in them, sorted by their names.

    Files and folders whose names begin with a dot are left out, and files that do not end as pictures do.

    Raises:
      FileNotFoundError: a folder holds none.
    """
    questions, one = {}, len(folders) == 1
    for folder in folders:
        found = sorted(_pictures_in(folder))
        if not found:
            raise FileNotFoundError(f"--image: no picture in the folder {folder} (.jpg, .png, .webp, …)")
        for name in found:
            path = os.path.join(folder, name)
            said = {"prompt": prompt, "images": [path]}
            questions[path] = Question(name if one else path, path, said, prompt, [path])
    questions = list(questions.values())
    _complete(questions, options or {})
    return questions


def _pictures_in(folder):
    """Names of the pictures in a folder, relative to it."""
    for path, folders, files in epath.Path(folder).walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if PICTURE_FILE.search(name) and not name.startswith("."):
                yield os.path.relpath(os.path.join(path, name), folder)


def _read(number, where, line, read):
    """The question of a line, by `read(text, question)`, or with what is wrong with it."""
    question = Question(number, where, {})
    try:
        text = line.decode().strip()
    except UnicodeDecodeError as error:
        question.error = f"it is not UTF-8: {error.reason} at byte {error.start + 1}"
        return question
    try:
        read(text, question)
    except Refused as error:
        question.error = error.detail or error.reason
    except (ValueError, OSError) as error:
        question.error = str(error)
    return question


def _plain(text, question, *_):
    question.prompt, question.said = text, {"prompt": text}


def _item(text, question, folder, follow_links):
    """Fills in a question of JSON."""
    item = _parse(text)
    if "id" in item:
        if isinstance(item["id"], bool) or not isinstance(item["id"], str | int) or item["id"] == "":
            raise ValueError(f"id {shown(item['id'])} is {kind(item['id'])}; text or a whole number is valid")
        question.id = item["id"]
    unknown = [key for key in item if key not in KEYS]
    if unknown:
        raise ValueError(f"the key {shown(unknown[0])} is not known; valid keys are {', '.join(KEYS)}")
    given = {key: value for key, value in item.items() if value is not None}
    for keys, what in ((PROMPTS, "the question"), (IMAGES, "the pictures")):
        if all(key in given for key in keys):
            raise ValueError(f"both {' and '.join(keys)} hold {what}; leave one out")
    if not any(key in given for key in PROMPTS):
        raise ValueError('no question: "prompt" is its text, or "messages" a conversation')

    def place(value, name):
        """Where each picture is that a value names: paths, or bytes."""
        return [x if isinstance(x, bytes) else safe_path(folder, x, follow_links) for x in read_pictures(value, name)]

    images = next((given[key] for key in IMAGES if key in given), [])
    question.said = {key: given[key] for key in PROMPTS if key in given}
    question.said["images"] = images if isinstance(images, list) else [images]
    question.images = place(images, "picture")
    question.prompt = given["prompt"] if "prompt" in given else _placed(given["messages"], place)
    if "prompt" in given and not isinstance(given["prompt"], str):
        raise ValueError(f'"prompt" is {kind(given["prompt"])}; it is text, and "messages" is a conversation')
    if "messages" in given and not isinstance(given["messages"], list):
        raise ValueError(f'"messages" is {kind(given["messages"])}; a list of {{"role": …, "content": …}} is valid')
    question.options = {key: given[key] for key in OPTIONS if key in given}


def _parse(text):
    """The object of a line, whose keys are all different."""

    def unlike(pairs):
        item = dict(pairs)
        if len(item) < len(pairs):
            twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
            raise Refused("", f"the key {shown(twice)} stands there twice; leave one out")
        return item

    try:
        item = json.loads(text, object_pairs_hook=unlike)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"broken JSON: {error.msg} at character {error.pos + 1}: {text[error.pos :][:40]!r}"
        ) from error
    except RecursionError as error:
        raise ValueError("broken JSON: it is nested too deeply") from error
    if not isinstance(item, dict):
        raise ValueError(
            f'a line is an object, such as {{"prompt": "What is it?", "image": "cat.jpg"}}, not {kind(item)}'
        )
    return item


def _placed(messages, place):
    """Messages with the places of their parts' pictures; what is no message is left for others to refuse."""

    def of_value(value, name):
        if isinstance(value, Mapping):
            return {key: of_value(x, name) if key in ("url", "path") else x for key, x in value.items()}
        return place(value, name)[0] if isinstance(value, str) and value else value

    def of_part(part, name):
        if not isinstance(part, Mapping):
            return part
        return {key: of_value(value, name) if key in NAME else value for key, value in part.items()}

    def of_turn(turn, number):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), list):
            return turn
        named = enumerate(turn["content"], start=1)
        return {**turn, "content": [of_part(part, f"turn {number}, part {n}") for n, part in named]}

    if not isinstance(messages, list):
        return messages
    return [of_turn(turn, number) for number, turn in enumerate(messages, start=1)]


def _complete(questions, options):
    """Gives the questions the options of all, and checks what they have then."""
    seed = read_number("seed", options.get("seed", 0), least=0, most=SEEDS - 1)
    for n, question in enumerate(questions):
        question.options = {**options, "seed": (seed + n) % SEEDS, **question.options}
        if question.error:
            continue
        try:
            read_queries(question.images, question.prompt, captions=True)
            check_options(question.options)
        except (ValueError, OSError) as error:
            question.error = str(error)


def abbreviated(value):
    """What was said, without the data of pictures that were said as text."""
    if isinstance(value, str):
        return value if len(value) <= SHOWN or value[:5].lower() != "data:" else f"{value[:SHOWN]}…"
    if isinstance(value, Mapping):
        return {key: abbreviated(x) for key, x in value.items()}
    return [abbreviated(x) for x in value] if isinstance(value, list) else value
