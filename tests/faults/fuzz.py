"""Pictures and lines that were damaged at random, from sound ones of every format."""

import io
import json
import struct

import numpy as np
from PIL import Image

KINDS = ("png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "jpeg2000", "avif")
TRICKS = ("bits", "bytes", "cut", "doubled", "moved", "number", "head", "another")


def sound_pictures(random) -> list[bytes]:
    """A few dozen pictures: each format, in several modes and sizes, with headers of their own."""
    found = []
    for kind in KINDS:
        for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16"):
            width, height = (int(n) for n in random.integers(1, 90, 2))
            x = np.add.outer(np.arange(height), np.arange(width) * 3)[..., None] * (1, 2, 5)
            image = Image.fromarray((x % 256).astype(np.uint8))
            image = Image.fromarray((x[..., 0] * 250).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
            options = {"save_all": True, "append_images": [image, image]} if kind in ("gif", "tiff") else {}
            exif = Image.Exif()
            exif[0x0112] = int(random.integers(0, 10))
            options |= {"exif": exif} if kind in ("jpeg", "png", "webp", "tiff") and random.integers(2) else {}
            out = io.BytesIO()
            try:
                image.save(out, kind, **options)
            except (OSError, ValueError, KeyError):  # a mode that this format does not have, or no such format here
                continue
            found.append(out.getvalue())
    return found


def damaged(data, others, random) -> bytes:
    """A file with one to four things wrong with it; most of them near its head, where sizes stand."""
    data = bytearray(data)
    for _ in range(int(random.integers(1, 5))):
        trick, at = TRICKS[random.integers(len(TRICKS))], _place(data, random)
        if trick == "bits":
            data[at] ^= 1 << int(random.integers(8))
        elif trick == "bytes":
            data[at : at + 4] = random.bytes(len(data[at : at + 4]))
        elif trick == "cut":
            del data[at + 1 :]
        elif trick == "doubled":
            data[at:at] = data[at : at + int(random.integers(1, 200))]
        elif trick == "moved":
            del data[at : at + int(random.integers(1, 20))]
        elif trick == "number":  # a size, an offset or a count of no sense
            number = int(random.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 8000, 30000]))
            form = str(random.choice(["<I", ">I", "<H", ">H"]))
            new = struct.pack(form, number & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            data[at : at + len(new)] = new
        elif trick == "head":
            other = others[random.integers(len(others))]
            data[:16] = other[:16]
        else:
            other = others[random.integers(len(others))]
            data[at : at + 100] = other[at : at + 100]
        if not data:
            return b""
    return bytes(data)


def _place(data, random):
    near = min(len(data), 64 if random.integers(3) == 0 else 600)
    return int(random.integers(near if random.integers(4) else len(data)))


def sound_row(number, random) -> dict:
    """A row of one of the two layouts, of one to three rounds."""
    rounds = int(random.integers(1, 4))
    words = ["read", "all", "the", "digits", "ünï", "漢字", "🙂", "a\nb", "3"]

    def text():
        return " ".join(random.choice(words, int(random.integers(1, 6))))

    if random.integers(2):
        turns = [
            turn
            for _ in range(rounds)
            for turn in ({"from": "human", "value": text()}, {"from": "gpt", "value": text()})
        ]
        return {"id": f"row{number}", "conversations": turns}
    turns = [
        turn
        for _ in range(rounds)
        for turn in ({"role": "user", "content": text()}, {"role": "assistant", "content": text()})
    ]
    return {"id": f"row{number}", "messages": turns}


VALUES = (
    None,
    "",
    0,
    -1,
    1e308,
    True,
    [],
    {},
    [[]],
    "x" * 5000,
    "\u0000",
    "<image>",
    ["a"],
    {"a": {"b": []}},
    10**400,
)
KEYS = (
    "id",
    "image",
    "images",
    "conversations",
    "messages",
    "from",
    "value",
    "role",
    "content",
    "weight",
    "system",
    "é",
)


def damaged_row(row, random) -> str:
    """A row with something else in the place of a part, or whose text was damaged; one line."""
    row = json.loads(json.dumps(row))
    how = int(random.integers(4))
    if how < 2:
        places = list(_places(row))
        for _ in range(int(random.integers(1, 3))):
            parent, key = places[random.integers(len(places))]
            value = VALUES[random.integers(len(VALUES))]
            if how or not isinstance(parent, dict):
                parent[key] = value
            else:
                parent[KEYS[random.integers(len(KEYS))]] = value
        return json.dumps(row, ensure_ascii=bool(random.integers(2)))
    text = list(json.dumps(row, ensure_ascii=False))
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(text)))
        if how == 2:
            text[at] = str(random.choice(list('{}[]",:\\x01é\ud800')))
        else:
            del text[at : at + int(random.integers(1, 30))]
        text = text or ["x"]
    return "".join(text).replace("\n", " ")


def _places(value):
    """`(object or list, key)` of everything in a row."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)
