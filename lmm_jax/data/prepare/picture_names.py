"""What a row says of its pictures: names of files, bytes or data URLs; and which file a name may stand for."""

import base64
import binascii
import os
import re
import urllib.parse

from lmm_jax.data.prepare.refused import Refused, is_absent, short

ENCODED = re.compile(
    r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{50,}={0,2}\s*"
)  # base64 of PNG, JPEG, GIF, WebP
LONGEST = 4_096  # characters of a path, as systems have it; following one takes time with the square of its length
DATA_URL = "data:"
FILE_URL = "file://"


def read_pictures(value, where) -> list[str | bytes]:
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
        raise Refused("images are not file names", f"{where} is {short(value)}; expected the name of a file")
    return value


def _data_url(url, where):
    head, _, data = url.partition(",")
    if not head.lower().endswith(";base64"):
        raise Refused("images are not file names", f"{where} is a data URL that is not base64: {short(url)}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused("images are not file names", f"{where} is a data URL of broken base64: {error}") from error


def safe_path(folder, name, follow_links=False) -> str:
    """The path of picture `name`, links resolved: inside of `folder`.

    Args:
      folder: that names are relative to.
      name: relative, or absolute and inside of the folder.
      follow_links: whether a link inside the folder may lead out of it.

    Raises:
      Refused: a URL, a name that is too long for any file, or a name or a link that leads out of the folder.
    """
    name = file_name(name)
    if "://" in name:
        raise Refused("picture name is a URL", f"{name[:200]}; download it and name the file")
    if len(name) > LONGEST:
        raise Refused("images are not file names", f"{name[:60]}… has {len(name):,} characters, at most {LONGEST:,}")
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
