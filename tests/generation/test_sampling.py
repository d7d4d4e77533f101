"""Drawing tokens: what is left of a distribution, how often each is drawn, and that a row is drawn alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.generation.sampling import Options, draw, keep_likely


def options(rows, **values):
    plain = Options.greedy(rows)
    return plain.replace(**{name: jnp.broadcast_to(jnp.asarray(x, plain.__dict__[name].dtype), rows)
                            for name, x in values.items()})  # fmt: skip


def kept_by_sorting(logits, top_k, top_p):
    """What stays of a row, one token after the other, the most probable first."""
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or len(order)]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    stays, total = [], 0.0
    for token, share in zip(order, p, strict=True):
        if stays and total >= top_p < 1:
            break
        stays.append(token)
        total += share
    return set(stays)


@pytest.mark.parametrize("top_k", [0, 1, 3, 50, 10**6])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_the_most_probable_tokens_stay(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 3, (6, 50)).astype(np.float32)
    found = keep_likely(jnp.asarray(logits), jnp.full(6, top_k), jnp.full(6, top_p))
    for row, want in zip(np.asarray(found), logits, strict=True):
        stays = np.flatnonzero(np.isfinite(row))
        assert set(stays) == kept_by_sorting(want, top_k, top_p)
        np.testing.assert_array_equal(row[stays], want[stays])


def test_tokens_as_probable_as_the_last_one_that_stays_stay_too():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0, 1.0]])
    assert np.isfinite(keep_likely(logits, jnp.array([2]), jnp.array([1.0]))).tolist() == [[1, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7)]
)
def test_tokens_are_drawn_as_often_as_they_are_probable(temperature, top_k, top_p):
    logits, n = np.array([1.5, 1.0, 0.2, -0.5, -1.0, 0.9], np.float32), 20000
    kept = np.asarray(keep_likely(jnp.asarray(logits)[None] / temperature, jnp.array([top_k]), jnp.array([top_p])))[0]
    want = np.exp(kept - kept.max())
    want /= want.sum()
    rows = jnp.broadcast_to(jnp.asarray(logits), (n, 6))
    how = options(n, temperature=temperature, top_k=top_k, top_p=top_p, seed=np.arange(n))
    ids, _ = jax.jit(draw)(rows, jnp.zeros((n, 6), bool), jnp.zeros(n, jnp.int32), how)
    share = np.bincount(ids, minlength=6) / n
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / n))  # four standard deviations
    steps, _ = jax.jit(draw)(rows, jnp.zeros((n, 6), bool), jnp.arange(n), how.replace(seed=jnp.zeros(n, jnp.uint32)))
    np.testing.assert_allclose(np.bincount(steps, minlength=6) / n, want, atol=4 * np.sqrt(0.25 / n))


def test_a_row_is_drawn_alike_whatever_stands_beside_it():
    rng = np.random.default_rng(1)
    logits, seen = rng.normal(0, 2, (8, 40)).astype(np.float32), rng.random((8, 40)) < 0.3
    how = options(8, temperature=[0, 1, 0, 2, 0.3, 1, 1, 0], top_k=[0, 0, 0, 5, 0, 0, 3, 0],
                  top_p=[1, 1, 1, 1, 0.5, 1, 1, 1], penalty=[1, 1, 1.5, 1, 1, 0.5, 1, 2], seed=range(8))  # fmt: skip
    drawn = jnp.arange(8)
    ids, logprobs = draw(jnp.asarray(logits), jnp.asarray(seen), drawn, how)
    for row in range(8):
        one = [x[row : row + 1] for x in (jnp.asarray(logits), jnp.asarray(seen), drawn)]
        alone, logprob = draw(*one, jax.tree.map(lambda x: x[row : row + 1], how))  # noqa: B023
        assert int(alone[0]) == int(ids[row])
        np.testing.assert_allclose(logprob[0], logprobs[row], atol=1e-6)
    of_all = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(logprobs, of_all[np.arange(8), ids], atol=1e-6)  # as the logits came


def test_what_was_seen_becomes_less_probable():
    logits = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.1, -5.0]])
    seen = jnp.array([[True, False, False], [True, False, False]])
    ids, _ = draw(logits, seen, jnp.zeros(2, jnp.int32), options(2, penalty=1.2))
    assert ids.tolist() == [1, 1]  # 2 / 1.2 < 1.9, and -1 · 1.2 < -1.1
    assert draw(logits, seen, jnp.zeros(2, jnp.int32), options(2))[0].tolist() == [0, 0]
