"""Turns to token ids, with what is supervised known by construction."""

import dataclasses
import itertools
import re
import typing

import numpy as np

from lmm_jax import families
from lmm_jax.families.kinds import SYSTEM, Prompt

IMAGE = -200  # stands in the ids where a picture's visual tokens go
IMAGE_TAG = "<image>"
NO_ANSWER = -1  # among the numbers of answers
TOO_LONG = ("cut", "refuse")  # policies of `truncate`

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Turn(typing.NamedTuple):
    """A turn of a conversation.

    Attributes:
      role: as in `ROLES`.
      text: what is said; `<image>` in a user's stands for the next picture.
      in_loss: whether an answer is trained on, or only read; of the other roles nothing is.
    """

    role: str
    text: str
    in_loss: bool = True


def find_template(name) -> Prompt:
    """The layout of a conversation that `config.data.template` names.

    Raises:
      ValueError: there is none of that name; the message lists them.
    """
    known = families.prompts()
    if name not in known:
        raise ValueError(f"data.template: no template '{name}'; known are {', '.join(known)}")
    return known[name]


NAMES_KEY, NAMES = "template_names", 2  # in files of today, beside a name that meant another layout before


def names_key(template) -> dict:
    """What is stored beside the name of a template, so that `stored_template` reads it as it is."""
    return {NAMES_KEY: NAMES} if template in families.RENAMED_PROMPTS else {}


def stored_template(template, beside) -> str:
    """Today's name of the template that a stored file names.

    Args:
      template: what stands there.
      beside: dict of what stands beside it.
    """
    return template if NAMES_KEY in beside else families.RENAMED_PROMPTS.get(template, template)


def template_for(config) -> str:
    """The template of a loaded model, from the contents of its `config.json`; nothing of the model is executed.

    Args:
      config: dict. `text_config.model_type` says what the decoder is; without it (LLaVA's own checkpoints) the type
        and architectures of the model do. Among a family's templates the name of the checkpoint decides.

    Raises:
      ValueError: a decoder whose template is not among ours.
    """
    text = config.get("text_config") or {}
    decoder = text.get("model_type") or " ".join([config.get("model_type", ""), *config.get("architectures", ())])
    name = (text.get("_name_or_path") or config.get("_name_or_path") or "").rstrip("/").split("/")[-1]
    family = _family_of(decoder.lower(), config.get("model_type") or "")
    rules = family.prompt_rules if family else ()
    told = f"{name} {decoder}".lower()
    template = next((template for pattern, template in rules if re.search(pattern, told)), None)
    if template is None:
        known = ", ".join(families.prompts())
        raise ValueError(f"no template for decoder '{decoder}', name '{name}'; set data.template to one of {known}")
    return template


def _family_of(decoder, whole):
    """The family of decoders whose prompts a model has, by what it says of its decoder and of itself; or None."""
    found = [f for f in families.DECODERS.values() if f.wholes and re.search(f.wholes, whole)]
    found += [f for f in families.DECODERS.values() if f.types and re.search(f.types, decoder)]
    return found[0] if found else None


# Pieces of a template that structure the prompt: `<|im_end|>`, `</s>`, `<start_of_turn>`. Brackets such as `[INST]`
# and `<<SYS>>` are ordinary text in the published layouts that have them.
STRUCTURAL = re.compile(r"<\|[^|\s]+\|>|(?<!<)</?\w+>(?!>)")

# Answers after which the end of a template must keep its id, where that end is text.
ANSWERS = ("a", "a cat", "a cat.", "2)")


def structural_pieces(template) -> tuple[str, ...]:
    """The pieces of a template that must be single ids, in order of appearance."""
    form = find_template(template)
    parts = (form.opening, *form.user, *form.assistant, *(form.picture or ()))
    found = [piece for part in parts for piece in STRUCTURAL.findall(part)]
    return tuple(dict.fromkeys(found))


def check_template(tokenizer, template):
    """Makes sure that a tokenizer has what structures a template's prompts, and one id that ends an answer.

    A marker that a tokenizer lacks would be spelled out in ordinary characters. The model would be trained on those,
    and an answer would end at the first `>`.

    Raises:
      ValueError: no template of that name, or one that does not fit the tokenizer; the message says which templates
        do.
    """
    problem = _misfit(tokenizer, template)
    if problem:
        fitting = [name for name in families.prompts() if not _misfit(tokenizer, name)]
        raise ValueError(
            f"template '{template}' does not fit this tokenizer (kind {tokenizer.kind}, {tokenizer.vocab_size:,} "
            f"ids), {problem}. Take the tokenizer of a model that was trained with '{template}', or let "
            "`lmm prepare` without --tokenizer train one that fits; templates that fit this one: "
            f"{', '.join(fitting) or 'none'}"
        )


def find_missing_rows(tokenizer, template, rows) -> str:
    """Whether a model has no row in its table of embeddings for an id that a prompt can have, as a sentence; else "".

    The placeholder of a picture is no id of a prompt, and neither are control pieces that the layout does not use.

    Args:
      tokenizer: a `Tokenizer`.
      template: of the prompts.
      rows: of the table.
    """
    of_texts = tokenizer.text_ids - 1
    while of_texts >= rows and not _is_of_texts(tokenizer, of_texts):
        of_texts -= 1
    of_layout = [i for piece in structural_pieces(template) for i in tokenizer.markup(piece) if isinstance(i, int)]
    largest = max(of_texts, -1 if tokenizer.bos is None else tokenizer.bos, *of_layout, stop_id(tokenizer, template))
    if largest < rows:
        return ""
    return (
        f"the tokenizer is larger than the table of its model: the piece {tokenizer.piece(largest)!r} has the id "
        f"{largest}, and the table has {rows:,} rows; take the tokenizer that the model was trained with"
    )


def _is_of_texts(tokenizer, i):
    """Whether an id can be one of a text's: there may be ids without a piece between others."""
    try:
        return tokenizer.piece(i) != IMAGE_TAG
    except (KeyError, IndexError):
        return False


def check_ids(ids, tokenizer, rows, name):
    """Raises ValueError if ids `[n]` of a text reach beyond a table of so many rows: they would be read as others."""
    beyond = [i for i in np.asarray(ids).tolist() if i >= rows]
    if beyond:
        raise ValueError(
            f"{name}: the piece {tokenizer.piece(beyond[0])!r} has the id {beyond[0]}, and the model's table has "
            f"{rows:,} rows; take the tokenizer that the model was trained with"
        )


def _misfit(tokenizer, template) -> str:
    """Why a template does not fit a tokenizer, as the end of a sentence; "" if it does."""
    items = {piece: tokenizer.markup(piece) for piece in structural_pieces(template)}
    missing = [piece for piece, found in items.items() if len(found) != 1 or isinstance(found[0], str)]
    if missing:
        return (
            f"which lacks {', '.join(missing)}: not single ids there but spelled out in ordinary characters, so that "
            "an answer would end at the first such character"
        )
    last = tokenizer.markup(find_template(template).assistant[1])[-1]
    if not isinstance(last, str):
        return ""
    end = tokenizer.encode(last, prefix=False)
    ends = [tokenizer.encode(answer + last)[-1:] for answer in ANSWERS]
    if len(end) != 1 or tokenizer.decode(end) != last or any(found != end for found in ends):
        return f"in which {last!r}, the end of an answer, is not an id of its own"
    return ""


def stop_id(tokenizer, template) -> int:
    """The id that ends an answer in a template: the last one that is supervised.

    Raises:
      ValueError: see `check_template`.
    """
    check_template(tokenizer, template)
    last = tokenizer.markup(find_template(template).assistant[1])[-1]
    return last if isinstance(last, int) else tokenizer.encode(last, prefix=False)[-1]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
      ids: `[n]` int32, `IMAGE` for each picture.
      supervised: `[n]` bool, answers that are trained on, and what ends them.
      turn_ends: `[answers]` int64, where each answer that is trained on ends: `ids[:end]` is a whole conversation.
    """

    ids: np.ndarray
    supervised: np.ndarray
    turn_ends: np.ndarray

    @property
    def images(self) -> int:
        """Pictures that the ids stand for."""
        return int((self.ids == IMAGE).sum())

    @property
    def answers(self) -> np.ndarray:
        """`[n]` number of the answer that each id stands in or before, among those that are trained on.

        `NO_ANSWER` for the ids that end them, as they are no part of what is said.
        """
        numbers = np.searchsorted(self.turn_ends, np.arange(len(self.ids)), side="right")
        numbers[self.turn_ends - 1] = NO_ANSWER
        return numbers


def encode(turns, tokenizer, template) -> Encoded:
    """Encodes a conversation; each turn is tokenised once, so the mask cannot drift from the ids.

    The ids are those of the whole prompt tokenised at once, except that control pieces written by data are spelled
    out, and that an answer never shares a piece with what stands before it: one that begins with a line break has a
    piece of its own for it, as it has when it is generated.

    Args:
      turns: `Turn`s, or `(role, text)` pairs. User and assistant alternate; a system turn may come before and takes
        the place of the template's system prompt; a last user turn is left open, for the model to answer. Where a
        `Prompt` says nothing of pictures, a single `<image>` is moved to the front of its turn, on a line of its own,
        as LLaVA's checkpoints were trained (not in "qa"); several stay where they are.
      tokenizer: a `Tokenizer`.
      template: a name that `find_template` knows.

    Raises:
      ValueError: an unknown template or role, roles out of turn, turns that the template has no place for, or an
        empty answer.
    """
    form = find_template(template)
    system, turns = _check_turns([Turn(*turn) for turn in turns], template)
    head, slot, tail = form.opening.partition(SYSTEM)
    before = [*tokenizer.markup(head), system if slot else "", *tokenizer.markup(tail)]
    if system is None:
        before = tokenizer.markup(form.without_system)
    ids, ends, prompt = [] if tokenizer.bos is None else [tokenizer.bos], [], []
    for role, text, _ in turns:
        if role == "user":
            prompt.append(_join([*before, *_user_items(text, form, tokenizer), *tokenizer.markup(form.user[1])]))
            before = tokenizer.markup(form.user[0])
        else:
            prompt.append(_join([*tokenizer.markup(form.assistant[0]), text, *tokenizer.markup(form.assistant[1])]))
    items = [item for turn in prompt for item in turn]
    if form.apart:
        encoded = [tokenizer.encode(item) if isinstance(item, str) else [item] for item in items]
    else:
        encoded = tokenizer.encode_items(items)
    rest, supervised = iter(encoded), [False] * len(ids)
    for (role, _, in_loss), turn in zip(turns, prompt, strict=True):
        new = [i for _ in turn for i in next(rest)]
        ids += new
        trained = role == "assistant" and in_loss
        supervised += [trained] * len(new)
        if trained:
            ends.append(len(ids))
    return Encoded(np.array(ids, np.int32), np.array(supervised), np.array(ends, np.int64))


def _check_turns(turns, template):
    """The system prompt, or None if there is none, and the other turns with our names for their roles."""
    form = find_template(template)
    system, named = form.system if form.without_system is None else None, []
    for number, (role, text, in_loss) in enumerate(turns, start=1):
        if role not in ROLES:
            raise ValueError(f"turn {number}: unknown role '{role}'; known are {', '.join(ROLES)}")
        text = text.strip() if form.trimmed else text
        role, expected = ROLES[role], ("user", "assistant")[len(named) % 2]
        if number == 1 and role == "system" and SYSTEM in form.opening:
            system = text
        elif number == 1 and role == "system":
            raise ValueError(f"turn 1: template '{template}' has no place for a system turn")
        elif role != expected:
            raise ValueError(f"turn {number} has role '{role}', expected '{expected}'")
        elif role == "assistant" and not text.strip():
            raise ValueError(f"turn {number}: empty answer")
        else:
            named.append(Turn(role, text, in_loss))
    if not named:
        raise ValueError("a conversation without turns")
    if form.captions and (len(named) > 2 or IMAGE_TAG not in named[0].text):
        raise ValueError(f"template '{template}' takes one turn with a picture, and its caption")
    return system, named


def _user_items(text, form, tokenizer):
    """Texts, `IMAGE`s and the ids beside them of a user's turn."""
    parts = text.split(IMAGE_TAG)
    if form.picture is not None:
        first, *others = [parts[0], *(part.removeprefix("\n") for part in parts[1:])]
        around = [*tokenizer.markup(form.picture[0]), IMAGE, *tokenizer.markup(form.picture[1])]
        begins = form.before_text if first or not others else ""
        return [begins + first, *(item for part in others for item in (*around, part))]
    if form.captions:
        parts = [""] * len(parts)
    elif form.apart:
        parts = [part.strip() for part in parts]
    elif len(parts) == 2:
        question = "".join(parts).strip()
        parts = ["", f"\n{question}" if question else ""]
    return [parts[0], *(item for part in parts[1:] for item in (IMAGE, part))]


def _join(items):
    """`items` with neighbouring texts made one and empty ones left out."""
    groups = itertools.groupby(items, key=lambda item: isinstance(item, str))
    joined = [["".join(group)] if texts else list(group) for texts, group in groups]
    return [item for group in joined for item in group if item != ""]


def truncate(encoded, visual_lengths, max_length, policy) -> Encoded:
    """Makes a training sample fit, and refuses one that would train nothing.

    The references cut a sample at the token where it becomes too long, inside an answer or a picture; here what stays
    is a whole conversation.

    Args:
      encoded: an `Encoded`.
      visual_lengths: positions of each picture, in order of appearance.
      max_length: positions that the sample may take, pictures included.
      policy: "cut" at the last end of an answer that fits and is trained on, or "refuse".

    Returns:
      `encoded` up to its last answer that is trained on, or to an earlier one; `images` says how many pictures are
      left.

    Raises:
      ValueError: tags that do not match the pictures, too long and not to be cut, no answer that ends early enough,
        or no supervised token.
    """
    if policy not in TOO_LONG:
        raise ValueError(f"data.too_long='{policy}' is none of {', '.join(TOO_LONG)}")
    if len(visual_lengths) != encoded.images:
        raise ValueError(f"{encoded.images} <image> tags in the text, {len(visual_lengths)} pictures")
    if not len(encoded.turn_ends):
        raise ValueError("no supervised token: the sample has no answer that is trained on")
    width = np.ones(len(encoded.ids), np.int64)
    width[encoded.ids == IMAGE] = visual_lengths
    positions = np.cumsum(width)  # positions[n - 1]: what the first n ids take
    fitting = encoded.turn_ends[positions[encoded.turn_ends - 1] <= max_length]
    if len(fitting) < len(encoded.turn_ends):
        problem = f"{positions[-1]} positions, room for {max_length}; raise data.length"
        if policy == "refuse":
            raise ValueError(f"{problem} or set data.too_long=cut")
        if not len(fitting):
            raise ValueError(f"{problem}: no supervised token is left, as not even the first answer ends before that")
    return Encoded(encoded.ids[: fitting[-1]], encoded.supervised[: fitting[-1]], fitting)
