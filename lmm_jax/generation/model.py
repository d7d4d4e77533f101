"""Loading a trained model and asking it about pictures, with a number of visual tokens for every question."""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import sys

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import families, sharding
from lmm_jax.config import read_config, save_config, visual_layout
from lmm_jax.data.conversation import check_ids, check_template, encode, find_missing_rows, find_template, stop_id
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.questions import read_questions
from lmm_jax.data.segments import TEXT
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.data.views import native_size, resize
from lmm_jax.generation.answer import Answer
from lmm_jax.generation.arguments import read_each, read_flag, read_number, read_numbers, read_sampling
from lmm_jax.generation.auto import by_density, load_auto
from lmm_jax.generation.chat import Chat
from lmm_jax.generation.engine import Engine, bucket
from lmm_jax.generation.pictures import Picture
from lmm_jax.generation.prompts import read_pictures, read_queries, read_sizes
from lmm_jax.generation.requests import Prompt, Request
from lmm_jax.generation.text import TextStream
from lmm_jax.hf.chat_templates import find_differences
from lmm_jax.hf.load import load_params, read_stored
from lmm_jax.hf.peft import adapter_fields, read_adapter
from lmm_jax.hf.read_config import is_model, read_model_config, read_task
from lmm_jax.hf.snapshot import download_hint, model_folder
from lmm_jax.reduction import factor_of
from lmm_jax.training import adapters
from lmm_jax.training.base import restore_params
from lmm_jax.training.checkpoint import Checkpoints
from lmm_jax.training.digest import digest
from lmm_jax.training.memory import check_params
from lmm_jax.training.saved import check_holds_step
from lmm_jax.training.state import abstract_params, make_program

NEW_TOKENS = 64  # of an answer, where nothing else is asked for
AT_A_TIME = 512  # questions of `answers` that are in the engine's hands: several times what it decodes together
AUTO = "auto"  # the scale that the model chooses, see `generation.auto`


def load(path, dtype=None, template=None, *, vision=None, allow_pickle=False, reduction=None, adapter=None):
    """Loads a model onto the devices of this process; says first, on stderr, what it takes and what is free.

    Args:
      path: a workdir of `lmm train`, whose newest sound checkpoint is taken, or a model's folder in LLaVA's original
        layout or that of transformers (llava, llava_next, fast_vlm, what `lmm export` wrote); or a model in Hugging
        Face's cache, see `hf.snapshot.model_folder`.
      dtype: "float32" or "bfloat16", of parameters, computation, keys and values. If None, nothing that is stored is
        lost: parameters that were stored in bfloat16 are bfloat16, others float32, and the computation is in the type
        that the model was trained or stored in, but for float16 in float32. A line says which is which.
      template: layout of its prompts, see `data.conversation.find_template`; the one that the folder says if None.
      vision: folder of the vision tower, for a folder that neither holds nor names it.
      allow_pickle: see `hf.safetensors.Folder`.
      reduction: how a grid becomes visual tokens, a name in `reduction.REDUCTIONS`; as the model was trained if None.
      adapter: folder of adapters as PEFT writes them, which are merged into the model's kernels; None for none.

    Raises:
      FileNotFoundError: it is neither, or a file of it is missing; nothing was read of the weights then but names.
      ValueError: no such dtype or template, or a template that does not fit the tokenizer; a reduction that does not
        exist, or that the encoder or the layout of the pictures does not go with; parameters that cannot fit the
        memory that is free, which is known before they are read; no sound checkpoint; or tensors or keys of the
        folder that do not fit, which the message lists.
    """
    path = model_folder(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} is neither a workdir of `lmm train` nor a model (no config.json){download_hint(path)}"
        )
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: 'float32' or 'bfloat16' is valid, or None")
    table, task, step = [], "", None
    if is_model(path):
        vision = None if vision is None else model_folder(vision)
        config = _adapted(read_model_config(path, vision), dtype, template, reduction)
        tokenizer = load_tokenizer(path, families.DECODERS[config.model.families.decoder].tokenizer)
        check_template(tokenizer, config.data.template)
        stored = read_stored(path, config.model, allow_pickle)
        rows = stored.rows or config.model.decoder.vocab_size
        if missing := find_missing_rows(tokenizer, config.data.template, rows):
            print(f"{path}: {missing}. Prompts that need such ids are refused", file=sys.stderr)
        held = dtype or stored.held
        if dtype is None and "float16" in stored.kinds:  # whatever `config.json` says: bfloat16 would drop bits
            config = _adapted(config, "float32", None, None)
        if template is None and (differences := find_differences(path, config.data.template)):
            print(differences, file=sys.stderr)
        program = make_program(config, _mesh(config))
        kinds = f"stored in {' and '.join(stored.kinds)}, held in {np.dtype(held).name}, computed in"
        _say(path, f"{check_params(program, held)}; {kinds} {config.model.dtype}")
        abstract = abstract_params(program, held)
        params, table = load_params(path, config.model, abstract, vision, allow_pickle)
        task = read_task(path)
    else:
        config = _adapted(read_config(path / "config.json"), dtype, template, reduction)
        tokenizer = load_tokenizer(path)
        check_template(tokenizer, config.data.template)
        if missing := find_missing_rows(tokenizer, config.data.template, config.model.decoder.vocab_size):
            raise ValueError(f"{path}: {missing}")
        check_holds_step(path)
        program = make_program(adapters.plain_config(config), _mesh(config))
        _say(path, check_params(program))
        params, step = restore_params(path, program)
        if dtype is not None:
            params = jax.tree.map(lambda x: x.astype(dtype), params)
    if adapter is not None:
        params = _adapt(program, params, adapter)
    model = Model(program, params, tokenizer, table, task, step)
    if reduction is None and adapter is None:  # else answers are others than those that it was fitted to
        model.auto = _auto_of(path, model)
    return model


def _adapt(program, params, folder):
    """Parameters with the adapters of a folder merged, each of the dtype that it has."""
    config, shapes = program.config.copy_and_resolve_references(), flatten_dict(abstract_params(program), sep="/")
    fields = adapter_fields(folder, config.model, {path: x.shape for path, x in shapes.items()})
    with config.unlocked():
        config.lora.update(fields)
        config.optimizer.groups = ()  # nothing is trained here
    planned = flatten_dict(abstract_params(make_program(config, program.mesh)), sep="/")
    read = read_adapter(folder, config.model, planned)
    flat = flatten_dict(params, sep="/")
    flat |= {path: jax.device_put(x, planned[path].sharding) for path, x in read.items()}
    merged = adapters.merge(unflatten_dict(flat, sep="/"), program.shardings.params)
    return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, params)


def _auto_of(path, model):
    """The `Auto` beside a model, if it was fitted to it; what is wrong with it is said, and it is left out."""
    try:
        auto = load_auto(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return None
    if auto is None:
        return _auto_by_density(model)
    why = _unlike(auto, model)
    if not why:
        return auto
    print(f"{path}/auto.json {why}: scale='auto' needs `lmm evaluate --fit-auto` again", file=sys.stderr)
    return None


def _auto_by_density(model):
    """How a model with a `DensityRouter` chooses; None without one, or without scales of two paths."""
    model = model.program.model
    if model.density_router is None:
        return None
    side, factors = model.vision.grid, model.projector.shuffle
    coarse = [scale for scale in model.scales if factor_of(scale, side, factors) == max(factors)]
    if not coarse or max(coarse) == max(model.scales):
        return None
    return by_density(model.scales, max(coarse), model.density_router.threshold)


def _unlike(auto, model):
    """Why an `Auto` was not fitted to a model; "" if nothing speaks against it."""
    if auto.step != model.step:
        return f"was fitted to step {auto.step} and this is step {model.step}"
    try:
        for scale in auto.scales:
            model.check_scale(scale)
    except ValueError as error:
        return f"was fitted to another model ({error})"
    trained = tuple(sorted(model.scales))
    if auto.of_router and not model.has_router:
        return "was fitted to a model with a router, which this one has not"
    if auto.of_router and auto.scales != trained:
        return f"was fitted to a router of the scales {auto.scales}, and this one knows {trained}"
    return ""


def _adapted(config, dtype, template, reduction):
    """The config of a folder with what its user wants otherwise."""
    with config.unlocked():
        config.model.dtype = dtype or config.model.dtype
        config.data.template = template or config.data.template
        config.model.reduction = reduction or config.model.reduction
    visual_layout(config)  # which says what does not go together
    return config


def _say(path, memory):
    print(f"loading {path}: {memory}", file=sys.stderr, flush=True)


class Model:
    """A model, its parameters and its tokenizer: what is asked of it.

    Any number of threads may ask at the same time; what they ask is answered as one batch.

    Attributes:
      program: what `training.state.make_program` returned.
      params: nested dict of arrays.
      tokenizer: the `Tokenizer`.
      table: what became of each tensor of the folder that it was loaded from, see `hf.load.report`.
      task: name of the task of the data that it was trained on, as its export says; "" if that is not known.
      step: of the checkpoint that it was loaded from; None if it comes from another folder.
      auto: how it chooses the scale "auto", an `auto.Auto`; None if that was not fitted.
      engine: the `Engine` that answers.
    """

    def __init__(self, program, params, tokenizer, table=(), task="", step=None):
        self.program, self.params, self.tokenizer, self.table = program, params, tokenizer, table
        self.task, self.step, self.auto = task, step, None
        visual = visual_layout(program.config).with_marks(tokenizer)
        self._layout = PackLayout.from_config(program.config, visual)
        self.engine = Engine(program, params, self._layout, stop_id(tokenizer, self._layout.template))

    @property
    def scales(self) -> tuple[int, ...]:
        """Token budgets that were trained; others that tile the grid can be asked for too."""
        return self._layout.scales

    @property
    def stop(self) -> int:
        """Id that ends an answer."""
        return self.engine.end

    @functools.cached_property
    def identity(self) -> str:
        """A text that two models share only if they answer alike: of parameters, tokenizer, sizes and template."""
        config = self.program.config
        parts = [
            digest(self.params),
            self.tokenizer.fingerprint,
            config.model.to_json_best_effort(),
            config.data.template,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Positions that a prompt and its answer may take together.

        Of a run this is `data.length`, the positions of a row that it was trained on, which no conversation in it
        was longer than. Of a model that others trained it is the length that its folder names, or else all positions
        that its decoder was made for.
        """
        return self._layout.length

    def save(self, workdir):
        """Writes config, tokenizer and parameters as a workdir, which a run can start from or `lmm export` read."""
        workdir = epath.Path(workdir)
        workdir.mkdir(parents=True)
        save_config(self.program.config, workdir / "config.json")
        self.tokenizer.save(workdir)
        Checkpoints(workdir).save_params(self.params)

    def generate(
        self,
        images=None,
        prompt="",
        scale=None,
        max_new_tokens=None,
        *,
        max_pixels=None,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        stop=(),
        seed=0,
        return_logprobs=False,
        batch_size=None,
        truncate=False,
    ):
        """Answers a question about pictures, or a list of questions.

        Of a list of prompts every option but the last three may be a list too, one for each prompt. What is asked
        together and what is asked one by one is answered alike, in float32 to the token.

        Args:
          images: of one prompt: a picture (a path, a `PIL.Image`, or the bytes of a file), a list of pictures, or
            None. Of a list of prompts: a list with one such entry for each, or None.
          prompt: the question; or a conversation, a list of `{"role": "system", "user" or "assistant", "content":
            text or parts}` that ends with a user's turn; or a list of either. Each `<image>` in what a user says, and
            each part `{"type": "image"}`, stands for the next picture; pictures without any come before the first
            question. See `prompts.read_queries`.
          scale: visual tokens of a square view; the largest trained scale if None; "auto" if the model is to choose,
            see `generation.auto`.
          max_new_tokens: at most so many tokens are generated. If None, `NEW_TOKENS`, or as many as `length` leaves
            room for.
          max_pixels: of a model whose pictures keep their sizes ("native"), how many pixels one has at most, if that
            is less than `data.max_pixels`; a larger picture is made smaller, and takes fewer tokens.
          temperature: 0 takes the most probable token; above it tokens are drawn, the more freely the higher.
          top_k: only so many of the most probable tokens may be drawn; 0 for all.
          top_p: only the most probable tokens that together have this probability may be drawn.
          repetition_penalty: above 1, what the prompt or the answer has becomes less probable.
          stop: a text, an id, or several, before which an answer ends.
          seed: the same seed gives the same answer, on any devices and in any batch. Of a list of prompts and one
            seed, prompt number i from 0 has seed + i, so that equal prompts have different answers.
          return_logprobs: give `Answer`s, with ids and their log-probabilities, instead of texts.
          batch_size: prompts that are answered at a time; as many as there is memory for if None.
          truncate: leave out the oldest questions of a conversation, with their answers and pictures, until the rest
            fits into `length`. A system turn and the last question stay whole.

        Returns:
          str, or a list of str for a list of prompts; `Answer`s instead with `return_logprobs`.

        Raises:
          ValueError, OSError: an argument that cannot be used, named; a prompt that with its answer would take more
            positions than `length`; or a picture too thin to have a visual token. Nothing was answered then. Only a
            picture that is damaged behind its header is found when its prompt's turn comes.
        """
        options = {
            "max_pixels": max_pixels,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "stop": stop,
            "seed": seed,
        }
        as_answers = read_flag("return_logprobs", return_logprobs)
        requests, many = self._requests(images, prompt, scale, max_new_tokens, options, truncate)
        answers = self._answer_all(requests, batch_size)
        found = answers if as_answers else [answer.text for answer in answers]
        return found if many else found[0]

    def generate_ids(self, images, prompts, scale=None, max_new_tokens=None) -> list[list[int]]:
        """As `generate` of a list of prompts, greedily: the ids of each answer, its end not among them."""
        requests, _ = self._requests(images, prompts, scale, max_new_tokens, {}, False)
        return [list(answer.ids) for answer in self._answer_all(requests, None)]

    def stream(self, images=None, prompt="", scale=None, max_new_tokens=None, *, truncate=False, **options):
        """Answers one question, and gives the answer's text in pieces as it comes.

        Arguments and errors are those of `generate`; `options` are those from `max_pixels` to `seed`. What is wrong
        with them is raised here, before the first piece is asked for.

        Returns:
          a generator of str, none of them empty, which together are what `generate` returns. Text that may become a
          stop text, or is a part of a character, is held back until that is decided. At its end the generator returns
          the `Answer` (`answer = yield from model.stream(…)`).
        """
        requests, many = self._requests(images, prompt, scale, max_new_tokens, options, truncate)
        if many:
            raise ValueError("prompt is a list of prompts; stream answers one, and as many can be streamed at a time")
        return self._stream(requests[0])

    def _stream(self, request):
        request.eager, said = True, []
        for _, now in self._run([request]):
            if now.climb is not None and not now.done:
                continue  # it is shown once it is known that it will do
            piece, now.piece = now.piece, ""
            if piece:
                said.append(piece)
                yield piece
        return _answer(request, "".join(said))

    def request(
        self, images=None, prompt="", scale=None, max_new_tokens=None, *, truncate=False, again=True, **options
    ):
        """One question, checked and laid out, for `answers`; arguments and errors are those of `stream`.

        Args:
          again: whether further questions about the same pictures may come later, so that what was read of them is
            kept; False where all that is asked about them is in the queue already.
        """
        (request,), many = self._requests(images, prompt, scale, max_new_tokens, options, truncate, again)
        if many:
            raise ValueError("prompt is a list of prompts; a request is one")
        return request

    def answers(self, requests, at_a_time=AT_A_TIME):
        """Answers many unlike questions as one batch, and gives each answer as soon as it is there.

        Args:
          requests: iterable of what `request` returned. No more than `at_a_time` are asked for before an answer is
            taken, so that there may be any number of them.
          at_a_time: int.

        Yields:
          `(request, Answer)`, in the order in which the answers end; `(request, error)`, a ValueError or an OSError,
          for one whose picture is damaged behind its header.
        """
        for first, request in self._run(requests, at_a_time, give_errors=True):
            if isinstance(request.error, ValueError | OSError):
                yield first, request.error
            elif request.error is not None:
                raise request.error
            elif request.done:
                yield first, _answer(first, request.piece)

    def _run(self, requests, at_a_time=None, give_errors=False):
        """As `Engine.run`, and asks again where an answer is not good enough.

        Yields:
          `(request, now)`: one of `requests`, and the one that is answered in its place by now.
        """
        queue, first = _Queue(requests), {}
        for now in self.engine.run(queue, at_a_time, give_errors):
            if now.done and now.error is None and now.climb is not None:
                now.then = now.climb(now)
            if now.then is None:
                yield first.pop(now, now) if now.done else first.get(now, now), now
            else:
                now.then.eager = now.eager
                first[now.then] = first.pop(now, now)
                queue.again.append(now.then)

    def chat(self, system=None, **options) -> Chat:
        """A conversation that remembers what was said and shown; `options` are those of `generate`. See `Chat`."""
        return Chat(self, system, **options)

    def score(self, images, prompt, answers, scale=None) -> list[float]:
        """Log-probability of each of several answers to a prompt, natural logarithm, its end included.

        The prompt is read once for all of them. `exp` of it is the probability that the model, drawing at temperature
        1, says exactly that.

        Args:
          images, prompt, scale: of one prompt, see `generate`; "auto" is the scale that it begins at, as there is no
            answer to be unsure of.
          answers: list of str.

        Raises:
          ValueError, OSError: as `generate`; an answer that is empty, or too long for `length`.
        """
        (query,), many = read_queries(images, prompt, self._captions)
        if many:
            raise ValueError("prompt is a list of prompts; score takes one prompt and a list of answers to it")
        scale = self.check_budget(scale)
        if scale == AUTO:
            scale, _ = self._first_scale(query)
        if isinstance(answers, str) or not isinstance(answers, list | tuple) or not answers:
            raise ValueError(f"answers={answers!r}: a list of the answers to score is expected")
        laid_out, ids = self._lay_out(query, scale), []
        for n, answer in enumerate(answers):
            if not isinstance(answer, str) or not answer.strip():
                raise ValueError(f"answers[{n}]={answer!r}: text is expected, and not an empty one")
            ids.append(self._answer_ids(query, answer))
            if len(laid_out) + len(ids[-1]) > self.length:
                raise ValueError(
                    f"answers[{n}] has {_count(len(ids[-1]), 'token')} and the prompt takes "
                    f"{_count(len(laid_out), 'position')}, but the model was trained on "
                    f"{_count(self.length, 'position')} (data.length)"
                )
        return self.engine.score(laid_out, ids)

    def _answer_ids(self, query, answer):
        """Ids of an answer to a conversation, up to the one that ends it."""
        turns = [*query.turns, ("assistant", answer)]
        encoded = encode(turns, self.tokenizer, self._layout.template)
        prompt = encode(query.turns, self.tokenizer, self._layout.template)
        ids = encoded.ids[len(prompt.ids) : encoded.turn_ends[-1]].tolist()
        check_ids(ids, self.tokenizer, self.program.config.model.decoder.vocab_size, query.name)
        return ids

    def batch(self, images, prompt, scale=None):
        """One prompt as the model sees it, padded, however long: a batch of one pack, see `PackLayout.assemble`."""
        (query,), _ = read_queries(images, prompt, self._captions)
        layout, segment = self._segment(query, self.check_scale(scale))
        pictures = [picture.open() for picture in _pictures(query, self._layout.visual)]
        layout = dataclasses.replace(layout, length=bucket(len(segment)))
        pack = layout.assemble([segment], [(picture.size, layout.see(picture)) for picture in pictures])
        return {name: x[None] for name, x in pack.items()}

    def room(self, images, prompt, scale=None) -> int:
        """Tokens that an answer to one prompt has room for within `length`; 0 or less if the prompt fills it."""
        (query,), _ = read_queries(images, prompt, self._captions)
        return self.length - len(self._lay_out(query, self.check_scale(scale)))

    def visual_tokens(self, images, scale=None) -> int:
        """Positions that `images` of one prompt take at `scale`."""
        sizes = read_sizes("images", read_pictures("images", images))
        visual = self._visual(sizes)
        slots = [visual.slots(visual.tiling(*size), self.check_scale(scale), size) for size in sizes]
        return int(sum((of_picture > TEXT).sum() for of_picture in slots))

    def check_scale(self, scale, name="scale") -> int:
        """`scale`, the largest that was trained if None; ValueError lists the valid ones if it is none of them."""
        if scale is None:
            return max(self.scales)
        if isinstance(scale, str) and scale == AUTO:
            raise ValueError(
                f"{name}='auto' is no number of visual tokens; give one of {self._layout.visual.valid_scales}"
            )
        scale = read_number(name, scale, f"valid scales are {self._layout.visual.valid_scales}")
        try:
            self._layout.visual.token_grid(scale)
        except ValueError as error:
            raise ValueError(f"{name}={scale}: {error}") from error
        return scale

    def check_budget(self, scale, name="scale"):
        """As `check_scale`, but lets "auto" pass where the model can choose."""
        if not isinstance(scale, str) or scale != AUTO:
            return self.check_scale(scale, name)
        if self.auto is None:
            raise ValueError(
                f"{name}='auto' is for a model that has learned to choose, by `lmm evaluate --split validation "
                f"--fit-auto`, which this one has not; give the visual tokens of a picture, one of "
                f"{self._layout.visual.valid_scales}, or nothing for {max(self.scales)}"
            )
        return AUTO

    def expect(self, images, prompt) -> list[float] | None:
        """How likely the model's router thinks it to be right at each of `scales`, ascending; see `models.router`.

        Args:
          images, prompt: of one prompt, see `generate`.

        Returns:
          a number 0 … 1 for each scale; None without a router or without pictures.
        """
        if not self.has_router:
            return None
        (query,), _ = read_queries(images, prompt, self._captions)
        return self._expect(query) if query.pictures else None

    @property
    def has_router(self) -> bool:
        """Whether it has a router, which says what to expect of each budget before a question is asked."""
        model = self.program.model
        return model.router is not None or model.density_router is not None

    def _expect(self, query):
        most = self.program.config.model.router.tokens
        question = read_questions(query.turns, self.tokenizer, self._layout.template, most)[-1]
        expected = self.engine.expect(_pictures(query, self._layout.visual), question.ids)
        return expected[np.argsort(self.scales)].tolist()

    def _first_scale(self, query):
        """Where "auto" begins, and what the router expects if it is asked; without pictures nothing is to choose."""
        if not query.pictures:
            return max(self.auto.scales), None
        way = self.auto.way
        expected = self._expect(query) if way.start is None else None
        return self.auto.first(way, expected), expected

    @property
    def _captions(self):
        return find_template(self._layout.template).captions

    def _requests(self, images, prompt, scale, max_new_tokens, options, truncate, again=True):
        """The `Request`s of a call, and whether a list was asked; all are checked before the first is answered."""
        queries, many = read_queries(images, prompt, self._captions)
        count, optional = len(queries), max_new_tokens is None
        scales = self._check_scales(scale, count, many)
        truncate = read_flag("truncate", truncate)
        asked = read_numbers("max_new_tokens", NEW_TOKENS if optional else max_new_tokens, count, many)
        options = dict(options)
        pixels = read_each("max_pixels", options.pop("max_pixels", None), count, many, self._check_pixels)
        queries = [self._within(query, most) for query, most in zip(queries, pixels, strict=True)]
        samplings = read_sampling(count, many, self.tokenizer.vocab_size, **options)
        requests = []
        for query, at, tokens, sampling in zip(queries, scales, asked, samplings, strict=True):
            # Who asks one thing at a time asks the next about the same picture, or goes on with the conversation.
            make = functools.partial(self._request, query, tokens, optional, sampling, truncate, again and not many)
            if at == AUTO:
                make(max(self.auto.scales))  # so that what does not fit is known before anything is answered
                requests.append(self._climbing(make, *self._first_scale(query)))
            else:
                requests.append(make(at))
        return requests, many

    def _check_pixels(self, name, value):
        """How many pixels a picture may have, None for as many as the model knows; ValueError for any other."""
        if value is None:
            return None
        visual = self._layout.visual
        if not visual.pixels:
            raise ValueError(
                f"{name}={value!r} is for models whose pictures keep their sizes (data.aspect='native'); what a "
                "picture costs is said by scale here"
            )
        least, most = visual.pixels
        return read_number(name, value, f"pictures of this model have {least} to {most} pixels", least, most)

    def _within(self, query, most):
        """A query whose pictures have at most so many pixels, if that is a number.

        They are resized once, as if the model had been made for so many, and then are of a size that it keeps.
        """
        if most is None or not query.pictures:
            return query
        visual, pictures, sizes = self._layout.visual, [], []
        for picture, size in zip(_pictures(query, visual), query.sizes, strict=True):
            least, usual = visual.pixels
            fitted = native_size(*size, visual.step, least, most)
            smaller = fitted != (0, 0) and fitted != native_size(*size, visual.step, least, usual)
            pictures.append(resize(picture.open(), *fitted) if smaller else picture.source)
            sizes.append(fitted if smaller else size)
        return dataclasses.replace(query, pictures=tuple(pictures), sizes=tuple(sizes))

    def _request(self, query, tokens, optional, sampling, truncate, asked_again, scale):
        """The `Request` of a query at a scale; ValueError if it does not fit."""
        laid_out = self._fitting(query, scale, 1 if optional else tokens, truncate)
        limit = min(tokens, self.length - len(laid_out))
        text = TextStream(self.tokenizer, sampling.stop_texts)
        request = Request(laid_out, limit, sampling, text, asked_again=asked_again)
        self.engine.check(request)
        return request

    def _climbing(self, make, scale, expected):
        """`make(scale)`, which makes the next one at a larger scale if its answer is not good enough."""
        request = make(scale)
        way = self.auto.way
        if way.climbs and scale < max(self.auto.scales) and request.prompt.pictures:

            def climb(answered):
                up = self.auto.next(way, scale, answered.logprobs, answered.end, expected)
                return None if up is None else self._climbing(make, up, expected)

            request.climb = climb
        return request

    def _check_scales(self, scale, count, many):
        if not many or not isinstance(scale, list | tuple):
            return [self.check_budget(scale)] * count
        if len(scale) != count:
            raise ValueError(f"scale has {len(scale)} entries for {count} prompts; give one number, or one for each")
        return [self.check_budget(one, f"scale[{n}]") for n, one in enumerate(scale)]

    def _answer_all(self, requests, batch_size):
        """The `Answer`s to requests."""
        at_a_time = None if batch_size is None else read_number("batch_size", batch_size)
        for _ in self._run(requests, at_a_time):
            pass
        return [_answer(request, _last(request).piece) for request in requests]

    def _fitting(self, query, scale, new_tokens, truncate):
        """The `Prompt` of a query, of its last turns if it may be cut, that leaves room for `new_tokens`."""
        prompt, shorter = self._lay_out(query, scale), query
        while truncate and len(prompt) + new_tokens > self.length and shorter is not None:
            shorter = shorter.without_oldest_turn()
            prompt = prompt if shorter is None else self._lay_out(shorter, scale)
        if len(prompt) + new_tokens > self.length:
            raise ValueError(self._too_long(query, prompt, new_tokens, truncate))
        return prompt

    def _too_long(self, query, prompt, new_tokens, truncate):
        """The sentence for a prompt that does not fit."""
        pictures, room = len(prompt.pictures), self.length - len(prompt)
        of_pictures = f", {prompt.visual:,} of them of {_count(pictures, 'picture')}," if pictures else ""
        can = ["a shorter prompt"]
        if pictures:
            can.insert(0, "fewer pictures")
        if pictures and any(valid < prompt.scale for valid in self._layout.visual.valid_scales):
            can.insert(1, f"a smaller scale than {prompt.scale}")
        if room > 0:
            can.append(f"max_new_tokens of at most {room:,}")
        if truncate:
            can.append("nothing else, as truncate=True leaves out whole turns before the last question")
        elif query.without_oldest_turn() is not None:
            can.append("truncate=True, which leaves out the oldest turns")
        return (
            f"{query.name} takes {_count(len(prompt), 'position')}{of_pictures} and "
            f"{_count(new_tokens, 'new token')} behind it (max_new_tokens), but the model was trained on "
            f"{_count(self.length, 'position')} (data.length): give {', or '.join(can)}"
        )

    def _visual(self, sizes):
        """The visual layout on the canvas that pictures of these sizes share in a prompt."""
        visual = self._layout.visual
        return visual.holding(sizes) if visual.canvas_each else visual.buckets[_bucket(visual, sizes)]

    def _segment(self, query, scale):
        """The layout of a pack that holds a query alone, and its segment."""
        visual = self._visual(query.sizes)
        views = int(visual.views_of(query.sizes).sum()) if query.sizes else visual.fewest_views  # blank ones
        layout = dataclasses.replace(self._layout, visual=visual, scales=(scale,), views=views, rows=1, targets=0)
        try:
            (segment,) = layout.segments(query.turns, query.sizes, self.tokenizer, (scale,))
        except ValueError as error:
            raise ValueError(f"{query.name}: {error}") from error
        check_ids(segment.id, self.tokenizer, self.program.config.model.decoder.vocab_size, query.name)
        return layout, dataclasses.replace(segment, group=0)  # nothing is trained: earlier answers are no targets

    def _lay_out(self, query, scale) -> Prompt:
        layout, segment = self._segment(query, scale)
        visual, slot = layout.visual, segment.slot
        if visual.canvas_each:
            tokens = [math.prod(visual.shown(size, scale)) for size in query.sizes]
            slot = np.where(slot >= 0, np.cumsum(slot >= 0) - 1, -1)
        else:
            tokens = [
                visual.grids_of_tiling(visual.tiling(*size)) * visual.grid_tokens(scale) for size in query.sizes
            ]
        return Prompt(
            name=query.name,
            id=segment.id,
            slot=slot,
            position=segment.position,
            newline=layout.newline,
            pictures=_pictures(query, self._layout.visual),
            tokens=tuple(tokens),
            scale=scale,
            blend=segment.blend,
        )


def answer_each(model, items, make):
    """Answers many items as one queue, some of which may turn out not to be answerable.

    Args:
      model: a `Model`.
      items: iterable; no more of them are taken than the model answers at a time.
      make: gives the `Model.request` of an item, or raises the ValueError or OSError that is wrong with it.

    Yields:
      `(item, Answer)`, in the order in which the answers end; `(item, error)` for one that has none.
    """
    of, refused = {}, []

    def requests():
        for item in items:
            try:
                request = make(item)
            except (ValueError, OSError) as error:
                refused.append((item, error))
                continue
            of[request] = item
            yield request

    for request, found in model.answers(requests()):
        while refused:
            yield refused.pop()
        yield of.pop(request), found
    yield from refused


def _pictures(query, visual):
    pairs, bucket = zip(query.pictures, query.sizes, strict=True), _bucket(visual, query.sizes)
    return tuple(Picture(source, size, query.name, bucket) for source, size in pairs)


def _bucket(visual, sizes) -> int:
    """Number of the canvas that the pictures of a prompt share."""
    if visual.canvas_each or len(visual.buckets) == 1 or not len(sizes):
        return 0
    return int(visual.choose_buckets(np.asarray(sizes), np.zeros(len(sizes), np.int64), 1)[0])


class _Queue:
    """An iterator over requests that others can be added to, also when it was at its end."""

    def __init__(self, requests):
        self._left, self.again = iter(requests), collections.deque()

    def __iter__(self):
        return self

    def __next__(self):
        return self.again.popleft() if self.again else next(self._left)


def _last(request):
    """The request whose answer counts in the place of `request`."""
    while request.then is not None:
        request = request.then
    return request


def _answer(request, text):
    """The `Answer` to a request that is done, whose text is `text`."""
    last, visual = _last(request), 0
    while request is not None:
        visual += request.prompt.visual
        request = request.then
    return Answer(
        text=text,
        ids=tuple(last.ids),
        logprobs=tuple(last.logprobs),
        reason=last.reason,
        prompt_positions=len(last.prompt),
        visual_tokens=visual,
        scale=last.prompt.scale,
        end=last.end,
    )


def _count(n, noun):
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _mesh(config):
    """The mesh of the devices of this process: each of several hosts answers on its own."""
    try:
        return sharding.make_mesh(config.mesh, jax.local_devices())
    except ValueError:  # trained on other devices
        return sharding.make_mesh({"fsdp": -1}, jax.local_devices())
