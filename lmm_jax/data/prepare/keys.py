"""The keys of rows: which are known, which change what a row means, and what is done about each."""

import re

from lmm_jax.data.conversation import ROLES
from lmm_jax.data.prepare.refused import Refused, short

TURNS = ("conversations", "messages", "conversation")  # keys of a row that hold its turns

# Keys that say the same; of those that a row has, one may hold something, or all the same.
IMAGES = ("image", "images")
SYSTEM = ("system", "system_prompt", "system_message")
ROLE = ("from", "role")
TEXT = ("value", "content")
NAME = ("image", "path", "url", "image_url")  # of a picture, in a part
PARTS = ("text", "image", "image_url")  # types of a part
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


def pick(item, keys, where):
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


def unknown_keys(item, level, where, unnamed):
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


def check_row_weight(item):
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
            raise Refused("weight that is not taken", f"the row has {key} {short(value)}; {todo}")
    if "mask" in item and ROLES.get(str(item["mask"]).lower()) != "user":  # NeMo's: whose turns are not trained on
        raise Refused(MASK[0], f"the row has mask {short(item['mask'])}; {MASK[1]}")
    return ignored


def is_in_loss(turn, role, where):
    """See `Turn.in_loss`: an answer is trained on unless a key says otherwise."""
    if turn.keys().isdisjoint(WEIGHT):
        return True
    said = {key: turn[key] for key in WEIGHT if key in turn}
    for key, value in said.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            valid = "0 and false take a turn out of the loss, 1 and true leave it there; nothing else is taken"
            raise Refused("weight that is not taken", f"{where} has {key} {short(value)}; {valid}")
        if value and role != "assistant":
            raise Refused("weight that is not taken", f"{where} has {key} {value}, but only answers are trained on")
    if len(set(map(bool, said.values()))) > 1:
        raise Refused("keys contradict each other", f"{where} has {short(said)}")
    return role != "assistant" or all(said.values())


def _is_picture_name(text):
    return bool(PICTURE_FILE.search(text)) and "\n" not in text and "://" not in text
