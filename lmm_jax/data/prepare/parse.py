"""Reading conversations as people have them: LLaVA's rows, and role/content rows of chat templates.

    {"id": …, "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}
    {"id": …, "images": ["a.jpg"], "messages": [{"role": "user", "content": "…" or [{"type": "image"}, …]}, …]}

A key that is null, or holds nothing else, counts as absent everywhere: tables write each key into each row. A key
that changes what is trained is honoured, or refuses the row by its name. All others are ignored and counted, see
`Row`. A row that cannot be used raises `Refused` with a reason that can be counted; nothing is repaired silently.
"""

import dataclasses
import json

from lmm_jax.data.conversation import IMAGE_TAG, ROLES, Turn
from lmm_jax.data.prepare.keys import (
    AUDIO,
    IMAGES,
    MEDIA_MARK,
    NAME,
    OTHER_TAGS,
    PARTS,
    PICTURE_MARK,
    REFUSED_PARTS,
    REFUSED_ROLES,
    ROLE,
    SPLITS,
    SYSTEM,
    TEXT,
    TURNS,
    VIDEO,
    check_row_weight,
    is_in_loss,
    pick,
    unknown_keys,
)
from lmm_jax.data.prepare.picture_names import read_pictures
from lmm_jax.data.prepare.refused import Refused, is_absent, kind_of, short

MAX_DIGITS = "a number of more than 4,300 digits"  # which Python refuses to read


@dataclasses.dataclass(frozen=True)
class Row:
    """A conversation of any layout.

    Attributes:
      id: as in the file, or the row's number.
      images: its pictures: the names of their files, or their encoded bytes where the row holds them.
      turns: its turns; role is "user", "assistant" or "system".
      kinds: of question, of each turn: its key `kind`, or that of the row; empty where neither has one.
      split: that the row's key `split` names, one of `SPLITS`; None if it names none.
      ignored: keys that are not known and hold something, as "row.source", "turn.time" or "part.detail", once for
        each time that they do.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    kinds: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    split: str | None = None


def parse_row(row, number) -> Row:
    """One row of either layout.

    Args:
      row: JSON of an object, or the dict that it is in a Parquet file.
      number: of the row in its file, used as id if it has none.

    Raises:
      Refused: broken JSON, no object, no conversation, an unknown role, a turn that is no text, a key that is not
        taken, text that is not UTF-8.
    """
    try:
        item = json.loads(row, object_pairs_hook=_object) if isinstance(row, str) else row
        item = _held(item) if isinstance(item, dict) else item
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused("broken JSON", _said(error)) from error
    if not isinstance(item, dict):
        raise Refused("not an object", f"it is {kind_of(item)}; a row is an object with turns")
    given = item.get("id")
    id = str(given if isinstance(given, (str, int, float)) else number)
    try:
        row = Row(id, *_conversation(item))
        names = [image for image in row.images if isinstance(image, str)]
        "\n".join([id, *names, *row.kinds, *(turn.text for turn in row.turns)]).encode()
    except Refused as error:
        raise Refused(error.reason, error.detail, id) from error
    except UnicodeEncodeError as error:
        raise Refused("text is not UTF-8", _not_utf8(error), id) from error
    return row


def _object(pairs):
    """The object of some keys and values; as `object_pairs_hook` of `json`, which takes the last of equal keys."""
    item = dict(pairs)
    if len(item) == len(pairs):
        return item
    item = {}
    for key, value in pairs:
        if key in item and not is_absent(value) and not is_absent(item[key]) and item[key] != value:
            raise Refused("keys contradict each other", f"an object has the key {key[:80]!r} twice; leave one out")
        if is_absent(item.get(key)):
            item[key] = value
    return item


def _said(error):
    """What is wrong with a text that is no JSON."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return MAX_DIGITS if "digits" in str(error) else str(error)
    problem = "something follows the row" if error.msg == "Extra data" else error.msg
    return f"{problem}, at character {error.pos + 1}: {error.doc[error.pos :][:40]!r}"


def _not_utf8(error):
    """Where a text holds what is no character: bytes of another encoding, or half of a pair of UTF-16."""
    found = ord(error.object[error.start])
    # As `surrogateescape` keeps them; the others were written as \\ud800.
    what = f"byte 0x{found - 0xDC00:02X}" if 0xDC80 <= found <= 0xDCFF else f"half of a pair of UTF-16, \\u{found:x}"
    before = error.object[max(0, error.start - 30) : error.start].rpartition("\n")[2]
    return f"{what} after {before!r}; write the file as UTF-8"


def _held(item):
    """What an object holds, without the keys that are absent."""
    return {key: value for key, value in item.items() if not is_absent(value)}


def _conversation(item):
    """`(images, turns, kinds, ignored, split)` of a row, as `_held` gives it."""
    given = _list_of_turns(item)
    unnamed = []  # unknown keys that seem to hold pictures
    ignored = unknown_keys(item, "row", "the row", unnamed) + check_row_weight(item)
    split = item.get("split")
    if isinstance(split, str) and split.lower() in SPLITS:
        split = SPLITS[split.lower()]
    elif split is not None:
        split = ignored.append("row.split")
    images = read_pictures(pick(item, IMAGES, "the row"), "picture")
    named, turns, kinds = [], [], []
    system = pick(item, SYSTEM, "the row")
    if system is not None:
        if not isinstance(system, str):
            raise Refused("turn without text", f"the row's system is {kind_of(system)}, not text")
        turns.append(Turn("system", system))
        kinds.append(_kind_of_question(item, {}))
    for n, turn in enumerate(given, start=1):
        if not is_absent(turn):
            turns.append(_turn(turn, named, ignored, unnamed, f"turn {n}"))
            kinds.append(_kind_of_question(item, turn))
    if system is not None and any(turn.role == "system" for turn in turns[1:]):
        raise Refused("keys contradict each other", "both the row and one of its turns give a system prompt")
    for tag, keys in OTHER_TAGS.items():
        holding = [key for key in keys if key in item]
        if holding and any(tag in turn.text for turn in turns):
            where = f"{tag} stands for the row's {holding[0]}"
            raise Refused("marks for boxes", f"{where}; write the boxes into the text")
    if images and named:
        raise Refused("tags do not match pictures", "pictures are named both by the row and inside its turns")
    if unnamed and not images and not named:
        raise Refused("picture under another key", f"{unnamed[0]}; a row's pictures are called image or images")
    _check_marks([turn.text for turn in turns if turn.role == "user"])
    return tuple(images or named), tuple(turns), tuple(kinds), tuple(ignored), split


def _check_marks(texts):
    """Refuses a user's texts that mark a picture, video or sound otherwise than by `<image>`."""
    for text in texts:
        if found := MEDIA_MARK.search(text):
            reason, todo = AUDIO if "audio" in found.group() else VIDEO
            raise Refused(reason, f"a turn has the mark {found.group().strip()}; {todo}")
    if any(IMAGE_TAG in text for text in texts):
        return
    for text in texts:
        if found := PICTURE_MARK.search(text):
            raise Refused(
                "mark of a picture that is not <image>",
                f"a turn has {found.group()[:80]!r}; write {IMAGE_TAG} there, and name the file in the row's image",
            )


def _kind_of_question(item, turn):
    """Kind of question of a turn, or of its row."""
    kind = item.get("kind", "") if is_absent(turn.get("kind")) else turn["kind"]
    if not isinstance(kind, (str, int)):
        raise Refused("kind is no name", short(kind))
    return str(kind)


def _list_of_turns(item):
    """The turns of a row, as they are given."""
    found = pick(item, TURNS, "the row")
    if isinstance(found, dict):
        # A list of objects as the `Sequence` of datasets writes it: a list for each key.
        columns = {key: column for key, column in found.items() if column is not None}
        lists = all(isinstance(column, list) for column in columns.values())
        if lists and len({*map(len, columns.values())}) == 1 and not columns.keys().isdisjoint(ROLE):
            found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    elif (
        found is None and item and all(isinstance(x, dict) and not x.keys().isdisjoint(TURNS) for x in item.values())
    ):
        keys = ", ".join(key[:40] for key in list(item)[:3])
        raise Refused("no conversation", f"an object whose values are rows (keys: {keys}, …); write them as a list")
    if found is None:
        has = ", ".join(key[:40] for key in list(item)[:12]) or "none"
        raise Refused("no conversation", f"none of {', '.join(TURNS)} holds turns; keys of the row: {has}")
    if isinstance(found, str):
        raise Refused("no conversation", "the turns are text, not a list of objects; parse them as JSON before")
    if not isinstance(found, list):
        hint = ""
        if isinstance(found, dict) and all(map(str.isdigit, found)):
            hint = "; is this a table by columns? pandas writes its rows with orient='records'"
        raise Refused("no conversation", f"the turns are {kind_of(found)}, not a list{hint}")
    return found


def _turn(given, images, ignored, unnamed, where) -> Turn:
    """A turn.

    The pictures that it names, the keys that are ignored, and those that may hold pictures are appended to `images`,
    `ignored` and `unnamed`.
    """
    if not isinstance(given, dict):
        raise Refused("no conversation", f"{where} is {kind_of(given)}, not an object with role and content")
    turn = _held(given)
    ignored += unknown_keys(turn, "turn", where, unnamed)
    role = pick(turn, ROLE, where)
    if isinstance(role, str) and role in REFUSED_ROLES:
        reason, todo = REFUSED_ROLES[role]
        raise Refused(reason, f"{where} has role {role!r}; {todo}")
    if not isinstance(role, str) or role not in ROLES:
        has = f"role {short(role)}" if role is not None else f"no role (keys: {', '.join(given)[:80]})"
        raise Refused("unknown role", f"{where} has {has}; known are {', '.join(ROLES)}")
    role = ROLES[role]
    images += read_pictures(pick(turn, IMAGES, where), f"{where}, picture")
    content = pick(turn, TEXT, where)
    if content is None and any(given.get(key) == "" for key in TEXT):
        content = ""
    if isinstance(content, (list, dict)):
        content = _parts([content] if isinstance(content, dict) else content, images, ignored, unnamed, where)
    if not isinstance(content, str):
        found = f"is {kind_of(content)}" if content is not None else f"is missing (keys: {', '.join(given)[:80]})"
        raise Refused("turn without text", f"{where}: value or content {found}; it is text, or a list of parts")
    return Turn(role, content, is_in_loss(turn, role, where))


def _parts(parts, images, ignored, unnamed, where):
    """Text of a list of parts, with an `<image>` tag for each picture; as for `_turn`."""
    given = (images, ignored, unnamed)
    numbered = enumerate(parts, start=1)
    return "".join(_part(part, *given, f"{where}, part {n}") for n, part in numbered if not is_absent(part))


def _part(part, images, ignored, unnamed, where):
    if not isinstance(part, dict):
        raise Refused("turn without text", f"{where} is {kind_of(part)}, not an object of type text or image")
    part = _held(part)
    text, picture = part.get("text"), pick(part, NAME, where)
    # Qwen's parts are {"text": …} and {"image": …}.
    kind = part.get("type", "image" if picture is not None and text is None else "text")
    if isinstance(kind, str) and kind in REFUSED_PARTS:
        reason, todo = REFUSED_PARTS[kind]
        raise Refused(reason, f"{where} is of type {kind!r}; {todo}")
    ignored += unknown_keys(part, "part", where, unnamed)
    if kind not in PARTS:
        raise Refused(
            "unknown type of part", f"{where} is of type {short(kind)}; known are text, image and image_url"
        )
    if text is not None and (picture is not None or kind != "text"):
        raise Refused(
            "keys contradict each other", f"{where} is of type {kind!r} and has text and a picture's key or type"
        )
    if kind == "text":
        if picture is not None or not isinstance(text, (str, type(None))):
            found = "a picture" if picture is not None else kind_of(text)
            raise Refused("turn without text", f"{where} is of type 'text' and holds {found}")
        return text or ""
    if isinstance(picture, dict) and "url" in picture:  # OpenAI's
        ignored += [f"part.image_url.{key}" for key in _held(picture) if key != "url"]
        picture = picture["url"]
    images += read_pictures(picture, where)
    return f"{IMAGE_TAG}\n"
