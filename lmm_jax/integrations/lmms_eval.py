"""lmms-eval's models: `python -m lmms_eval --model lmm_jax --model_args pretrained=DIR,scale=9 --tasks …`.

All requests of a kind are one queue of `Model.answers`, in which a question takes the place of another as soon as
that is answered. Nothing is caught that the harness should know: a request that cannot be answered ends the
evaluation, with its task and its document named, unless `skip_bad` asks for an empty answer.
"""

import dataclasses
import os
import time

import jax
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from lmm_jax.data.conversation import IMAGE_TAG, encode
from lmm_jax.generation.arguments import kind, read_flag, read_number
from lmm_jax.generation.model import load
from lmm_jax.integrations.arguments import (
    WHOLE_OR_ZERO,
    Generation,
    read_generation,
    read_load_options,
    split_pictures,
)

AT_A_TIME = 128  # questions in the engine's hands, whose pictures are held decoded
MOST_ROUNDS = 100  # of a document; a task that goes on for longer never says that it is over


@dataclasses.dataclass
class Counts(TokenCounts):
    """Tokens of a request, as logged samples show them; the visual ones are among the input tokens too."""

    visual_tokens: int = 0

    def to_dict(self):
        return {**super().to_dict(), "visual_tokens": self.visual_tokens}


class Rounds(list):
    """The answers to a document, one for each round.

    The response cache of lmms-eval 0.7.3 takes what a `GenerationResult` holds for a text, and asks if it is blank.
    """

    def strip(self):
        return "".join(self).strip()


class Likelihood(tuple):
    """`(loss, is_greedy)` of a choice.

    lmms-eval 0.7.3 makes a text of such a pair unless a `GenerationResult` holds it, and again of a pair that its
    response cache kept. So this looks blank to the cache, which keeps nothing blank.
    """

    def strip(self):
        return ""


class Asked:
    """A request of the harness, and what was answered to it.

    Attributes:
      where: what to call it in a message.
      task: name of its task.
      context: the text that the harness knows it by.
      same: equal for requests that ask the same of the same document.
      texts: the answers so far, one for each round.
      answers: the `Answer`s that they come from; None for a question that was left out.
    """

    counts = (6,)  # arguments that the harness gives

    def __init__(self, request, documents):
        """For an `Instance` of lmms-eval, and the `task_dict` of the model."""
        args = request.args
        if len(args) not in self.counts:
            valid = " or ".join(map(str, self.counts))
            raise ValueError(f"lmms-eval gave a request of {len(args)} arguments; {valid} are known, as in 0.7.3")
        *_, doc_id, self.task, split = args
        self.where = f"task '{self.task}', document {doc_id} of split '{split}'"
        self.document = lambda: documents[self.task][split][doc_id]
        self.context, self.same = args[0], (args[0], doc_id, self.task, split)
        self.texts, self.answers = [], []
        self._said = None  # by the task, with its last question
        self.read(*args)

    def question(self) -> tuple | None:
        """`(images, prompt)` of the next round, as `Model.request` takes them; None if there is none."""
        return self.further() if self.texts else self.first()

    def next_round(self, function, count) -> list | None:
        """What a function of the task asks in a further round, of `count` values that it returns; None at the end."""
        values = function(
            self.document(),
            round_idx=len(self.texts),
            previous_output=list(self.texts),
            previous_round_info=self._said,
        )
        if not isinstance(values, tuple) or len(values) != count:
            raise ValueError(f"the task gave {kind(values)} for a further round, not a tuple of {count} values")
        *question, over, texts, self._said = values
        if over and texts is not None:
            self.texts = list(texts)
        return None if over else question


class AskedSimply(Asked):
    """A request for text after pictures and text; in a task of several rounds it has an argument more."""

    counts = (6, 7)

    def read(self, context, gen_kwargs, doc_to_visual, *more):
        self.gen_kwargs, self._doc_to_visual, self._doc_to_text = gen_kwargs, doc_to_visual, more[0]

    def first(self):
        return _flat(self._doc_to_visual(self.document())), self.context

    def further(self):
        found = self.next_round(self._doc_to_text, 5)
        return found and (_flat(found[0]), found[1])


class AskedByMessages(Asked):
    """A request for text after messages with pictures."""

    def read(self, context, doc_to_messages, gen_kwargs, *_):
        self.gen_kwargs, self._doc_to_messages = gen_kwargs, doc_to_messages

    def first(self):
        return split_pictures(self._doc_to_messages(self.document()))

    def further(self):
        found = self.next_round(self._doc_to_messages, 4)
        return found and split_pictures(found[0])


class AskedChoice(AskedSimply):
    """A request for the likelihood of a text after pictures and text, of which only the first round is asked."""

    counts = (6,)

    def read(self, context, choice, doc_to_visual, *_):
        self._doc_to_visual = doc_to_visual
        self.choice = (choice if isinstance(choice, str) else choice(self.document())).strip()

    def question(self):
        return self.first()


class SimpleModel(lmms):
    """A model of ours for tasks in their simple form: a text, and pictures.

    Args:
      pretrained: a workdir, an export or a released folder, see `lmm.load`.
      scale: visual tokens of a square view, or "auto"; the largest trained scale if None.
      max_length: positions that a prompt and its answer may take, if fewer than the model's own `length`.
      system_prompt: text, or a file that holds it, that comes before every question.
      seed: of answers that are drawn; answers to equal requests differ.
      skip_bad: give an empty answer to a question that cannot be asked (a picture that cannot be read, or a prompt
        that is too long) and count those, instead of ending the evaluation. A choice that has no likelihood ends it.
      batch_size: above 1, no more questions are in the engine's hands together. The engine takes as many as there is
        memory for, so that neither 1, the harness's default, nor "auto" means anything to it.
      max_batch_size: as good as absent.
      device: what the harness was told; JAX chooses by itself, and a difference is said.
      others: keyword arguments of `lmm.load`, such as dtype and template.

    Raises:
      ValueError, OSError: an argument that means nothing, and what `lmm.load` says.
    """

    Asked = AskedSimply

    def __init__(
        self,
        pretrained=None,
        scale=None,
        max_length=None,
        system_prompt=None,
        seed=0,
        skip_bad=False,
        batch_size=1,
        max_batch_size=None,
        device=None,
        **others,
    ):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: start one process, without `accelerate launch`; JAX uses "
                "all chips of this machine by itself"
            )
        if pretrained is None:
            raise ValueError("model_args: pretrained=DIR is missing, a workdir of `lmm train` or a model's folder")
        options = read_load_options(others)
        self._skip_bad = read_flag("model_args: skip_bad", skip_bad)
        self._seed = read_number("model_args: seed", seed, WHOLE_OR_ZERO, least=0)
        count = int(batch_size) if str(batch_size).isnumeric() else batch_size
        self._at_a_time = AT_A_TIME if count in (None, "auto", 1) else read_number("batch_size", count)
        self._system = self._resolve_system_prompt(system_prompt)
        self.model, self._scale = load(str(pretrained), **options), scale
        self.model.check_budget(scale)
        self._length = most = self.model.length
        if max_length is not None:
            valid = f"a whole number from 1 to {most:,} is valid, the positions that this model has"
            self._length = read_number("model_args: max_length", max_length, valid, 1, most)
        self._ignored = set()  # (task, key) that was said
        platform, told = jax.default_backend(), str(device or "").split(":")[0]
        if told and {"cuda": "gpu"}.get(told, told) != platform:
            logger.warning(f"--device {device} is not what JAX runs on ({platform}); set JAX_PLATFORMS to choose")
        logger.info(f"{pretrained} answers on {jax.device_count()} devices ({platform})")

    def generate_until(self, requests):
        """A `GenerationResult` for each request, with its `Counts`."""
        asked = [self.Asked(request, self.task_dict) for request in requests]
        self._answer_all(asked, self._generations(asked))
        for one in asked:
            self.cache_hook.add_partial("generate_until", (one.context, one.gen_kwargs), one.texts[0])
        return [GenerationResult(one.texts[0], _counts(one.answers)) for one in asked]

    def generate_until_multi_round(self, requests):
        """A `GenerationResult` for each request, whose text is the list of its rounds' answers; `Counts` are sums.

        What all documents are asked in a round is answered together, and then what they are asked in the next.
        """
        asked = [self.Asked(request, self.task_dict) for request in requests]
        left, generations = asked, self._generations(asked)
        for _ in range(MOST_ROUNDS):
            left = self._answer_all(left, generations, "Rounds")
            if not left:
                break
        else:
            raise ValueError(f"{left[0].where}: it is not over after {MOST_ROUNDS} rounds")
        for one in asked:
            self.cache_hook.add_partial("generate_until_multi_round", (one.context, one.gen_kwargs), one.texts)
        return [GenerationResult(Rounds(one.texts), _counts(one.answers)) for one in asked]

    def loglikelihood(self, requests):
        """A `GenerationResult` for each request, whose text is `(loss, is_greedy)`.

        The loss is the mean negative log-likelihood of the choice's tokens, the one that ends an answer among them,
        as lmms-eval's own models return it: of several choices the harness takes that with the *least*. `is_greedy`
        says whether the model, asked the question, says exactly that choice.
        """
        asked = [AskedChoice(request, self.task_dict) for request in requests]
        tokens = [self._tokens(one) for one in asked]
        alike, generations = {}, {}
        for n, one in enumerate(asked):
            alike.setdefault(one.same, []).append(n)
        for numbers in alike.values():
            generations[asked[numbers[0]]] = Generation(max(tokens[n] for n in numbers), {})
        self._answer_all(list(generations), generations, "Greedy answers", skip_bad=False)
        results = [None] * len(asked)
        for first, numbers in zip(generations, tqdm(alike.values(), desc="Choices", disable=None), strict=True):
            try:
                images, prompt = first.question()
                choices = [asked[n].choice for n in numbers]
                found = self.model.score(images, self._with_system(prompt), choices, self._scale)
            except (ValueError, OSError) as error:
                raise _named(first, error) from error
            for n, logprob in zip(numbers, found, strict=True):
                (answer,) = first.answers
                greedy = answer.reason == "end" and answer.text.strip() == asked[n].choice
                counts = Counts(answer.prompt_positions, tokens[n], visual_tokens=answer.visual_tokens)
                results[n] = GenerationResult(Likelihood((-logprob / tokens[n], greedy)), counts)
                self.cache_hook.add_partial("loglikelihood", (asked[n].context, asked[n].choice), results[n].text)
        return results

    def _generations(self, asked):
        """`{request: Generation}`; all are read before the first is answered, and keys that mean nothing are said."""
        found = {}
        for number, one in enumerate(asked):
            try:
                found[one] = read_generation(one.gen_kwargs, number, self._seed)
            except ValueError as error:
                raise ValueError(f"task '{one.task}', generation_kwargs: {error}") from error
            for key in found[one].ignored:
                if (one.task, key) not in self._ignored:
                    self._ignored.add((one.task, key))
                    logger.warning(f"task '{one.task}', generation_kwargs: {key} is not known here, and ignored")
        return found

    def _answer_all(self, asked, generations, title="Answers", skip_bad=None):
        """Answers what each request asks next; returns those that asked something."""
        skip_bad = self._skip_bad if skip_bad is None else skip_bad
        waiting, over, left_out, begin = {}, set(), [], time.monotonic()

        def fail(one, error):
            if not skip_bad:
                raise _named(one, error) from error
            logger.warning(f"{_named(one, error)}; its answer is empty")
            left_out.append(one)
            one.texts.append("")
            one.answers.append(None)

        def queue():
            for one in asked:
                try:
                    question = one.question()
                    request = question and self._request(*question, generations[one])
                except (ValueError, OSError) as error:
                    fail(one, error)
                    continue
                if request is None:
                    over.add(one)
                    continue
                waiting[request] = one
                yield request

        with tqdm(total=len(asked), desc=title, unit=" requests", disable=None) as progress:
            for request, answer in self.model.answers(queue(), self._at_a_time):
                one = waiting.pop(request)
                if isinstance(answer, Exception):
                    fail(one, answer)
                else:
                    one.texts.append(answer.text)
                    one.answers.append(answer)
                progress.update()
        if left_out:
            logger.warning(f"{len(left_out):,} of {len(asked):,} questions could not be asked: empty answers")
        self._report([one.answers[-1] for one in asked if one not in over], time.monotonic() - begin)
        return [one for one in asked if one not in over]

    def _request(self, images, prompt, generation):
        """A question of the queue, whose answer has as many tokens as asked for, or as there is room for."""
        prompt = self._with_system(prompt)
        largest = None if self._scale == "auto" else self._scale
        room = self.model.room(images, prompt, largest) - (self.model.length - self._length)
        if room < 1 and self._length < self.model.length:
            raise ValueError(f"the prompt leaves no room for an answer in max_length={self._length:,}; give more")
        tokens = max(1, min(generation.max_new_tokens, room))
        return self.model.request(images, prompt, self._scale, tokens, **generation.options)

    def _with_system(self, prompt):
        """A prompt with the system prompt before it."""
        if not self._system:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return [{"role": "system", "content": self._system}, *messages]

    def _tokens(self, one):
        """Tokens of a choice as the answer to a question, with the one that ends it."""
        template, asked = self.model.program.config.data.template, ("user", f"{IMAGE_TAG}\n?")
        try:
            both = encode([asked, ("assistant", one.choice)], self.model.tokenizer, template)
        except ValueError as error:
            raise _named(one, error) from error
        return int(both.turn_ends[-1]) - len(encode([asked], self.model.tokenizer, template).ids)

    def _report(self, answers, seconds):
        """Tells the harness how many tokens were generated, and how many visual ones read, for its `throughput`."""
        answers = [answer for answer in answers if answer]
        if answers:
            tokens = sum(len(answer.ids) for answer in answers)
            visual = sum(answer.visual_tokens for answer in answers) / len(answers)
            log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), {"visual_tokens": visual})


class ChatModel(SimpleModel):
    """A model of ours for tasks in their form of messages; what has choices has the simple form alone."""

    is_simple = False
    Asked = AskedByMessages


def _flat(visuals):
    """The pictures of a document: a list of them, which may be nested, or None."""
    if visuals is None:
        return []
    if not isinstance(visuals, list | tuple):
        return [visuals]
    return [picture for visual in visuals for picture in _flat(visual)]


def _counts(answers):
    """The `Counts` of the answers to a request; None where one was left out."""
    if None in answers or not answers:
        return None
    return Counts(
        input_tokens=sum(answer.prompt_positions for answer in answers),
        output_tokens=sum(len(answer.ids) for answer in answers),
        visual_tokens=sum(answer.visual_tokens for answer in answers),
    )


def _named(one, error):
    """An error of a request, with the request's task and document before it."""
    kind_of = OSError if isinstance(error, OSError) else ValueError
    return kind_of(f"{one.where}: {error}")
