"""Questions to begin with: records of the data that a model was trained on, if they are there."""

import dataclasses
import pathlib

from lmm_jax.data.conversation import IMAGE_TAG
from lmm_jax.data.prepared import Prepared, as_pictures, as_turns, folders_of

SPLITS = ("test", "validation", "train")  # unseen ones first


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture and a question about it.

    Attributes:
      picture: path of a file.
      question: text.
    """

    picture: str
    question: str


def find_examples(data, folder, count=4) -> list[Example]:
    """Examples from the prepared folders that `config.data` names, their pictures written to a folder.

    Args:
      data: `config.data`.
      folder: an empty one, for the pictures.
      count: at most so many, of different pictures where there are.

    Returns:
      first questions of records with one picture; none where the data is not there, or no longer whole.
    """
    for source in folders_of(data):
        for split in SPLITS:
            try:
                records = Prepared(source, split)
            except (OSError, ValueError):
                continue
            found = _of_records(records, pathlib.Path(folder), count)
            if found:
                return found
    return []


def _of_records(records, folder, count):
    found, seen = [], set()
    for number in range(min(len(records), 20 * count)):
        record = records[number]
        question = next((turn.text for turn in as_turns(record) if turn.role == "user"), "")
        question = question.replace(IMAGE_TAG, "").strip()
        if len(record["images"]) != 1 or not question or record["images"][0] in seen:
            continue
        seen.add(record["images"][0])
        path = folder / f"example-{len(found) + 1}.png"
        as_pictures(record)[0].save(path)
        found.append(Example(str(path), question))
        if len(found) == count:
            break
    return found
