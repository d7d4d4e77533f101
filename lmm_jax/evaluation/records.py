"""Result files: what a model answered to every question of a task at one budget, a JSON object a line.

    OUT/evaluation/TASK/9.jsonl            at 9 visual tokens: a header, then a line for each question, in their order
                        9.part-0-1.jsonl   of an evaluation that is going on or was stopped: of host 0, its 2nd file
                        older/             results of another model or another way of asking, which were in the way;
                                           who asks in that way again has them back

A header says all that the answers depend on. Lines are added as answers come, so that a run that is killed loses
nothing but the answers that were being given; the next one reads what is there and asks the rest. Any number of
hosts add to files of their own, and when all questions are answered the first host writes the one file of all.
"""

import dataclasses
import json
import math

from etils import epath

from lmm_jax import storage

FORMAT = 1
FOLDER = "evaluation"  # below OUT
# What may differ between two headers whose answers belong to the same run.
FREE = ("version", "date", "missing")


@dataclasses.dataclass(frozen=True)
class Record:
    """An answer to one question at one budget.

    Attributes:
      number: of the question among those of its task, from 0.
      id: as the benchmark numbers it.
      kind: of question.
      question: as the model was asked it, text.
      truths: the true answers; () where only a server knows them.
      answer: text.
      logprobs: natural logarithm of the probability of each of its tokens.
      end: of its end; 0 where the model did not end it.
      reason: why it ended, see `generation.answer`.
      scale: budget that it was given at; where the model chose, the last that it tried.
      visual_tokens: positions that pictures took, at all budgets that were tried.
      score: 0 … 1; None where the task only scores all answers at once, or no truth is known.
      expected: what the model's router expects at each trained budget; () without a router.
      picture: a number that questions about the same pictures share, of which an interval takes notice; -1 if that
        is not known.
      seconds: since the answer before it came, on the same host: their sum is the time that all took.
    """

    number: int
    id: str | int
    kind: str
    question: str
    truths: tuple[str, ...]
    answer: str
    logprobs: tuple[float, ...]
    end: float
    reason: str
    scale: int
    visual_tokens: int
    score: float | None
    expected: tuple[float, ...] = ()
    picture: int = -1
    seconds: float = 0.0


TUPLES = ("truths", "logprobs", "expected")


def to_line(record) -> str:
    """A `Record` as a line of JSON."""
    return json.dumps(dataclasses.asdict(record))


def from_line(line) -> Record:
    """The `Record` of a line.

    Raises:
      ValueError: the line is none.
    """
    read = json.loads(line)
    try:
        record = Record(**{key: tuple(value) if key in TUPLES else value for key, value in read.items()})
        numbers = (*record.logprobs, record.end, *record.expected)
        right = isinstance(record.number, int) and isinstance(record.answer, str) and all(map(math.isfinite, numbers))
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if not right:
        raise ValueError("a value of another type than it should be")
    return record


def folder(out, task):
    """Where the results of a task lie below OUT."""
    return epath.Path(out) / FOLDER / task


def read(path) -> tuple[dict, list[Record]]:
    """Header and `Record`s of a result file.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no result file, or a line of it is damaged, which the message names.
    """
    path = epath.Path(path)
    try:
        lines = path.read_bytes().decode().removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no result file {path}; `lmm evaluate --out DIR` writes them to DIR/evaluation"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no result file of `lmm evaluate`: it is not UTF-8") from error
    header = _header(lines[0] if lines else "")
    if header is None:
        raise ValueError(f"{path} is no result file of `lmm evaluate`: its first line is no header of one")
    found = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            found.append(from_line(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: it is damaged ({error})") from error
    return header, found


def _header(line):
    """The header that a line holds; None if it holds none."""
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header if isinstance(header, dict) and header.get("format") == FORMAT and "task" in header else None


class Results:
    """The results of a task at one budget, as they come.

    Attributes:
      done: `{number: Record}` of those that were there.
    """

    def __init__(self, folder, scale, header, host=0):
        """Reads what is there; nothing is written yet.

        Args:
          folder: `folder(out, task)`; None keeps the results in memory alone.
          scale: text, "9" or "auto".
          header: dict, see `run.header`.
          host: number of this host.
        """
        self._folder, self._scale, self._host = folder, scale, host
        self._header = json.loads(json.dumps(header))
        self.done, self._lines = {}, None
        for path in _files(folder, scale):
            if _is_of(path, self._header):
                self.done |= {record.number: record for record in _sound(path)}

    def add(self, record):
        """Adds a `Record`; when this returns it survives the end of the process, where files can grow."""
        self.done[record.number] = record
        if self._folder is None:
            return
        if self._lines is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lines = storage.Lines(_free(self._folder, f"{self._scale}.part-{self._host}"))
            self._lines.add([json.dumps(self._header)])
        self._lines.add([to_line(record)])

    def flush(self):
        """Makes sure that all of them are in the file."""
        if self._lines is not None:
            self._lines.flush()

    def read_again(self):
        """Reads what other hosts have written meanwhile."""
        if self._folder is not None:
            self.__init__(self._folder, self._scale, self._header, self._host)

    def finish(self):
        """Writes the one file of all, in the questions' order, and takes the parts away; nothing without answers."""
        if self._folder is None or not self.done:
            return
        files = _files(self._folder, self._scale)
        parts = [path for path in files if ".part-" in path.name and _is_of(path, self._header)]
        whole = self._folder / f"{self._scale}.jsonl"
        if whole.exists() and not parts:
            return
        lines = [json.dumps(self._header), *(to_line(self.done[n]) for n in sorted(self.done))]
        new = self._folder / f".{self._scale}.new"
        new.write_text("".join(f"{line}\n" for line in lines))
        new.replace(whole)
        for path in parts:
            path.unlink()


def make_room(folder, scale, header) -> tuple[list[str], list[str]]:
    """Moves results that do not go with a header to `older/`, and back from there those that do.

    One host alone does that, before any of them makes its `Results`.

    Args:
      folder, scale, header: see `Results`.

    Returns:
      where those lie now that were in the way, and where those lay that are back.
    """
    header, older, moved, back = json.loads(json.dumps(header)), folder / "older", [], []
    for path in _files(folder, scale):
        if not _is_of(path, header):
            older.mkdir(parents=True, exist_ok=True)
            free = _free(older, path.name.removesuffix(".jsonl"), first=1)
            path.rename(free)
            moved.append(str(free))
    aside = [*older.glob(f"{scale}-*.jsonl"), *older.glob(f"{scale}.part-*.jsonl")] if older.exists() else []
    for path in sorted(aside):
        if _is_of(path, header):
            path.rename(_free(folder, f"{scale}.part-0"))
            back.append(str(path))
    return moved, back


def _free(folder, name, first=0):
    """The first of NAME-0.jsonl, NAME-1.jsonl, … in a folder that is not there."""
    names = (f"{name}-{n}.jsonl" for n in range(first, 1_000_000))
    return next(folder / name for name in names if not (folder / name).exists())


def _files(folder, scale):
    """The files of results at a budget in a folder, which may be None."""
    if folder is None or not folder.exists():
        return []
    names = (f"{scale}.jsonl", *sorted(p.name for p in folder.glob(f"{scale}.part-*.jsonl")))
    return [folder / name for name in names if (folder / name).exists()]


def _is_of(path, other):
    """Whether the results of a file belong to the same run as those of a header."""
    with path.open("rb") as file:
        header = _header(file.readline())
    return header is not None and _same(header, other)


def _same(one, other):
    return all(one.get(key) == other.get(key) for key in {*one, *other} - {*FREE})


def _sound(path):
    """The `Record`s of a file whose last line may be a part of one."""
    for line in path.read_bytes().split(b"\n")[1:-1]:
        try:
            yield from_line(line)
        except ValueError:
            continue  # torn; its question is asked again
