"""Asking a model on the command line: one question, whose answer is shown as it comes, or many."""

import json
import sys
import time

from tqdm import tqdm

from lmm_jax.asking.answers import Answers, asked
from lmm_jax.asking.questions import abbreviated
from lmm_jax.generation.answer import ENDED, FULL, STOPPED
from lmm_jax.generation.model import AUTO, answer_each

WHY = {ENDED: "the model ended it", STOPPED: "a stop text or id ended it", FULL: "there was no room for more"}


def ask_one(model, images, prompt, options, streams, verbose) -> dict:
    """Answers a question and prints the answer, piece by piece where it `streams`.

    Args:
      model: the `Model`.
      images, prompt, options: arguments of `Model.stream`.
      streams: whether pieces are printed as they come.
      verbose: tell times, tokens and programs on stderr.

    Returns:
      what `--json` prints.
    """
    begin = time.monotonic()
    pieces, said, first = model.stream(images, prompt, **options), [], None
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            answer = end.value
            break
        first = first or time.monotonic() - begin
        said.append(piece)
        if streams:
            print(piece, end="", flush=True)
    seconds = time.monotonic() - begin
    print("" if streams else answer.text)
    first = seconds if first is None else first
    # Of an answer that came all at once, as a cascade may give it, nothing is known of its tokens.
    rate = (len(answer.ids) - 1) / (seconds - first) if len(said) > 1 and seconds > first else None
    if verbose:
        told = f"{len(answer.ids)} tokens: the first after {first:.2f} s"
        told += f", then {rate:,.1f} a second" if rate else ""
        _say(f"{told}; {WHY[answer.reason]}")
        _say(
            f"prompt: {answer.prompt_positions} positions; {answer.visual_tokens} visual tokens, scale {answer.scale}"
        )
        _say(_programs(model))
    return {
        "text": answer.text,
        "scale": answer.scale,
        "visual_tokens": answer.visual_tokens,
        "seconds": seconds,
        "reason": answer.reason,
        "tokens": len(answer.ids),
        "prompt_positions": answer.prompt_positions,
        "first_token_seconds": first,
        "tokens_per_second": rate,
    }


def ask_many(model, questions, out=None, skip_bad=False, verbose=False) -> dict:
    """Answers `Question`s, all of them as one queue, and writes a line for each answer as soon as it is there.

    Args:
      model: the `Model`.
      questions: list of `Question`.
      out: file of the lines, see `answers.Answers`; they are printed if it is None. What it has an answer to already
        is not asked again.
      skip_bad: write why a question cannot be asked in the place of its answer, instead of raising it.
      verbose: tell tokens and programs on stderr.

    Returns:
      what `--json` prints.

    Raises:
      ValueError: a question that cannot be asked; none was answered and nothing written then, unless a picture is
        damaged behind its header.
    """
    digests = {}
    if out is not None:
        digests = {str(question.id): asked(question, _identity(model, question)) for question in questions}
    answers = Answers(out, digests) if out is not None else _Printed()
    left = [question for question in questions if str(question.id) not in answers.done]
    check_all(model, left, skip_bad)
    kept = len(questions) - len(left)
    counts = {"answers": kept, "kept": kept, "refused": 0, "tokens": 0, "visual_tokens": 0}
    begin = time.monotonic()
    try:
        answers.begin()
        bar = tqdm(desc="answering", total=len(questions), initial=kept, unit=" questions", disable=None)
        with bar:
            for question, found in _answers(model, left):
                if not isinstance(found, str):
                    digest = {"asked": digests[str(question.id)]} if out is not None else {}
                    answers.add(_line(question, found) | digest)
                    counts["answers"] += 1
                    counts["tokens"] += len(found.ids)
                    counts["visual_tokens"] += found.visual_tokens
                elif skip_bad:
                    answers.add({"id": question.id, "error": found})
                    counts["refused"] += 1
                else:
                    raise ValueError(f"{question.where}: {found}; --skip-bad goes on without it")
                bar.update()
    finally:
        answers.close()
    seconds = time.monotonic() - begin
    if verbose:
        tokens = counts["tokens"]
        _say(f"{counts['answers'] - kept:,} answers in {seconds:.1f} s, {tokens / seconds:,.1f} tokens a second")
        _say(f"prompts: {counts['visual_tokens']:,} visual tokens")
        _say(_programs(model))
    if out is not None:
        before = f", {kept:,} of them from before" if kept else ""
        refused = f"; {counts['refused']:,} questions that could not be asked" if counts["refused"] else ""
        print(f"{out}: {counts['answers']:,} answers{before}{refused}")
    return {**counts, "seconds": seconds, "out": None if out is None else str(out)}


def _identity(model, question):
    """What the answer to a `Question` depends on of a `Model`, in a text: where it chooses the scale, how it does."""
    chooses = question.options.get("scale") == AUTO and model.auto is not None
    return f"{model.identity} {model.auto.identity}" if chooses else model.identity


def check_all(model, questions, skip_bad):
    """Lays out each question, so that none is refused later; `model` is None while it is not loaded.

    Raises:
      ValueError: the first one that cannot be asked, by its place, unless `skip_bad`; its `error` says why.
    """
    for question in tqdm(
        questions, desc="checking", unit=" questions", disable=True if model is None else None, leave=False
    ):
        if model is not None and not question.error:
            try:
                model.request(question.images, question.prompt, **question.options)
            except (ValueError, OSError) as error:
                question.error = str(error)
        if question.error and not skip_bad:
            raise ValueError(f"{question.where}: {question.error}")


def _answers(model, questions):
    """`(question, answer)` as the answers end; `(question, why)` of one that cannot be answered."""

    def make(question):  # again, so that not all of them are in memory at the same time
        if question.error:
            raise ValueError(question.error)
        return model.request(question.images, question.prompt, **question.options)

    for question, found in answer_each(model, questions, make):
        yield question, str(found) if isinstance(found, Exception) else found


def _line(question, answer):
    return {
        "id": question.id,
        **abbreviated(question.said),
        "scale": answer.scale,
        "text": answer.text,
        "reason": answer.reason,
        "visual_tokens": answer.visual_tokens,
        "prompt_positions": answer.prompt_positions,
        "tokens": len(answer.ids),
    }


class _Printed:
    """Answers that are printed instead of being kept, see `Answers`."""

    done = frozenset()

    def begin(self):
        self._ascii = not (sys.stdout.encoding or "").lower().startswith("utf")

    def add(self, answer):
        with tqdm.external_write_mode():
            print(json.dumps(answer, ensure_ascii=self._ascii), flush=True)

    def close(self):
        pass


def _programs(model):
    counts = {name: count for name, count in model.engine.programs.compiled().items() if count}
    return f"programs compiled or taken from disk: {', '.join(f'{name} {count}' for name, count in counts.items())}"


def _say(line):
    print(line, file=sys.stderr, flush=True)
