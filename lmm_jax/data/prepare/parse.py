"""Reading conversations as people have them: LLaVA's rows, and role/content rows of chat templates.

    {"id": …, "image": "a.jpg" or ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image>\\n…"}, …]}
    {"id": …, "images": ["a.jpg"], "messages": [{"role": "user", "content": "…" or [{"type": "image"}, …]}, …]}

A key that is null, or holds nothing else, counts as absent everywhere: tables write each key into each row. A key
that changes what is trained is honoured, or refuses the row by its name. All others are ignored and counted, see
`Row`. A row that cannot be used raises `Refused` with a reason that can be counted; nothing is repaired silently.
"""

import base64
import binascii
import dataclasses
import json
import os
import re
import urllib.parse

from lmm_jax.data.conversation import IMAGE_TAG, ROLES, Turn

TURNS = ("conversations", "messages", "conversation")  # keys of a row that hold its turns

# Keys that say the same; of those that a row has, one may hold something, or all the same.
IMAGES = ("image", "images")
SYSTEM = ("system", "system_prompt", "system_message")
ROLE = ("from", "role")
TEXT = ("value", "content")
NAME = ("image", "path", "url", "image_url")  # of a picture, in a part
WEIGHT = ("weight", "loss", "train", "training", "loss_mask", "loss_scale")  # of a turn: whether it is trained on

KNOWN = {
    "row": {"id", *IMAGES, *TURNS, *SYSTEM, *WEIGHT, "mask", "kind", "split"},
    "turn": {*ROLE, *TEXT, *IMAGES, *WEIGHT, "kind"},
    "part": {"type", "text", *NAME},
}

# What a list of rows, or the key `split` of a row, is called; under other names a list is a split of that name.
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
    "testing": "test",
}

# Keys that change what a row means and that we don't take: the reason of the refusal, and what to do.
VIDEO = ("video", "write its frames as pictures, or leave the row out")
AUDIO = ("audio", "leave the row out")
TOOLS = ("tool call", "leave the row out; tools are not trained")
PAIR = ("preference pair", "keep the turns that are to be learned")
SPANS = ("part of a turn to be trained on", "turns are trained on as a whole, or not at all")
MASK = ("unclear mask", 'write "train": false in a turn that is not to be trained on')
REASONING = ("reasoning apart from the answer", "write it into the answer's text, or take the key away")
EARLIER = ("turns under another key", "put them before the other turns")
SOURCE = ("images are not file names", 'name the file: {"type": "image", "image": "a.jpg"}')
MEDIA = {
    **dict.fromkeys(("video", "videos", "video_url", "input_video"), VIDEO),
    **dict.fromkeys(("audio", "audios", "audio_url", "input_audio"), AUDIO),
}
CALLS = dict.fromkeys(("tool_calls", "tool_call", "function_call", "tool_call_id"), TOOLS)
REFUSED_KEYS = {
    "row": {
        **MEDIA,
        **CALLS,
        **dict.fromkeys(("tools", "functions"), TOOLS),
        **dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images"), PAIR),
        **dict.fromkeys(("preferred_output", "non_preferred_output"), PAIR),
        "history": EARLIER,
    },
    "turn": {
        **MEDIA,
        **CALLS,
        **dict.fromkeys(("train_detail", "training_detail"), SPANS),
        **dict.fromkeys(("mask", "masked"), MASK),
        **dict.fromkeys(("reasoning", "reasoning_content", "thinking", "thought"), REASONING),
    },
    "part": {**MEDIA, **CALLS, "source": SOURCE},
}
# Other types of a part, and roles, that stand for what we don't take.
REFUSED_PARTS = {**MEDIA, **dict.fromkeys(("tool_use", "tool_result", "tool_call", "tool_response"), TOOLS)}
REFUSED_ROLES = dict.fromkeys(
    (
        "tool",
        "function",
        "observation",
        "ipython",
        "function_call",
        "tool_call",
        "tool_response",
        "function_response",
    ),
    TOOLS,
)
# Marks in the text of a user that stand for what one of the keys holds.
OTHER_TAGS = {"<bbox>": ("objects", "bbox"), "<ref-object>": ("objects",)}

# Words of keys that say the same as one of the above in another way: `video_path`, `lossWeight`, `train_on_turn`.
FILE_WORDS = {"path", "paths", "file", "files", "filename", "filenames", "name", "names", "url", "urls", "uri", "src"}
FILE_WORDS |= {"list", "input", "bytes", "data", "base64", "b64", "content"}
MEDIA_WORDS = {
    **dict.fromkeys(("video", "videos", "clips"), VIDEO),
    **dict.fromkeys(("audio", "audios"), AUDIO),
}
PICTURE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos"}
MASK_WORDS = {"mask", "masks", "masked", "ignore", "ignored", "no", "skip", "exclude"}  # 1 takes out of the loss
WEIGHT_WORDS = {
    "row": {"weight", "weights", "loss", "losses", "mask", "masks", "masked"},
    "turn": {"train", "training", "trainable", "trained", "supervise", "supervised", "learn", "ignore", "ignored"},
    "part": {"weight", "weights", "loss", "losses", "mask", "masks", "masked"},
}
WEIGHT_WORDS["turn"] |= WEIGHT_WORDS["row"]
# Keys that stay without effect in any spelling.
HARMLESS = {"id", "kind", "split", "type", "text"}
PICTURE_FILE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|ppm|jp2|avif)$", re.IGNORECASE)

# Marks in the text of a user, where it has no `<image>`, that stand for a picture elsewhere.
PICTURE_MARK = re.compile(
    r"<\|?image[ _-]?\d+\|?>|<\|(image|image_pad|vision_start|begin_of_image)\|>|<IMG_CONTEXT>|<start_of_image>"
    r"|<image_placeholder>|<img>[^<>]+</img>|\[IMG\]|<IMAGE>|<Image>"
)
# Marks that stand for other media: those of tokenizers anywhere, those that HTML has too where a text begins or ends.
MEDIA_MARK = re.compile(r"\A\s*<(video|audio)>|<(video|audio)>\s*\Z|<\|(video|audio)(_pad|_start|_bos)?\|>")

ENCODED = re.compile(
    r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{50,}={0,2}\s*"
)  # base64 of PNG, JPEG, GIF, WebP
MAX_DIGITS = "a number of more than 4,300 digits"  # which Python refuses to read
DATA_URL = "data:"
FILE_URL = "file://"


class Refused(ValueError):
    """A row that is left out.

    Attributes:
      reason: what is wrong, one of few sentences that are counted.
      detail: what exactly.
      id: of the row, empty where it could not be read.
    """

    def __init__(self, reason, detail="", id=""):
        super().__init__(reason, detail, id)  # all three, so that it pickles
        self.reason, self.detail, self.id = reason, detail, id

    def __str__(self):
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


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


def is_absent(value) -> bool:
    """Whether a value says nothing: null, NaN, or an empty text, list or object, also one of nothing but such."""
    if isinstance(value, (str, bytes)):
        return not value
    if isinstance(value, dict):
        return all(map(is_absent, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_absent, value))
    return value is None or value != value  # NaN, which pandas writes, is not itself


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
        raise Refused("not an object", f"it is {_kind(item)}; a row is an object with turns")
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
    ignored = _unknown(item, "row", "the row", unnamed) + _check_row_weight(item)
    split = item.get("split")
    if isinstance(split, str) and split.lower() in SPLITS:
        split = SPLITS[split.lower()]
    elif split is not None:
        split = ignored.append("row.split")
    images = _pictures(_pick(item, IMAGES, "the row"), "picture")
    named, turns, kinds = [], [], []
    system = _pick(item, SYSTEM, "the row")
    if system is not None:
        if not isinstance(system, str):
            raise Refused("turn without text", f"the row's system is {_kind(system)}, not text")
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
        raise Refused("kind is no name", _short(kind))
    return str(kind)


def _list_of_turns(item):
    """The turns of a row, as they are given."""
    found = _pick(item, TURNS, "the row")
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
        raise Refused("no conversation", f"the turns are {_kind(found)}, not a list{hint}")
    return found


def _turn(given, images, ignored, unnamed, where) -> Turn:
    """A turn.

    The pictures that it names, the keys that are ignored, and those that may hold pictures are appended to `images`,
    `ignored` and `unnamed`.
    """
    if not isinstance(given, dict):
        raise Refused("no conversation", f"{where} is {_kind(given)}, not an object with role and content")
    turn = _held(given)
    ignored += _unknown(turn, "turn", where, unnamed)
    role = _pick(turn, ROLE, where)
    if isinstance(role, str) and role in REFUSED_ROLES:
        reason, todo = REFUSED_ROLES[role]
        raise Refused(reason, f"{where} has role {role!r}; {todo}")
    if not isinstance(role, str) or role not in ROLES:
        has = f"role {_short(role)}" if role is not None else f"no role (keys: {', '.join(given)[:80]})"
        raise Refused("unknown role", f"{where} has {has}; known are {', '.join(ROLES)}")
    role = ROLES[role]
    images += _pictures(_pick(turn, IMAGES, where), f"{where}, picture")
    content = _pick(turn, TEXT, where)
    if content is None and any(given.get(key) == "" for key in TEXT):
        content = ""
    if isinstance(content, (list, dict)):
        content = _parts([content] if isinstance(content, dict) else content, images, ignored, unnamed, where)
    if not isinstance(content, str):
        found = f"is {_kind(content)}" if content is not None else f"is missing (keys: {', '.join(given)[:80]})"
        raise Refused("turn without text", f"{where}: value or content {found}; it is text, or a list of parts")
    return Turn(role, content, _is_in_loss(turn, role, where))


def _is_picture_name(text):
    return bool(PICTURE_FILE.search(text)) and "\n" not in text and "://" not in text


def _pick(item, keys, where):
    """What the one of `keys` holds that an object has, None if it has none.

    Raises:
      Refused: it has two of them, and they do not say the same.
    """
    found = None
    for key in keys:
        if key not in item:
            continue
        if found is not None and item[found] != item[key]:
            both = f"{where} has both {found} and {key}, of different contents"
            raise Refused("keys contradict each other", f"{both}; leave one out")
        found = found or key
    return None if found is None else item[found]


def _unknown(item, level, where, unnamed):
    """Keys of a row, turn or part that are ignored, as `Row` names them.

    Those that seem to hold pictures are also appended to `unnamed`, in words.

    Raises:
      Refused: one that changes the meaning, and that we don't take.
    """
    if item.keys() <= KNOWN[level]:
        return []
    unknown = [key for key in item if key not in KNOWN[level]]
    for key in unknown:
        words = _words(key)
        refusal = _refusal(item, level, key, words)
        if refusal:
            reason, todo = refusal
            raise Refused(reason, f"{where} has the key {key[:80]!r}; {todo}")
        if _holds_picture(item[key], words):
            unnamed.append(f"{where} has the key {key[:80]!r}")
    return [f"{level}.{key}" for key in unknown]


def _words(key):
    """The words of a key, in lower case: of `lossWeight`, `Loss-Weight` and `loss_weight` the same."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower())


def _refusal(item, level, key, words):
    """`(reason, what to do)` if an unknown key, with what it holds, changes the meaning of a row; else None."""
    value, plain, found = item[key], "_".join(words), set(words)
    for name in (key, plain):
        if name in REFUSED_KEYS[level]:
            return REFUSED_KEYS[level][name]
    if plain in KNOWN[level] - HARMLESS and item.get(plain) != value:
        return "key in another spelling", f"write {plain!r}"
    media = [MEDIA_WORDS[word] for word in words if word in MEDIA_WORDS]
    if media and found <= MEDIA_WORDS.keys() | FILE_WORDS:
        return media[0]
    if value is False and found & {"label", "kto"}:
        return "answer that is marked as bad", "leave the row out, or take the key away if it says something else"
    numbers = value if isinstance(value, list) else [value]
    weighs = found & WEIGHT_WORDS[level] and all(isinstance(x, (bool, int, float)) for x in numbers)
    if weighs and (found & MASK_WORDS or any(x != 1 for x in numbers)):
        todo = 'a turn that is not to be trained on has "train": false, and there are no other weights'
        return "weight that is not taken", f"{todo}; take the key away if it says something else"
    return None


def _holds_picture(value, words):
    """Whether an unknown key holds pictures: names with a known ending, bytes, or any names if it is called so."""
    values = value if isinstance(value, list) else [value]
    called = not PICTURE_WORDS.isdisjoint(words) and {*words} <= PICTURE_WORDS | FILE_WORDS
    return all(
        (isinstance(x, str) and (called or _is_picture_name(x)))
        or (isinstance(x, dict) and x.keys() <= {"bytes", "path"})
        or (isinstance(x, bytes) and called)
        for x in values
    )


def _check_row_weight(item):
    """Keys of a row that are named like a weight and are none; refuses a row whose weight is not 1."""
    ignored = []
    for key in WEIGHT:
        if key not in item:
            continue
        value = item[key]
        if key in ("loss", "train", "training") and not isinstance(value, (bool, int, float)):
            ignored.append(f"row.{key}")  # of a text it says nothing
        elif not (isinstance(value, (bool, int, float)) and value == 1):
            todo = "leave the row out" if value == 0 else "a row has no weight of its own; see data.mixture"
            raise Refused("weight that is not taken", f"the row has {key} {_short(value)}; {todo}")
    if "mask" in item and ROLES.get(str(item["mask"]).lower()) != "user":  # NeMo's: whose turns are not trained on
        raise Refused(MASK[0], f"the row has mask {_short(item['mask'])}; {MASK[1]}")
    return ignored


def _is_in_loss(turn, role, where):
    """See `Turn.in_loss`: an answer is trained on unless a key says otherwise."""
    if turn.keys().isdisjoint(WEIGHT):
        return True
    said = {key: turn[key] for key in WEIGHT if key in turn}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            valid = "0 and false take a turn out of the loss, 1 and true leave it there; nothing else is taken"
            raise Refused("weight that is not taken", f"{where} has {key} {_short(value)}; {valid}")
        if value and role != "assistant":
            raise Refused("weight that is not taken", f"{where} has {key} {value}, but only answers are trained on")
    if len(set(map(bool, said.values()))) > 1:
        raise Refused("keys contradict each other", f"{where} has {_short(said)}")
    return role != "assistant" or all(said.values())


def _parts(parts, images, ignored, unnamed, where):
    """Text of a list of parts, with an `<image>` tag for each picture; as for `_turn`."""
    given = (images, ignored, unnamed)
    numbered = enumerate(parts, start=1)
    return "".join(_part(part, *given, f"{where}, part {n}") for n, part in numbered if not is_absent(part))


def _part(part, images, ignored, unnamed, where):
    if not isinstance(part, dict):
        raise Refused("turn without text", f"{where} is {_kind(part)}, not an object of type text or image")
    part = _held(part)
    text, picture = part.get("text"), _pick(part, NAME, where)
    # Qwen's parts are {"text": …} and {"image": …}.
    kind = part.get("type", "image" if picture is not None and text is None else "text")
    if isinstance(kind, str) and kind in REFUSED_PARTS:
        reason, todo = REFUSED_PARTS[kind]
        raise Refused(reason, f"{where} is of type {kind!r}; {todo}")
    ignored += _unknown(part, "part", where, unnamed)
    if kind not in ("text", "image", "image_url"):
        raise Refused(
            "unknown type of part", f"{where} is of type {_short(kind)}; known are text, image and image_url"
        )
    if text is not None and (picture is not None or kind != "text"):
        raise Refused(
            "keys contradict each other", f"{where} is of type {kind!r} and has text and a picture's key or type"
        )
    if kind == "text":
        if picture is not None or not isinstance(text, (str, type(None))):
            found = "a picture" if picture is not None else _kind(text)
            raise Refused("turn without text", f"{where} is of type 'text' and holds {found}")
        return text or ""
    if isinstance(picture, dict) and "url" in picture:  # OpenAI's
        ignored += [f"part.image_url.{key}" for key in _held(picture) if key != "url"]
        picture = picture["url"]
    images += _pictures(picture, where)
    return f"{IMAGE_TAG}\n"


def _pictures(value, where) -> list[str | bytes]:
    """The pictures that a value names or holds: one, or a list of them."""
    if isinstance(value, list):
        return [_picture(x, f"{where} {n}") for n, x in enumerate(value, start=1) if not is_absent(x)]
    return [] if value is None else [_picture(value, where)]


def _picture(value, where):
    """Name or bytes of a picture: of a name, a data URL, bytes, or the `{"bytes": …, "path": …}` of datasets."""
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        data = value.get("bytes")
        if isinstance(data, str) and data:
            raise Refused("images are not file names", f"{where} holds its bytes as text; write it into a file")
        value = value.get("path") if is_absent(data) else data
    if isinstance(value, str) and value[: len(DATA_URL)].lower() == DATA_URL:
        return _data_url(value, where)
    if isinstance(value, str) and ENCODED.fullmatch(value):
        return _data_url(f"{DATA_URL};base64,{value}", where)
    if not isinstance(value, (str, bytes)):
        raise Refused("images are not file names", f"{where} is {_short(value)}; expected the name of a file")
    return value


def _data_url(url, where):
    head, _, data = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise Refused("images are not file names", f"{where} is a data URL that is not base64: {_short(url)}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("images are not file names", f"{where} is a data URL of broken base64: {error}") from error


def _kind(value):
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")


def _short(value):
    return repr(value)[:80]


def safe_path(folder, name, follow_links=False) -> str:
    """The path of picture `name`, links resolved: inside of `folder`.

    Args:
      folder: that names are relative to.
      name: relative, or absolute and inside of the folder.
      follow_links: whether a link inside the folder may lead out of it.

    Raises:
      Refused: a URL, or a name or a link that leads out of the folder.
    """
    name = file_name(name)
    if "://" in name:
        raise Refused("picture name is a URL", f"{name[:200]}; download it and name the file")
    if not name or "\0" in name:
        raise Refused("images are not file names", repr(name)[:200])
    root = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, name))
    if _is_inside(path, root):
        return path
    if ".." in name.split("/"):
        raise Refused("picture name leads out of the folder", f"{name} leads out of {folder} (..); see --images")
    if os.path.isabs(name) and not any(_is_inside(name, top) for top in (root, os.path.abspath(folder))):
        raise Refused("absolute picture name outside the folder", f"{name} is not in {folder}; see --images")
    if not follow_links:
        raise Refused("link that leads out of the folder", f"{name} is a link to {path}; --follow-links allows it")
    return path


def file_name(name) -> str:
    """The name of a picture's file: that of a `file://` URL, or the name itself."""
    if name[: len(FILE_URL)].lower() != FILE_URL:
        return name
    path = name[len(FILE_URL) :]
    return urllib.parse.unquote(path.removeprefix("localhost") if path.startswith("localhost/") else path)


def _is_inside(path, folder):
    return os.path.commonpath([folder, path]) == folder
