"""Which folder is meant by what a user names as one: a model's own, or the copy that Hugging Face's cache keeps.

The cache of a model is a folder `models--ORG--NAME`. In it `refs/BRANCH` holds the hash of a commit, and
`snapshots/HASH/` its files, which are links to `blobs/`.
"""

import os
import re

from etils import epath

from lmm_jax import strict_json

SNAPSHOTS, BLOBS, BRANCH = "snapshots", "blobs", "main"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # ORG/NAME


def model_folder(path):
    """The folder that holds the files of a model.

    Args:
      path: of such a folder, of a workdir, or of a model in Hugging Face's cache; `~` is the user's home.

    Returns:
      `path`, whether it is there or not; of the cache the snapshot that its `refs/main` names, or the only one.

    Raises:
      FileNotFoundError: the cache holds no snapshot, or not the one that is named.
      ValueError: the cache holds several, and nothing says which is meant; or `refs/main` is no file.
    """
    path = epath.Path(path).expanduser()
    if not (path / SNAPSHOTS).is_dir() or (path / "config.json").exists():
        return path
    named = path / "refs" / BRANCH
    there = sorted(folder.name for folder in (path / SNAPSHOTS).iterdir())
    if named.exists():
        wanted = strict_json.read_bytes(named).decode(errors="replace").strip()
        if wanted not in there:
            raise FileNotFoundError(
                f"{named} names the snapshot {strict_json.shown(wanted)}, which is not there: download it again"
            )
        return path / SNAPSHOTS / wanted
    if len(there) > 1:
        raise ValueError(f"{path} has {len(there)} snapshots and no {named}; name one of {SNAPSHOTS}/: {there}")
    if not there:
        raise FileNotFoundError(f"{path} is an empty cache of a model: it has no snapshot; download it again")
    return path / SNAPSHOTS / there[0]


def download_hint(path) -> str:
    """What to do, for the end of a message, where a folder that is not there may be meant as a model on the hub."""
    if epath.Path(path).exists() or not HUB_ID.fullmatch(str(path)):
        return ""
    return (
        f"; if a model of the Hugging Face hub is meant, nothing is downloaded here: run hf download {path} "
        f"--local-dir {epath.Path(path).name}, and name that folder"
    )


def holds(folder, file) -> bool:
    """Whether a file of `folder`, links followed, lies in it, or in the blobs that a snapshot links to."""
    root = os.path.realpath(folder)
    places = [root]
    if os.path.basename(os.path.dirname(root)) == SNAPSHOTS:
        places.append(os.path.join(os.path.dirname(os.path.dirname(root)), BLOBS))
    return os.path.dirname(os.path.realpath(file)) in places
