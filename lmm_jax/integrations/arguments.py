"""What lmms-eval says to a model, in our words: options of loading, of generating, and messages with their pictures.

Nothing here imports lmms-eval. Whatever is wrong is a ValueError whose sentence begins with where it was said.
"""

import dataclasses
import inspect

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.generation.arguments import SEEDS, kind, read_number, read_real, read_sampling, shown
from lmm_jax.generation.model import load

WHOLE_OR_ZERO = "a whole number of 0 or more is valid"
NEW_TOKENS = 1024  # of an answer, where a task does not say; as lmms-eval's own LLaVA
# What the harness itself reads, or what is up to a model's own preprocessing, as with lmms-eval's own LLaVA.
NOT_OURS = ("max_agentic_steps", "visual_cot", "image_aspect_ratio")
ONE_ANSWER = ("num_beams", "n", "best_of", "num_return_sequences")  # of several, the harness takes the best


@dataclasses.dataclass(frozen=True)
class Generation:
    """How the answer to a request is generated.

    Attributes:
      max_new_tokens: tokens that it may have, if there is room.
      options: keyword arguments of `Model.request`.
      ignored: keys that nothing here knows, and that changed nothing.
    """

    max_new_tokens: int
    options: dict
    ignored: tuple[str, ...] = ()


def read_generation(gen_kwargs, number, seed) -> Generation:
    """The `Generation` that the `gen_kwargs` of a task ask for.

    Args:
      gen_kwargs: dict, None values are as good as absent. Answers are greedy unless `temperature` is above 0 (or
        `do_sample` is true and no temperature is given, which is 1) and `do_sample` is not false. `until` and
        `stop_sequences` are texts that end an answer.
      number: of the request among those of a call. Drawn answers to equal requests differ by it.
      seed: where `gen_kwargs` has none.

    Raises:
      ValueError: a value that means nothing, or that asks for what is not done here (beams).
    """
    given = {key: value for key, value in (gen_kwargs or {}).items() if value is not None}
    for key in ONE_ANSWER:
        if read_number(key, given.pop(key, 1), "a whole number is valid") != 1:
            raise ValueError(f"{key}: an answer is greedy or drawn here, one a request; say --gen_kwargs {key}=1")
    for key in NOT_OURS:
        given.pop(key, None)
    asked = given.pop("max_gen_toks", NEW_TOKENS)
    options = {
        "stop": _texts("until", given.pop("until", ())) + _texts("stop_sequences", given.pop("stop_sequences", ())),
        "repetition_penalty": given.pop("repetition_penalty", 1.0),
    }
    sampled = given.pop("do_sample", None)
    temperature = given.pop("temperature", 1.0 if sampled else 0.0)
    drawn = {key: given.pop(key) for key in ("top_p", "top_k") if key in given}
    seed = read_number("seed", given.pop("seed", seed), WHOLE_OR_ZERO, least=0)
    if sampled is not False and read_real("temperature", temperature, "a number from 0 to 100 is valid", 0, 100) > 0:
        options |= {"temperature": temperature, "seed": (seed + number) % SEEDS, **drawn}
    read_sampling(1, False, 1, **options)  # which says now what would be wrong with each question
    return Generation(
        max_new_tokens=read_number("max_new_tokens", given.pop("max_new_tokens", asked)),
        options=options,
        ignored=tuple(given),
    )


def read_load_options(given) -> dict:
    """Keyword arguments of `lmm.load`, from `model_args` that are not the plug-in's own.

    Raises:
      ValueError: one that `lmm.load` does not take.
    """
    known = list(inspect.signature(load).parameters)[1:]
    for key in given:
        if key not in known:
            raise ValueError(f"model_args: {key!r} is not known; beside those of the plug-in, {', '.join(known)} are")
    return {key: None if (key, value) == ("dtype", "auto") else value for key, value in given.items()}


def split_pictures(messages) -> tuple[list, list]:
    """Messages of a chat task as a prompt of `Model.request`, and the pictures that its `<image>` tags stand for.

    Where the text of a user's turn has as many `<image>` tags as the turn has pictures, the tags say where the
    pictures stand, as in the simple form of the same task. Otherwise each picture stands where its part stands.

    Args:
      messages: list of dicts with "role" and "content": text, or parts of type "text" or "image".

    Returns:
      images, prompt.
    """
    if not isinstance(messages, list | tuple) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"doc_to_messages gave {kind(messages)} ({shown(messages)}); a list of messages is expected")
    images, prompt = [], []
    for message in messages:
        parts = message.get("content")
        if message.get("role") == "user" and isinstance(parts, list | tuple) and _text_and_pictures(parts):
            pictures = [part["url"] for part in parts if part["type"] == "image"]
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            if pictures and text.count(IMAGE_TAG) == len(pictures):
                images += pictures
                message = {**message, "content": text}
        prompt.append(message)
    return images, prompt


def _text_and_pictures(parts):
    """Whether parts of a turn are what lmms-eval makes of text and pictures; `Model.request` judges any others."""
    key_of = {"text": "text", "image": "url"}
    return all(isinstance(part, dict) and key_of.get(part.get("type")) in part for part in parts)


def _texts(name, value):
    """A text, or a list of texts, as a list."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={shown(value)} ({kind(value)}): a text or a list of texts is valid")
    return list(texts)
