"""Answering: the time to a first token, the rate of those behind it, a queue of unlike questions, and asking again.

All of it by the engine that `Model.generate` asks, greedily, with pictures and texts that are drawn.
"""

import dataclasses
import statistics
import sys
import time

import flax.linen as nn
import jax
import numpy as np
from PIL import Image

from lmm_jax.aot.flops import step_flops
from lmm_jax.bench.measure import Measurement, copy_rate, matmul_rate, run_peer
from lmm_jax.bench.shape import BEFORE_PICTURE, Question, load_shape, queue, side, synthetic_batch
from lmm_jax.bench.train import program_of
from lmm_jax.data.pack_layout import PackLayout
from lmm_jax.data.visual_layout import VisualLayout
from lmm_jax.generation.arguments import Sampling
from lmm_jax.generation.engine import Engine
from lmm_jax.generation.pictures import Picture
from lmm_jax.generation.programs import CHUNK
from lmm_jax.generation.requests import Prompt, Request
from lmm_jax.generation.text import TextStream
from lmm_jax.training.state import init_params

LATER = 32  # steps that are timed, once the first `CHUNK` are over


def bench_decode(name, dtype, new_tokens=64, steps=5, device=None) -> list[Measurement]:
    """Times answering on one device, parameters stored in `dtype` as a released model's are.

    Args:
      name: of a shape, or its file.
      dtype: of parameters, cache and computation.
      new_tokens: that the peer generates for each prompt of a batch.
      steps: timed runs.
      device: of the peer, "cpu" or "cuda"; None goes without it.

    Returns:
      Rows for each of the shape's scales, most visual tokens first, of a batch of the shape's prompts; then those of
      a queue, of a second question, and of one question about a picture that was seen, at each scale. A step's
      ceiling is the time to read the decoder's weights and the keys and values of the batch once, at the rate at
      which memory is copied.
    """
    shape, peer, peer_queue = load_shape(name), None, None
    if device:
        options = ["--device", device, "--dtype", dtype, "--steps", steps, "--new-tokens", new_tokens]
        peer, peer_queue = (run_peer(name, mode, *options) for mode in ("decode", "queue"))
    asked = Asked(shape, dtype)
    matmul, copied = matmul_rate(dtype), copy_rate()
    rows = [
        Measurement(f"large matmul, {dtype}", matmul / 1e12, "TFLOP/s"),
        Measurement("memory, read and written", copied / 1e9, "GB/s"),
    ]
    for scale in sorted(shape["scales"], reverse=True):
        theirs = peer if scale == side(shape) ** 2 else None
        rows += _at(asked, scale, new_tokens, steps, matmul, copied, theirs)
    return rows + _queue(asked, steps, peer_queue) + _again(asked, steps) + _seen(asked, steps)


class Asked:
    """A shape's model with drawn parameters, and questions to it."""

    def __init__(self, shape, dtype):
        self.shape, self.program = shape, program_of(shape, dtype, shape["scales"])
        model = self.program.model
        size = model.vision.side
        visual = VisualLayout(
            size=size, cell=model.vision.stride, canvas=(size, size), aspect="pad", tilings=(), zoom=1,
            sequence="whole", stacks="", sampling="2d", newline=False, reduction=model.reduction, padding=(0, 0, 0),
        )  # fmt: skip
        layout = PackLayout(visual, model.scales, 1, 1, 1, 0, "", "refuse")
        self.params = jax.jit(lambda key: _cast(nn.unbox(init_params(model, key)), dtype))(jax.random.key(0))
        # No id is -1, so that every answer runs to its bound.
        self.engine = Engine(self.program, self.params, layout, end=-1)
        self._rng = np.random.default_rng(0)

    def picture(self):
        """A picture that was never seen."""
        side = self.shape["vision"]["image"]
        pixels = self._rng.integers(0, 256, (side, side, 3), np.uint8)
        return Picture(Image.fromarray(pixels), (side, side), "bench")

    def request(self, question, picture=None, again=False):
        """A `Question` about a picture, of new text; see `Request.asked_again`."""
        ids = self._rng.integers(3, self.shape["text"]["vocab_size"] - 1, question.text).astype(np.int32)
        ids[:BEFORE_PICTURE] = 3 + np.arange(min(BEFORE_PICTURE, len(ids)))  # the same in all, as in a template
        at = min(BEFORE_PICTURE, len(ids))
        id = np.insert(ids, at, np.zeros(question.scale, np.int32))
        slot = np.insert(np.full(len(ids), -1), at, np.arange(question.scale))
        position, pictures = np.arange(len(id)), (picture or self.picture(),)
        prompt = Prompt("bench", id, slot, position, -2, pictures, (question.scale,), question.scale)
        return Request(prompt, question.new, Sampling(), TextStream(_NoText()), asked_again=again)

    def seconds(self, questions, steps, what):
        """The median time to answer questions, each time about pictures and texts that are new; told on stderr."""
        times = []
        for _ in range(1 + steps):
            times.append(self.answer(*map(self.request, questions))[-1])
            print(f"{what}: {times[-1]:.3g} s", file=sys.stderr, flush=True)
        return statistics.median(times[1:])

    def step_seconds(self, question, count, steps, what):
        """The median time of a step that decodes `count` rows of like questions once they were read; told on stderr.

        It is taken from the second time that the engine looks at its rows, after `CHUNK` steps, to the end.
        """
        question, times = dataclasses.replace(question, new=CHUNK + LATER), []
        for _ in range(1 + steps):
            first, last = self.answer(*(self.request(question) for _ in range(count)))
            times.append((last - first) / LATER)
            print(f"{what}, a step: {1e3 * times[-1]:.3g} ms", file=sys.stderr, flush=True)
        return statistics.median(times[1:])

    def answer(self, *requests):
        """Seconds until something new has come of the first of some requests; last, until all are done."""
        begin, times = time.perf_counter(), []
        for request in self.engine.run(requests):
            if request is requests[0] and not request.done:
                times.append(time.perf_counter() - begin)
        return [*times, time.perf_counter() - begin]


class _NoText:
    """What spells no id."""

    def decode(self, ids):
        return ""


def _at(asked, scale, new_tokens, steps, matmul, copied, peer):
    shape, what = asked.shape, f"{scale} visual tokens"
    batch = synthetic_batch(shape, (scale,))
    flops, count = forward_flops(asked.program, batch), shape["batch"]
    question = Question(shape["text_len"], scale, 1)
    first = asked.seconds([question] * count, steps, f"{what}, to the first token")
    step = asked.step_seconds(question, count, steps, what)
    positions = shape["text_len"] + scale + CHUNK
    ceiling = (step_bytes(asked.params) + cache_bytes(asked.program, count, positions)) / copied
    rate = count / step
    ratio, than = flops / first / matmul, "large matmul"
    to_first, decoding = (None, ""), (None, "")
    if peer:
        seconds = peer["prefill_ms"] / 1e3
        theirs = count * (new_tokens - 1) / (peer["ms"] / 1e3 - seconds)
        to_first = seconds / first, f"peer's speed, {seconds:.3g} s"
        decoding = rate / theirs, f"peer, {theirs:.4g} tokens/s"
    return [
        Measurement(f"{what}, to the first token", first, "s", *to_first),
        Measurement(f"{what}, rate until then", flops / first / 1e12, "TFLOP/s", ratio, than),
        Measurement(f"{what}, decoding", rate, "tokens/s", *decoding),
        Measurement(f"{what}, a decoding step", 1e3 * step, "ms", ceiling / step, "rate of copying memory"),
    ]


def _queue(asked, steps, peer):
    """Unlike questions, from the first picture to the last token, beside the faster way that the peer has."""
    questions = queue(asked.shape)
    tokens = sum(question.new for question in questions)
    rate = tokens / asked.seconds(questions, steps, f"{len(questions)} unlike questions")
    beside = (None, "")
    if peer:
        ways = {"one by one": peer["alone_ms"], "padded to one batch": peer["padded_ms"]}
        way = min(ways, key=ways.get)
        theirs = 1e3 * tokens / ways[way]
        beside = rate / theirs, f"peer {way}, {theirs:.4g} tokens/s"
    return [Measurement(f"{len(questions)} unlike questions", rate, "tokens/s", *beside)]


def _again(asked, steps):
    """The first token of a question about a new picture, and of another one about it."""
    shape, scale, times = asked.shape, side(asked.shape) ** 2, ([], [])
    question = Question(shape["text_len"], scale, 1)
    for _ in range(1 + steps):
        picture = asked.picture()
        for found in times:
            found.append(asked.answer(asked.request(question, picture, again=True))[-1])
    first, second = (statistics.median(found[1:]) for found in times)
    return [
        Measurement("a question alone, to the first token", 1e3 * first, "ms"),
        Measurement("a second one about its picture", 1e3 * second, "ms", first / second, "the first one's speed"),
    ]


def _seen(asked, steps):
    """The first token of one question about a picture that was seen: what reading takes, without the encoder."""
    shape, picture, rows = asked.shape, asked.picture(), []
    for scale in sorted(shape["scales"], reverse=True):
        question = Question(shape["text_len"], scale, 1)
        times = [asked.answer(asked.request(question, picture))[-1] for _ in range(2 + steps)]
        rows.append(Measurement(f"{scale} tokens of a seen picture", 1e3 * statistics.median(times[2:]), "ms"))
    return [
        dataclasses.replace(row, ratio=rows[0].value / row.value, against="the speed at all tokens") for row in rows
    ]


def forward_flops(program, batch) -> int:
    """Operations of the forward pass over a batch `[1, G, …]`, with the logits of one position a pack."""
    batch = batch | {name: batch[name][..., :1] for name in ("target", "target_at", "group")}
    return step_flops(dataclasses.replace(program, rates=dict.fromkeys(program.rates, 0.0)), batch)


def step_bytes(params) -> int:
    """Bytes of the weights that one decoding step reads: all of the decoder's but the embedding table."""
    decoder = params["decoder"]
    return _bytes(decoder) - _bytes(decoder["table"])


def cache_bytes(program, rows, positions) -> int:
    """Bytes of the keys and values of so many positions in each row."""
    decoder = program.model.decoder
    of_position = 2 * decoder.depth * decoder.kv_heads * decoder.head_width * jax.numpy.dtype(decoder.dtype).itemsize
    return rows * positions * of_position


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
