"""Reading a prompt and answering it greedily, at every number of visual tokens."""

import dataclasses
import functools

import flax.linen as nn
import jax

from lmm_jax.aot.flops import step_flops
from lmm_jax.bench.measure import Measurement, copy_rate, matmul_rate, run_peer, time_steps
from lmm_jax.bench.shape import load_shape, side, synthetic_batch
from lmm_jax.bench.train import program_of
from lmm_jax.generation.greedy import generate_tokens
from lmm_jax.training.state import init_params


def bench_decode(name, dtype, new_tokens=64, steps=5, device=None) -> list[Measurement]:
    """Times prefill and greedy decoding on one device, parameters stored in `dtype` as a released model's are.

    Args:
      name: of a shape, or its file.
      dtype: of parameters, cache and computation.
      new_tokens: generated for each prompt.
      steps: timed runs.
      device: of the peer, "cpu" or "cuda"; None goes without it.

    Returns:
      Rows for each of the shape's scales, most visual tokens first. A step's ceiling is the time to read the
      decoder's weights and the whole cache once, at the rate at which memory is copied.
    """
    shape, peer = load_shape(name), None
    if device:
        options = ["--device", device, "--dtype", dtype, "--steps", steps, "--new-tokens", new_tokens]
        peer = run_peer(name, "decode", *options)
    program = program_of(shape, dtype, shape["scales"])
    params = jax.jit(lambda key: _cast(nn.unbox(init_params(program.model, key)), dtype))(jax.random.key(0))
    matmul, copied = matmul_rate(dtype), copy_rate()
    rows = [
        Measurement(f"large matmul, {dtype}", matmul / 1e12, "TFLOP/s"),
        Measurement("memory, read and written", copied / 1e9, "GB/s"),
    ]
    for scale in sorted(shape["scales"], reverse=True):
        theirs = peer if scale == side(shape) ** 2 else None
        rows += _at(program, params, shape, scale, new_tokens, steps, matmul, copied, theirs)
    return rows


def _at(program, params, shape, scale, new_tokens, steps, matmul, copied, peer):
    batch = synthetic_batch(shape, (scale,))
    flops = forward_flops(program, batch)
    batch = {name: x[0] for name, x in batch.items()}
    size, model = batch["id"].shape[-1] + new_tokens, program.model
    what = f"{scale} visual tokens"
    with program.use():
        read = jax.jit(lambda params, batch: model.apply({"params": params}, batch, size, (scale,), method="prefill"))
        cache = jax.eval_shape(read, params, batch)[1]
        prefill = time_steps(lambda: read(params, batch), steps, f"{what}, prefill")
        # No id is -1, so that every row runs to its bound.
        answer = jax.jit(functools.partial(generate_tokens, model, scale=scale, max_new_tokens=new_tokens, eos=-1))
        whole = time_steps(lambda: answer(params, batch), steps, f"{what}, {new_tokens} tokens")
    step = (whole - prefill) / new_tokens
    ceiling = (step_bytes(params) + _bytes([cache.k, cache.v])) / copied
    rate = len(batch["id"]) / step
    rows = [
        Measurement(f"{what}, prefill", prefill, "s"),
        Measurement(
            f"{what}, prefill rate", flops / prefill / 1e12, "TFLOP/s", flops / prefill / matmul, "large matmul"
        ),
        Measurement(f"{what}, decoding", rate, "tokens/s"),
        Measurement(f"{what}, a decoding step", 1e3 * step, "ms", ceiling / step, "rate of copying memory"),
    ]
    if peer:
        seconds = peer["prefill_ms"] / 1e3
        theirs = len(batch["id"]) * (new_tokens - 1) / (peer["ms"] / 1e3 - seconds)  # the first comes with prefill
        rows[0] = dataclasses.replace(rows[0], ratio=seconds / prefill, against=f"peer's speed, {seconds:.3g} s")
        rows[2] = dataclasses.replace(rows[2], ratio=rate / theirs, against=f"peer, {theirs:.4g} tokens/s")
    return rows


def forward_flops(program, batch) -> int:
    """Operations of the forward pass over a batch `[1, G, …]`, with the logits of one position a pack."""
    batch = batch | {name: batch[name][..., :1] for name in ("target", "target_at", "group")}
    return step_flops(dataclasses.replace(program, rates=dict.fromkeys(program.rates, 0.0)), batch)


def step_bytes(params) -> int:
    """Bytes of the weights that one decoding step reads: all of the decoder's but the embedding table."""
    decoder = params["decoder"]
    return _bytes(decoder) - _bytes(decoder["table"])


def _bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
