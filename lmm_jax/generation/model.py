"""Loading a trained model and answering questions about pictures, greedily, at a chosen token budget."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
from etils import epath

from lmm_jax import families, sharding
from lmm_jax.config import read_config, save_config, visual_layout
from lmm_jax.data.conversation import find_template, stop_id
from lmm_jax.data.images import open_picture
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.segments import Segment
from lmm_jax.data.tokenizer import load_tokenizer
from lmm_jax.generation.greedy import generate_tokens
from lmm_jax.generation.prompts import (
    read_flag,
    read_number,
    read_numbers,
    read_pictures,
    read_queries,
    read_sizes,
)
from lmm_jax.hf.load import load_params, stored_dtype
from lmm_jax.hf.read_config import is_model, read_model_config, read_task
from lmm_jax.training.checkpoint import Checkpoints, saved_steps
from lmm_jax.training.memory import check_params
from lmm_jax.training.state import abstract_params, make_program

NEW_TOKENS = 64  # of an answer, where nothing else is asked for
BUCKET = 32  # prompts are padded to multiples of this, long ones to coarser steps, so that few programs are compiled


def load(path, vision=None, allow_pickle=False):
    """Loads a model onto whatever devices are here; says first, on stderr, what it takes and what is free.

    Args:
      path: a workdir of `lmm train`, whose newest sound checkpoint is taken, or a model's folder in LLaVA's original
        layout or that of transformers (llava, llava_next, fast_vlm, what `lmm export` wrote). Parameters that were
        stored in two bytes are bfloat16, others float32.
      vision: folder of the vision tower, for a folder that neither holds nor names it.
      allow_pickle: see `hf.safetensors.Folder`.

    Raises:
      FileNotFoundError: it is neither.
      ValueError: the parameters cannot fit the memory that is free, which is known before they are read; no
        checkpoint is sound, or tensors or keys of the folder do not fit; the message lists them.
    """
    path = epath.Path(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} is neither a workdir of `lmm train` nor a model (no config.json)")
    table, task = [], ""
    if is_model(path):
        config = read_model_config(path, vision)
        tokenizer = load_tokenizer(path, families.DECODERS[config.model.families.decoder].tokenizer)
        program = make_program(config, _mesh(config))
        dtype = stored_dtype(path, allow_pickle)
        _say(path, check_params(program, dtype))
        abstract = abstract_params(program, dtype)
        params, table = load_params(path, config.model, abstract, vision, allow_pickle)
        task = read_task(path)
    else:
        config, tokenizer = read_config(path / "config.json"), load_tokenizer(path)
        if not saved_steps(path):
            raise ValueError(f"{path} holds no checkpoint; did its run save a step?")
        program = make_program(config, _mesh(config))
        _say(path, check_params(program))
        params, _ = Checkpoints(path).restore_params(abstract_params(program))
    return Model(program, params, tokenizer, table, task)


def _say(path, memory):
    print(f"loading {path}: {memory}", file=sys.stderr, flush=True)


class Model:
    """A model, its parameters and its tokenizer: `generate` is the whole interface.

    Attributes:
      program: what `training.state.make_program` returned.
      params: nested dict of arrays.
      tokenizer: the `Tokenizer`.
      stop: id that ends an answer.
      table: what became of each tensor of the folder that it was loaded from, see `hf.load.report`.
      task: name of the task of the data that it was trained on, as its export says; "" if that is not known.
    """

    def __init__(self, program, params, tokenizer, table=(), task=""):
        self.program, self.params, self.tokenizer, self.table = program, params, tokenizer, table
        self.task = task
        self._layout = PackLayout.from_config(program.config, visual_layout(program.config))
        self.stop = stop_id(tokenizer, self._layout.template)
        self._generate = jax.jit(
            functools.partial(generate_tokens, program.model, eos=self.stop),
            static_argnames=("scale", "max_new_tokens"),
        )

    @property
    def scales(self) -> tuple[int, ...]:
        """Token budgets that were trained; others that tile the grid can be asked for too."""
        return self._layout.scales

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
        checkpoints = Checkpoints(workdir)
        checkpoints.save_params(self.params)
        checkpoints.close()

    def generate(self, images=None, prompt="", scale=None, max_new_tokens=None, batch_size=256, truncate=False):
        """Answers a question about pictures, or a list of questions.

        Args:
          images: of one prompt: a picture (a path, a `PIL.Image`, or the bytes of a file), a list of pictures, or
            None. Of a list of prompts: a list with one such entry for each, or None.
          prompt: the question; or a conversation, a list of `{"role": "system", "user" or "assistant", "content":
            text}` that ends with a user's turn; or a list of either. Each `<image>` in what a user says stands for
            the next picture; pictures without any tag come before the first question.
          scale: visual tokens of a square view; the largest trained scale if None.
          max_new_tokens: at most so many tokens are generated; of a list of prompts also a list, one for each. If
            None, `NEW_TOKENS`, or as many as `length` leaves room for.
          batch_size: prompts that run at a time.
          truncate: leave out the oldest questions of a conversation, with their answers and pictures, until the rest
            fits into `length`. A system turn and the last question stay whole.

        Returns:
          str, or a list of str for a list of prompts.

        Raises:
          ValueError, OSError: an argument that cannot be used, named; a prompt that with its answer would take more
            positions than `length`; or a picture too thin to have a visual token. Nothing was answered then. Only a
            picture that is damaged behind its header is found when its prompt's turn comes.
        """
        queries, many = read_queries(images, prompt, self._captions)
        answers = self._answer_all(queries, scale, max_new_tokens, batch_size, truncate, many)
        texts = [self.tokenizer.decode(ids) for ids in answers]
        return texts if many else texts[0]

    def generate_ids(self, images, prompts, scale=None, max_new_tokens=None, batch_size=256) -> list[list[int]]:
        """As `generate` for a list of prompts: the ids of each answer, its end not among them."""
        queries, many = read_queries(images, prompts, self._captions)
        return self._answer_all(queries, scale, max_new_tokens, batch_size, False, many)

    def batch(self, images, prompt, scale=None):
        """One prompt as the model sees it, padded, however long: a batch of one pack, see `PackLayout.assemble`."""
        (query,), _ = read_queries(images, prompt, self._captions)
        request = self._request(query, self.check_scale(scale))
        return _assemble([request], _bucket(request.positions))

    def room(self, images, prompt, scale=None) -> int:
        """Tokens that an answer to one prompt has room for within `length`; 0 or less if the prompt fills it."""
        (query,), _ = read_queries(images, prompt, self._captions)
        return self.length - self._request(query, self.check_scale(scale)).positions

    def visual_tokens(self, images, scale=None) -> int:
        """Positions that `images` of one prompt take at `scale`."""
        sizes = read_sizes("images", read_pictures("images", images))
        return int(self._layout.visual.tokens(sizes, self.check_scale(scale)).sum())

    def check_scale(self, scale) -> int:
        """`scale`, the largest that was trained if None; ValueError lists the valid ones if it is none of them."""
        if scale is None:
            return max(self.scales)
        scale = read_number("scale", scale, f"valid scales are {self._layout.visual.valid_scales}")
        try:
            self._layout.visual.token_grid(scale)
        except ValueError as error:
            raise ValueError(f"scale={scale}: {error}") from error
        return scale

    @property
    def _captions(self):
        return find_template(self._layout.template).captions

    def _answer_all(self, queries, scale, max_new_tokens, batch_size, truncate, many):
        """Ids of the answers to `queries`; all of them are checked before the first is answered."""
        scale, batch_size = self.check_scale(scale), read_number("batch_size", batch_size)
        truncate, optional = read_flag("truncate", truncate), max_new_tokens is None
        asked = read_numbers("max_new_tokens", NEW_TOKENS if optional else max_new_tokens, len(queries), many)
        requests, limits = [], []
        for query, tokens in zip(queries, asked, strict=True):
            request = self._fitting(query, scale, 1 if optional else tokens, truncate)
            requests.append(request)
            limits.append(min(tokens, self.length - request.positions))
        # Prompts of like length and equally many views, which have equally many grids, share a batch.
        keys = [(request.layout.views, _bucket(request.positions)) for request in requests]
        answers = [[]] * len(requests)
        for key in sorted(set(keys)):
            members = [i for i, k in enumerate(keys) if k == key]
            for first in range(0, len(members), batch_size):
                chosen = members[first : first + batch_size]
                size = min(batch_size, 1 << (len(members) - 1).bit_length())
                found = self._answer([requests[i] for i in chosen], key[1], scale, max(asked), size)
                for i, ids in zip(chosen, found, strict=True):
                    answers[i] = ids[: limits[i]]
        return answers

    def _fitting(self, query, scale, new_tokens, truncate):
        """The request of a query, of its last turns if it may be cut, that leaves room for `new_tokens`."""
        request, shorter = self._request(query, scale), query
        while truncate and request.positions + new_tokens > self.length and shorter is not None:
            shorter = shorter.without_oldest_turn()
            request = request if shorter is None else self._request(shorter, scale)
        if request.positions + new_tokens > self.length:
            raise ValueError(self._too_long(query, request, scale, new_tokens, truncate))
        return request

    def _too_long(self, query, request, scale, new_tokens, truncate):
        """The sentence for a prompt that does not fit."""
        pictures, room = len(request.pictures), self.length - request.positions
        of_pictures = f", {request.visual:,} of them of {_count(pictures, 'picture')}," if pictures else ""
        can = ["a shorter prompt"]
        if pictures:
            can.insert(0, "fewer pictures")
        if pictures and any(valid < scale for valid in self._layout.visual.valid_scales):
            can.insert(1, f"a smaller scale than {scale}")
        if room > 0:
            can.append(f"max_new_tokens of at most {room:,}")
        if truncate:
            can.append("nothing else, as truncate=True leaves out whole turns before the last question")
        elif query.without_oldest_turn() is not None:
            can.append("truncate=True, which leaves out the oldest turns")
        return (
            f"{query.name} takes {_count(request.positions, 'position')}{of_pictures} and "
            f"{_count(new_tokens, 'new token')} behind it (max_new_tokens), but the model was trained on "
            f"{_count(self.length, 'position')} (data.length): give {', or '.join(can)}"
        )

    def _request(self, query, scale):
        visual = self._layout.visual
        views = int(visual.views_of(query.sizes).sum()) if query.sizes else visual.fewest_views  # blank ones
        layout = dataclasses.replace(self._layout, scales=(scale,), views=views, rows=1, targets=0)
        try:
            (segment,) = layout.segments(query.turns, query.sizes, self.tokenizer, (scale,))
        except ValueError as error:
            raise ValueError(f"{query.name}: {error}") from error
        segment = dataclasses.replace(segment, group=0)  # nothing is trained, so that earlier answers are no targets
        return _Request(query.name, layout, segment, query.pictures, int((segment.slot >= 0).sum()))

    def _answer(self, requests, length, scale, max_new_tokens, size):
        """Ids that answer requests which share a shape, run as a batch of `size`."""
        batch = _assemble(requests + requests[-1:] * (size - len(requests)), length)
        with self.program.use():
            tokens, lengths = jax.device_get(
                self._generate(self.params, batch, scale=scale, max_new_tokens=max_new_tokens)
            )
        return [t[:n].tolist() for t, n in zip(tokens, lengths, strict=True)][: len(requests)]


@dataclasses.dataclass(frozen=True)
class _Request:
    """A query laid out at one scale.

    Attributes:
      name: of the query.
      layout: of a pack that holds it alone.
      segment: its text and its slots.
      pictures: not decoded yet, so that thousands of questions may wait.
      visual: positions that the pictures take.
    """

    name: str
    layout: PackLayout
    segment: Segment
    pictures: tuple[Any, ...]
    visual: int

    @property
    def positions(self) -> int:
        """Positions of the whole prompt."""
        return len(self.segment)


def _assemble(requests, length):
    packs = []
    for request in requests:
        try:
            pictures = [open_picture(picture) for picture in request.pictures]
        except ValueError as error:
            raise ValueError(f"images of {request.name}: {error}") from error
        layout = dataclasses.replace(request.layout, length=length)
        seen = [(picture.size, layout.see(picture)) for picture in pictures]
        packs.append(layout.assemble([request.segment], seen))
    return {name: np.stack([p[name] for p in packs]) for name in packs[0]}


def _count(n, noun):
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _bucket(n):
    """`n` rounded up to a multiple of `BUCKET`, and from 256 on to one of four lengths for each doubling."""
    step = max(BUCKET, (1 << n.bit_length()) >> 3)
    return -(-n // step) * step


def _mesh(config):
    try:
        return sharding.make_mesh(config.mesh)
    except ValueError:  # trained on other devices
        return sharding.make_mesh({"fsdp": -1})
