"""What every kernel is compared with: attention that holds all scores, and a loop in numpy."""

import jax
import numpy as np

from lmm_jax import sharding
from lmm_jax.models.attention import attention as attention_module
from lmm_jax.models.attention.attention import attention


def by_loop(q, k, v, allowed):
    """Attention of position t of row b over those s for which `allowed(b, t, s)`."""
    B, T, H, d = q.shape
    group = H // k.shape[2]
    out = np.zeros_like(q)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                seen = [s for s in range(k.shape[1]) if allowed(b, t, s)]
                w = np.exp(k[b, seen, h // group] @ q[b, t, h] / d**0.5)
                out[b, t, h] = w / w.sum() @ v[b, seen, h // group]
    return out


RULES = {"batch": ("data", "fsdp"), "heads": "tensor", "kv_heads": "tensor"}


def outputs_and_gradients(f, q, k, v):
    """Output and the gradients of a sum that weights each of its numbers differently."""
    weights = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    grads = jax.grad(lambda q, k, v: (f(q, k, v) * weights).sum(), argnums=(0, 1, 2))
    return jax.jit(lambda q, k, v: (f(q, k, v), *grads(q, k, v)))(q, k, v)


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def equals_attention(monkeypatch, kernel, B, T, heads, kv_heads, causal, segments, mesh=None):
    """Asserts that output and gradients are those of attention, on one device or with a mesh of several.

    Args:
      kernel: function of q, k, v, segment and causal.
      B, T, heads, kv_heads: sizes of `[B, T, heads, 16]` and of keys and values.
      segments: whether positions belong to several.
      mesh: sizes by axis, or None.
    """
    monkeypatch.setattr(attention_module, "SHORT", T)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(B, T, n, 16)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    segment = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32) if segments else None
    want = outputs_and_gradients(lambda *x: attention(*x, segment, causal), q, k, v)

    def by_kernel(*x):
        return kernel(*x, segment, causal)

    if mesh is None:
        found = outputs_and_gradients(by_kernel, q, k, v)
    else:
        with sharding.use(sharding.make_mesh(mesh), RULES):
            found = outputs_and_gradients(by_kernel, q, k, v)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
