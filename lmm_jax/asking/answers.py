"""The file of the answers to many questions: a JSON object a line, written as they come, so that a run can go on.

    {"id": "a", "prompt": "What is it?", "images": ["cat.jpg"], "scale": 9, "text": "a cat", "reason": "end",
     "visual_tokens": 9, "prompt_positions": 21, "tokens": 3, "asked": "5d0c…"}
    {"id": "b", "error": "images[0]: no file dog.jpg"}

The lines stand in the order in which the answers ended. `asked` is a digest of all that the answer depends on: what
was asked, with which options, and the parameters of the model. By it a run knows its own answers.
"""

import fcntl
import hashlib
import json
import os
import pathlib

from lmm_jax import storage


def asked(question, model) -> str:
    """The digest of a `Question` to a model, which is given by its `Model.identity`."""
    told = [model, question.said, [str(picture) for picture in question.images], question.options]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_place(path):
    """Raises an OSError if no file of answers can be written there; says so before a model is loaded."""
    if storage.is_remote(path):
        raise OSError(
            f"--out {path}: answers are written line by line, which no bucket takes; name a file of this machine"
        )
    if os.path.isdir(path):
        raise IsADirectoryError(f"--out {path} is a folder; name a file in it, such as {path}/answers.jsonl")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise NotADirectoryError(f"--out {path}: there is no folder {folder}")
    storage.check_place(folder, "--out")


class Answers:
    """A file that answers are added to; nobody else writes to it meanwhile.

    Lines that tell an error are taken out when the first answer comes, as their questions are asked again, and so is
    the begin of a line at the end, where a run was killed.

    Attributes:
      done: ids, as text, of the questions that it has an answer to.
    """

    def __init__(self, path, digests):
        """Reads it, if it is there.

        Args:
          path: of the file, on this machine.
          digests: `{id as text: digest}` of all questions, see `asked`.

        Raises:
          ValueError: it holds something else than answers to these questions by this model.
        """
        self._path, self._file = pathlib.Path(os.path.realpath(path)), None
        self._found = self._path.read_bytes() if self._path.exists() else b""
        kept = _sound_lines(self._path, self._found, digests)
        self.done, self._kept = set(kept), b"".join(kept.values())

    def begin(self):
        """Opens it to add to; OSError if that is not allowed, or another process writes to it."""
        self._file = self._lock(self._path)
        if self._path.read_bytes() != self._found:  # since it was read
            self.close()
            raise self._held()
        if self._kept != self._found:
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_bytes(self._kept)
            old, self._file = self._file, self._lock(part)
            part.replace(self._path)  # all at once
            old.close()

    def add(self, answer):
        """Adds an object, on a line of its own; when this returns it survives the end of the process."""
        self._file.write(json.dumps(answer, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._file.flush()

    def close(self):
        """Lets others write to it."""
        if self._file is not None:
            self._file.close()

    def _lock(self, path):
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise self._held() from None
        return file

    def _held(self):
        return OSError(f"--out {self._path} is being written to by another process; wait, or name another file")


OTHER = "name another file by --out, or ask as before"


def _sound_lines(path, content, digests):
    """`{id as text: line}` of the answers in a file."""
    kept = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "id" not in answer or not ({"asked", "error"} & answer.keys()):
            raise ValueError(
                f"{path}, line {number}: this is no answer of `lmm generate`; name another file by --out"
            )
        if "error" in answer:
            continue
        id, where = str(answer["id"]), f"{path}, line {number}"
        if id not in digests:
            raise ValueError(f"{where}: no question has the id {answer['id']!r}; {OTHER}")
        if digests[id] != answer["asked"]:
            raise ValueError(
                f"{where}: {answer['id']!r} was asked otherwise (another text, picture or option), or of another "
                f"model; {OTHER}"
            )
        if id in kept:
            raise ValueError(f"{where}: {answer['id']!r} is answered on an earlier line, too; {OTHER}")
        kept[id] = line + b"\n"
    return kept
