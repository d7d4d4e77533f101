"""Answering the questions of a task at one budget, on any number of hosts: nothing is lost, nothing asked twice."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import sys
import time

import jax
from tqdm import tqdm

from lmm_jax.evaluation import records
from lmm_jax.evaluation.records import Record
from lmm_jax.generation.model import answer_each
from lmm_jax.pods import hosts


def header(model, name, asked, scale, limit) -> dict:
    """What the answers to a task's questions at one budget depend on; the first line of their result file.

    Args:
      model: the `Model`.
      name: of the task.
      asked: its `questions.Asked`.
      scale: budget, or "auto".
      limit: see `evaluate`.
    """
    config = model.program.config
    limits = [q.max_new_tokens for q in asked.questions]
    unlike = {"limits": _short_digest(limits)} if len(set(limits)) > 1 else {}
    of_pictures = ("aspect", "canvas", "tilings", "views")
    if config.data.aspect == "native":
        of_pictures += ("min_pixels", "max_pixels")
    told = {
        "format": records.FORMAT,
        "task": name,
        "metric": getattr(asked.task, "METRIC", "of this library"),
        "split": asked.split,
        "limit": limit,
        "scale": scale,
        "model": model.identity,
        "template": config.data.template,
        "prompt": getattr(asked.task, "PROMPT", "{question}"),
        "decoding": {"greedy": True, "max_new_tokens": max(limits)} | unlike,
        "preprocessing": {
            **{name: config.data[name] for name in of_pictures},
            "encoder": config.model.encoder,
            "reduction": config.model.reduction,
        },
        "data": {"folder": asked.folder, "digest": digest(asked.questions)},
        "examples": asked.examples,
        "questions": len(asked.questions),
        "left_out": asked.left_out,
        "missing": [list(one) for one in asked.unreadable],
        "remarks": asked.remarks,
        "version": importlib.metadata.version("lmm_jax"),
        "date": datetime.date.today().isoformat(),
    }
    if scale == "auto":
        auto = model.auto
        told["auto"] = {
            "use": auto.use,
            "way": dataclasses.asdict(auto.way),
            "scales": auto.scales,
            "step": auto.step,
            "weights": auto.identity,
        }
    return json.loads(json.dumps(told))


def digest(questions) -> str:
    """A digest of what is asked, `Question`s; of pictures that are files only the places count."""
    total = hashlib.sha256()
    shown = {id(image): image for q in questions for image in q.example.images}
    names = {number: _name(image) for number, image in shown.items()}
    for q in questions:
        pictures = [names[id(image)] for image in q.example.images]
        total.update(json.dumps([q.number, str(q.example.id), q.prompt, q.example.answers, pictures]).encode())
    return total.hexdigest()[:16]


def _name(image):
    """A text that equal pictures share: the place of a file, a digest of what is in memory already."""
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)
    return hashlib.blake2b(image if isinstance(image, bytes) else image.tobytes(), digest_size=16).hexdigest()


def _short_digest(told):
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def answer_all(model, asked, scale, results, title, skip_bad=False) -> set[int]:
    """Answers the questions that `results` lacks, those of this host's share, and adds what is answered to it.

    On return every host has all answers, and where they are kept the one file of all is written.

    Args:
      model: the `Model`.
      asked: `questions.Asked`.
      scale: budget, or "auto".
      results: `records.Results`.
      title: of the progress bar.
      skip_bad: leave out a question whose picture turns out to be damaged, instead of raising that.

    Returns:
      numbers of the questions that turned out not to be answerable, on any host.

    Raises:
      ValueError: a picture that is damaged behind its header; or the hosts do not share the folder.
    """
    left = [q for q in asked.questions if q.number not in results.done]
    hosts.everywhere(True)  # none begins to write before all have read what is there
    if len(left) < len(asked.questions) and left:
        done = len(asked.questions) - len(left)
        print(f"{title}: {done:,} of {len(asked.questions):,} questions were answered before", file=sys.stderr)
    mine = left[jax.process_index() :: jax.process_count()]
    bad = set()
    with tqdm(
        desc=title,
        total=len(mine),
        unit=" questions",
        disable=None if jax.process_index() == 0 else True,
        leave=False,
    ) as bar:
        before = time.monotonic()
        try:
            for question, found in _answers(model, mine, scale):
                now = time.monotonic()
                if isinstance(found, Exception):
                    why = f"question {question.example.id if question.example.id != '' else question.number}: {found}"
                    if not skip_bad:
                        raise ValueError(f"{title}: {why}; --skip-bad goes on without it") from found
                    print(f"{title}: left out: {why}", file=sys.stderr)
                    bad.add(question.number)
                else:
                    results.add(_record(asked.task, question, found, now - before))
                before = now
                bar.update()
        finally:
            results.flush()
    hosts.everywhere(True)
    if jax.process_count() > 1:
        results.read_again()
    refused = hosts.anywhere([q.number in bad for q in asked.questions])
    bad = {q.number for q, is_bad in zip(asked.questions, refused, strict=True) if is_bad}
    lacking = {q.number for q in asked.questions} - results.done.keys() - bad
    if lacking:
        raise ValueError(
            f"{title}: {len(lacking):,} answers of other hosts are not there; --out has to be a folder that all "
            "hosts share"
        )
    hosts.everywhere(True)
    if jax.process_index() == 0:
        results.finish()
    return bad


def _answers(model, questions, scale):
    """`(question, (Answer, what the router expects))` as answers end; `(question, error)` of one that has none."""

    def make(question):
        return model.request(question.example.images, question.prompt, scale, question.max_new_tokens, again=False)

    for question, found in answer_each(model, questions, make):
        if isinstance(found, Exception):
            yield question, found
        else:
            yield question, (found, model.expect(question.example.images, question.prompt) or ())


def _record(task, question, found, seconds):
    """The `Record` of an answer; ValueError if the model's log-probabilities are no numbers."""
    answer, expected = found
    example = question.example
    if not all(map(math.isfinite, (*answer.logprobs, answer.end))):
        raise ValueError(
            f"question {example.id if example.id != '' else question.number}: the model gives its answer the "
            f"log-probabilities {answer.logprobs}, which are no numbers: its parameters or its dtype are at fault"
        )
    scored = hasattr(task, "score") and example.answers
    return Record(
        number=question.number,
        id=example.id,
        kind=example.kind,
        question=question.prompt if isinstance(question.prompt, str) else question.prompt[-1]["content"],
        truths=tuple(example.answers),
        answer=answer.text,
        logprobs=tuple(round(float(x), 6) for x in answer.logprobs),
        end=round(answer.end, 6),
        reason=answer.reason,
        scale=answer.scale,
        visual_tokens=answer.visual_tokens,
        seconds=round(seconds, 6),
        score=float(task.score(example, answer.text)) if scored else None,
        expected=tuple(round(float(x), 6) for x in expected),
        picture=question.picture,
    )
