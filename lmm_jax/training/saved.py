"""What a workdir holds, as far as the manifests of its steps tell: nothing here is changed, or restored."""

import contextlib
import hashlib
import json

from etils import epath
from orbax.checkpoint import v1 as ocp

from lmm_jax import errors, storage, strict_json

MANIFEST, FORMAT = "manifest.json", 2  # of a step; format 1 kept what it holds in Orbax's own metadata
MOST_BYTES = 2**28  # of a manifest
KINDS = {"step": int, "about": dict, "base": dict | None, "digests": dict, "files": dict}  # of what it holds


class Damaged(ValueError):
    """A step that is not what was saved."""


def saved_steps(workdir) -> list[int]:
    """The steps whose checkpoints lie in a workdir, newest first; nothing there is changed, or opened."""
    return [step for step, folder in step_folders(directory_of(workdir)) if (folder / MANIFEST).exists()]


def saved_about(workdir, step) -> dict | None:
    """What the run said of itself when a step was saved, see `Checkpoints.save`; nothing is changed.

    None if the step is damaged: it will be named, and passed over, when it is restored.
    """
    try:
        return read_manifest(directory_of(workdir) / str(step))["about"]
    except Damaged:
        return None


def newest_sound(workdir) -> int:
    """The newest step of a workdir whose manifest is sound; 0 if there is none, or only step 0."""
    return next((step for step in saved_steps(workdir) if saved_about(workdir, step) is not None), 0)


def saved_base(workdir) -> dict | None:
    """What the checkpoints of a workdir leave out, see `Checkpoints.save`; None if they leave out nothing.

    It is the same for all steps of a run: that of the newest one that can be read.
    """
    for step in saved_steps(workdir):
        with contextlib.suppress(Damaged):
            return read_manifest(directory_of(workdir) / str(step))["base"]
    return None


def check_holds_step(workdir):
    """Raises ValueError if a workdir holds no step, or only such as this version cannot verify."""
    check_not_of_before(workdir)
    if not saved_steps(workdir):
        raise ValueError(f"{workdir} holds no checkpoint; did its run save a step?")


def check_not_of_before(workdir):
    """Raises ValueError if all steps of a workdir were saved by a version of before, which knew no manifest."""
    steps = [step for step, folder in step_folders(directory_of(workdir)) if of_before(folder)]
    if steps and not saved_steps(workdir):
        raise ValueError(
            f"steps {steps} in {workdir}/checkpoints were saved by a version of lmm_jax from before checkpoints had "
            "a manifest, and cannot be verified; go on with that version, or export the model with it and use that"
        )


def of_before(folder) -> bool:
    """Whether a folder is a step of a version of before, which knew no manifest."""
    if (folder / MANIFEST).exists():
        return False
    try:
        return "digests" in (ocp.checkpointables_metadata(folder).custom_metadata or {})
    except Exception:  # Orbax raises many kinds; each means that this is no step that was finished
        return False


def read_manifest(folder) -> dict:
    """What was written of a step when all of it was on disk: step, about, base, digests and files.

    Raises:
      Damaged: it is not there, or not as it was written, or that of another step.
      Exception: its place cannot be reached for now, see `errors.is_away`.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        stored = json.loads(strict_json.read_bytes(path, MOST_BYTES))
        content, sha256 = stored["content"], stored["sha256"]
        sound = _sha256(content) == sha256 and isinstance(content, dict)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Exception as error:  # each store has kinds of its own, and so has what is no JSON of ours
        if errors.is_away(error):
            raise
        raise Damaged(f"{path} is damaged: {reason(error)}") from error
    if not sound:
        raise Damaged(f"{path} is damaged: it is not as it was written")
    if content.get("format") != FORMAT:
        raise Damaged(f"{path} has format {content.get('format')}, this version reads {FORMAT}")
    if wrong := [key for key, kind in KINDS.items() if key not in content or not isinstance(content[key], kind)]:
        raise Damaged(f"{path} is damaged: it has no {wrong[0]} as this version writes it")
    if str(content["step"]) != folder.name:
        raise Damaged(f"{folder} holds step {content['step']}: it was renamed, copied or linked")
    return content


def write_manifest(folder, content):
    """Writes what is known of a step, once all its other files are on the disk."""
    text = json.dumps({"content": content, "sha256": _sha256(content)}, indent=1)
    storage.write_text(folder / MANIFEST, text + "\n")


def _sha256(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def directory_of(workdir):
    """The folder of a workdir that its steps lie in."""
    return storage.absolute(workdir) / "checkpoints"


def step_folders(directory) -> list[tuple]:
    """`(step, folder)` of all that has a step's name, newest first."""
    if not directory.is_dir():
        return []
    named = [path for path in directory.iterdir() if path.name.isascii() and path.name.isdigit()]
    return sorted(((int(path.name), path) for path in named if path.name == str(int(path.name))), reverse=True)


def sizes_of(folder) -> dict[str, int]:
    """Bytes of each file of a step, but its manifest, by its path in the step's folder."""
    files = storage.files_of(folder)
    return {name: size for name, size in sorted(files.items()) if name != MANIFEST}


def reason(error) -> str:
    """The kind of an error and its first line, of what is behind all that it is wrapped in."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
