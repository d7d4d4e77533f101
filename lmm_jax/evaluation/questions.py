"""What is asked: the tasks of a model, their examples, and each example as a question that fits the model."""

import collections.abc
import dataclasses
import sys
from typing import Any

from tqdm import tqdm

from lmm_jax import storage
from lmm_jax.config import ConfigError, choose
from lmm_jax.data.prepared import data_set, folders_of, trained_data_set
from lmm_jax.evaluation.statistics import of_one_picture
from lmm_jax.evaluation.tasks import TASKS
from lmm_jax.evaluation.tasks.example import Example

NOT_AS_PUBLISHED = "not as published:"  # how a line of a task's `check` begins that is a remark and no fault
NAMED = 5  # questions that cannot be asked, which are told one by one


@dataclasses.dataclass(frozen=True)
class Question:
    """An example as a model is asked it.

    Attributes:
      number: of the example among those of its task, from 0.
      example: an `Example`.
      prompt: as `Model.generate` takes it.
      max_new_tokens: that its answer may have.
      picture: a number that questions about the same pictures share.
    """

    number: int
    example: Example
    prompt: Any
    max_new_tokens: int
    picture: int


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of a task.

    Attributes:
      task: module of `tasks.TASKS`.
      folder: where they come from, an absolute path.
      split: of it.
      examples: how many there are.
      questions: those that are asked.
      left_out: how many do not fit into the model's length.
      unreadable: `(number, why)` of those whose pictures cannot be read.
      remarks: of the task's `check`.
    """

    task: Any
    folder: str
    split: str
    examples: int
    questions: list[Question]
    left_out: int
    unreadable: list[tuple[int, str]]
    remarks: list[str]


def find_tasks(model, data=None) -> tuple[str, ...]:
    """The tasks to ask where none is named.

    Args:
      model: that `lmm.load` returned.
      data: see `evaluate`. Of a dict the tasks are those that it names a folder for. Otherwise the task is called as
        the data set of the folder, or as that of the folder that the model was trained on; or an export says it.

    Raises:
      ConfigError: none of them says so.
      FileNotFoundError: `data` is no prepared folder.
    """
    if data and isinstance(data, collections.abc.Mapping):
        return tuple(data)
    name = data_set(data) if data else trained_data_set(model.program.config.data) or model.task
    if name in TASKS:
        return (name,)
    why = (
        f"its data are '{name}', which no task is called" if name else "the model does not say what it was trained on"
    )
    known = "; ".join(f"{name} reads {task.FILES}" for name, task in TASKS.items())
    raise ConfigError(f"name a task by --tasks, and its folder by --data DIR, since {why}: {known}")


def find_folder(name, task, data, of_run) -> str:
    """The folder of a task: the one that `data` names, else that of the run.

    Raises:
      ConfigError: it is not known.
    """
    folder = data.get(name) if isinstance(data, collections.abc.Mapping) else data
    if folder:
        return folder
    trained_on = folders_of(of_run)
    if len(trained_on) == 1:
        return trained_on[0]
    known = f"was trained on several: {', '.join(trained_on)}" if trained_on else "names no folder of data"
    raise ConfigError(
        f"task '{name}' reads {task.FILES}, and the model {known}; name one by --data DIR or --data {name}=DIR"
    )


def load_examples(model, name, data=None, split=None, limit=None) -> list:
    """The examples of the task `name`; arguments and errors as of `evaluate`."""
    task = choose("task", name, TASKS)
    folder = find_folder(name, task, data, model.program.config.data)
    examples = list(task.examples(folder, split or task.SPLIT, limit))
    if not examples:
        raise ConfigError(
            f"task '{name}' has no examples in {folder}, split '{split or task.SPLIT}'; it reads {task.FILES}"
        )
    return examples


def prepare(model, name, data, split, limit, scale, skip_bad=False) -> Asked:
    """Everything of a task that is known before the first answer.

    Args:
      model, data, split, limit, skip_bad: see `evaluate`.
      name: of the task.
      scale: the most visual tokens of a picture that will be asked for.

    Raises:
      ConfigError, FileNotFoundError, ValueError: see `evaluate`.
    """
    task = choose("task", name, TASKS)
    folder = find_folder(name, task, data, model.program.config.data)
    faults = task.check(folder, split or task.SPLIT) if hasattr(task, "check") else []
    remarks = [fault for fault in faults if fault.startswith(NOT_AS_PUBLISHED)]
    faults = [fault for fault in faults if fault not in remarks]
    if faults and not skip_bad:
        raise ConfigError(
            f"task '{name}' cannot be asked from {folder}: {'; '.join(faults)}. `lmm evaluate --tasks {name} "
            "--describe` says which files it reads; --skip-bad leaves out questions whose pictures are missing"
        )
    for line in (*remarks, *faults):
        print(f"{name}: {line}", file=sys.stderr)
    examples = load_examples(model, name, data, split, limit)
    questions, unreadable = ask(model, task, examples, scale, skip_bad, name)
    left_out = len(examples) - len(questions) - len(unreadable)
    if left_out:
        of_them = f"{left_out:,} of {len(examples):,} questions with their answers"
        trained = f"the {model.length:,} positions that were trained (data.length)"
        why = f"do not fit into {trained} at {scale} visual tokens"
        if not questions:
            raise ConfigError(f"task '{name}': {of_them} {why}; ask at smaller --scales")
        print(f"{name}: {of_them} {why}, and are left out", file=sys.stderr)
    for _, why in unreadable[:NAMED]:
        print(f"{name}: left out: {why}", file=sys.stderr)
    if len(unreadable) > NAMED:
        print(f"{name}: {len(unreadable):,} questions are left out as their pictures cannot be read", file=sys.stderr)
    if not questions:
        raise ConfigError(f"task '{name}': of none of {len(examples):,} questions the pictures can be read")
    place = str(storage.absolute(folder))  # so that it is the same from wherever it is named
    return Asked(task, place, split or task.SPLIT, len(examples), questions, left_out, unreadable, remarks)


def ask(model, task, examples, scale, skip_bad=False, name="") -> tuple[list[Question], list[tuple[int, str]]]:
    """The questions of a task that fit into what a model was trained on.

    Args:
      model: that `lmm.load` returned.
      task: module of `tasks.TASKS`.
      examples: its `Example`s.
      scale: visual tokens of a picture, the most that will be asked.
      skip_bad: leave out questions with pictures that cannot be read, instead of raising what is wrong.
      name: of the task, for the bar.

    Returns:
      a `Question` for each example whose prompt leaves room for its shortest true answer, where one is known. The
      answer may have as many tokens as the task says, or as there is room for. And `(number, why)` of each question
      that was left out as bad.

    Raises:
      ValueError, OSError: a picture that cannot be read, with the question that shows it.
    """
    form, questions, unreadable = getattr(task, "PROMPT", "{question}"), [], []
    depends = hasattr(task, "max_new_tokens")
    most = task.max_new_tokens(examples, model.tokenizer) if depends else task.MAX_NEW_TOKENS
    pictures = of_one_picture(examples).tolist()
    bar = tqdm(examples, desc=f"{name}: checking", unit=" questions", disable=None, leave=False)
    for number, example in enumerate(bar):
        prompt = form.format(question=example.question)
        if example.history:
            turns = (*example.history, ("user", prompt))
            prompt = [{"role": role, "content": text} for role, text in turns]
        try:
            room = model.room(example.images, prompt, scale)
        except (ValueError, OSError) as error:
            why = f"question {example.id if example.id != '' else number}: {error}"
            if not skip_bad:
                raise type(error)(f"{name}: {why}; --skip-bad goes on without it" if name else why) from error
            unreadable.append((number, why))
            continue
        if room >= min((len(model.tokenizer.encode(truth)) for truth in example.answers), default=1):
            questions.append(Question(number, example, prompt, min(most, max(1, room)), pictures[number]))
    return questions, unreadable
