"""Attention alone, at the shapes of the encoder, the decoder and M3's packs."""

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.bench.measure import Measurement, matmul_rate, run_peer, time_steps
from lmm_jax.bench.shape import attention_cases, load_shape, synthetic_batch
from lmm_jax.bench.train import best_rows
from lmm_jax.models.attention.attention import attention


def bench_attention(name, dtype, steps=5, device=None) -> list[Measurement]:
    """Times attention of one layer, forward and with its backward pass.

    Args:
      name: of a shape, or its file.
      dtype: of queries, keys and values.
      steps: timed runs.
      device: of the peer, "cpu" or "cuda": torch's scaled_dot_product_attention, over the copies of a pack one by
        one; None goes without it.

    Returns:
      Rows of time and rate for each case. The rate counts pairs of positions that see each other.
    """
    peer = {}
    if device:
        peer = run_peer(name, "attention", "--device", device, "--dtype", dtype, "--steps", steps)["cases"]
    matmul = matmul_rate(dtype)
    rows = [Measurement(f"large matmul, {dtype}", matmul / 1e12, "TFLOP/s")]
    shape = load_shape(name)
    for case in attention_cases(shape):
        passes = zip(("forward", "with backward"), attention_steps(shape, case, dtype), (1, 3), strict=True)
        for i, (which, step, products) in enumerate(passes):
            what = f"{case.name}, {which}"
            seconds, flops = time_steps(step, steps, what, warmup=2), products * case.flops
            ratio, against = None, ""
            if peer:
                theirs = peer[case.name][i]
                ratio, against = theirs / 1e3 / seconds, f"peer's speed, {theirs:.4g} ms"
            rows.append(Measurement(what, 1e3 * seconds, "ms", ratio, against))
            rate = flops / seconds
            rows.append(Measurement(f"{what}, rate", rate / 1e12, "TFLOP/s", rate / matmul, "large matmul"))
    return rows


def attention_steps(shape, case, dtype):
    """Compiled attention of an `AttentionCase` as our steps lay it out, and the same with gradients of all inputs."""
    batch, length, segment = case.batch, case.lengths[0], None
    if case.causal:
        packed = synthetic_batch(shape, case.scales, rows=best_rows(shape, case.scales))["segment"]
        batch, length = packed[0, :, :, 0].size, packed.shape[-1]
        segment = jnp.asarray(packed.reshape(batch, length))
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, length, heads, case.head_dim), np.float32), dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )

    def attend(q, k, v):
        return attention(q, k, v, segment, case.causal)

    forward = jax.jit(attend)
    both = jax.jit(jax.value_and_grad(lambda *x: attend(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
    return lambda: forward(q, k, v), lambda: both(q, k, v)
