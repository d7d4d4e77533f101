"""Cross-entropy in parts, and the mean over loss groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.training import loss as loss_lib


def test_parts_of_the_vocabulary_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    h, w = jnp.asarray(rng.normal(size=(2, 37, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 15)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (2, 37)))

    def losses(h, w):
        return loss_lib.cross_entropy(h, w, targets, 11, "float32")

    def total():
        """Another function each time, as what was traced before would be taken again otherwise."""
        return jax.jit(jax.value_and_grad(lambda h, w: (losses(h, w) * jnp.arange(37)).sum(), argnums=(0, 1)))

    whole, grads = total()(h, w)
    monkeypatch.setattr(loss_lib, "POSITIONS", 8)  # five parts
    chunked, chunked_grads = total()(h, w)
    np.testing.assert_allclose(whole, chunked, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), grads, chunked_grads)
    logits = np.asarray(h) @ np.asarray(w)[:, :11]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.jit(losses)(h, w), want, atol=1e-5)
    assert (np.asarray(grads[1])[:, 11:] == 0).all()  # padding is no candidate


@functools.partial(jax.jit, static_argnums=2)
def grouped(ce, group, groups):
    bits = loss_lib.group_bits(group, groups)
    return (loss_lib.group_weights(bits, bits.sum(0)) * ce).sum()


def test_loss_is_the_mean_over_groups_of_their_means():
    ce = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    group = np.array([0b001, 0b001, 0b010, 0b011, 0])  # the last is not supervised, group 2 is empty
    want = np.mean([np.mean([1, 2, 8]), np.mean([4, 8])])
    np.testing.assert_allclose(grouped(ce, group, 3), want, rtol=1e-6)
    # A plain mean over supervised targets differs as soon as the groups do.
    assert abs(np.mean([1, 2, 4, 8]) - want) > 0.05


def test_nothing_supervised_is_zero_not_nan():
    assert grouped(np.ones(3), np.zeros(3, np.int32), 2) == 0.0
