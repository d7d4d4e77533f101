"""Files that are no rows, by what they begin with: what each is, and what to do about it.

The words go on "FILE is …".
"""

import contextlib
import json
import re

# Other files by their first bytes: where the mark stands, the mark, and what the file is.
UNPACK = "unpack it and name the file of rows in it"
CONVERT = "write its rows as JSON, one a line"
PICTURE = "a picture, not a file of rows; pictures go into the folder of --images"
FOREIGN = (
    *(
        (30, name, f"a workbook of Excel or another Office document; {CONVERT}")
        for name in (b"[Content_Types].xml", b"docProps/", b"_rels/", b"xl/")
    ),
    (30, b"mimetype", f"an OpenDocument table or text; {CONVERT}"),
    (0, b"PK\x03\x04", f"a zip archive (NumPy archives are such too); {UNPACK}"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (257, b"ustar", f"a tar archive; {UNPACK}"),
    (0, b"\x1f\x8b", f"gzip once more; {UNPACK}"),
    (0, b"\0" * 64, "nothing but zeros where it begins, as a copy that broke off leaves it; copy the file anew"),
    (0, b"\xfd7zXZ\0", f"compressed by xz; {UNPACK}"),
    (0, b"BZh", f"compressed by bzip2; {UNPACK}"),
    (0, b"\x28\xb5\x2f\xfd", f"compressed by zstd; {UNPACK}"),
    (0, b"\x04\x22\x4d\x18", f"compressed by LZ4; {UNPACK}"),
    (0, b"7z\xbc\xaf\x27\x1c", f"a 7z archive; {UNPACK}"),
    (0, b"Rar!", f"a RAR archive; {UNPACK}"),
    (0, b"PARE", "an encrypted Parquet file; write it without encryption"),
    (0, b"ARROW1", "an Arrow file; write its table as Parquet (`to_parquet` of datasets)"),
    (0, b"\xff\xff\xff\xff", "an Arrow stream; write its table as Parquet (`to_parquet` of datasets)"),
    (0, b"ORC", "an ORC file; write its table as Parquet"),
    (0, b"Obj\x01", f"an Avro file; {CONVERT}"),
    *((0, bytes([0x80, n]), f"a pickle, which is not opened as it can run any code; {CONVERT}") for n in range(2, 6)),
    (0, b"\x93NUMPY", f"a NumPy array; {CONVERT}"),
    (0, b"\x89HDF", f"an HDF5 file; {CONVERT}"),
    (0, b"SQLite format 3\0", f"an SQLite database; {CONVERT}"),
    (0, b"\xd0\xcf\x11\xe0", f"an old Office document; {CONVERT}"),
    (0, b"%PDF", "a PDF document, not a file of rows"),
    (0, b"\x89PNG", PICTURE),
    (0, b"\xff\xd8\xff", PICTURE),
    (0, b"GIF8", PICTURE),
    (8, b"WEBP", PICTURE),
    (0, b"II*\0", PICTURE),
    (0, b"MM\0*", PICTURE),
    (4, b"ftyp", "a film or a picture, not a file of rows"),
)
# Texts that are no JSON, by what they begin with, in lower case.
TEXTS = (
    ("version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`"),
    ("<!doctype html", "a web page, not the file itself; download that by its direct link"),
    ("<html", "a web page, not the file itself; download that by its direct link"),
    ("<", f"XML; {CONVERT}"),
    ("---", f"YAML or Markdown; {CONVERT}"),
    ("- ", f"YAML or Markdown; {CONVERT}"),
    ("//", "JSON with comments, which JSON has not; take them away"),
    ("/*", "JSON with comments, which JSON has not; take them away"),
    ("{\\rtf", f"an RTF document; {CONVERT}"),
    ("#", f"YAML or Markdown; {CONVERT}"),
)


def name_bytes(head) -> str:
    """What a file is that begins with some bytes; "" if they are of none that is known."""
    return next((what for at, mark, what in FOREIGN if head[at:].startswith(mark)), "")


def name_text(start):
    """What a text is that is no JSON, and what to do, by its first line."""
    with contextlib.suppress(ValueError):
        found = {str: "texts", type(None): "null", bool: "true or false"}.get(type(json.loads(start)), "numbers")
        return f"JSON that holds {found} where rows are expected, which are objects; {CONVERT}"
    found = next((what for begin, what in TEXTS if start.lower().startswith(begin)), None)
    if (
        found is None
        and "\0" not in start
        and any(mark in start for mark in ",\t;")
        and not re.search(r"[{}\[(=]", start)
    ):
        found = f"a table as text (CSV or TSV), which has no place for turns; {CONVERT}"
    return found or f"no JSON: it begins with {start[:40]!r}; {CONVERT}"
