"""Cross-entropy at supervised positions, averaged inside each loss group and then over the groups; a router's."""

import jax
import jax.numpy as jnp

from lmm_jax.models.layers import contract
from lmm_jax.sharding import devices, partition

POSITIONS = 512  # supervised positions of a pack whose logits of all the vocabulary would take the room there is


def cross_entropy(h, kernel, targets, vocab_size, dtype):
    """Per-token cross-entropy of the logits `h @ kernel`, by parts of the vocabulary: no more exist at a time.

    Each part's weights are gathered once for all positions, and once more in the backward pass, and their gradient
    is reduced once. By parts of the positions, each would gather the whole head and reduce its whole gradient.

    Args:
      h: `[G, K, D]` hidden states at supervised positions.
      kernel: `[D, V]` float32, the head.
      targets: `[G, K]` int ids.
      vocab_size: ids from here to V are padding and get no probability.
      dtype: of the matrix product; what follows is float32.

    Returns:
      `[G, K]` float32.
    """
    (D, V), K = kernel.shape, h.shape[1]
    spec = partition((V,), "vocab")
    shards = devices(spec[0]) if spec else 1
    parts = next(n for n in range(-(-K // POSITIONS), V + 1) if V // shards % n == 0)
    # A part takes as much of each shard of the vocabulary, so that none has to move.
    kernel = kernel.reshape(D, shards, parts, -1).transpose(2, 0, 1, 3)
    ids = jnp.arange(V).reshape(shards, parts, -1).swapaxes(0, 1)
    h = h.astype(jnp.float32)  # so that its gradient is summed over the parts in float32

    def part(_, xs):
        kernel, ids = xs
        logits = contract(h, kernel, ("embed",), ("vocab", None), dtype).astype(jnp.float32)
        logits = jnp.where(ids < vocab_size, logits, jnp.finfo(jnp.float32).min)
        picked = jnp.where(ids == targets[..., None, None], logits, 0).sum((-2, -1))
        return None, (jax.nn.logsumexp(logits, axis=(-2, -1)), picked)

    _, (total, picked) = jax.lax.scan(jax.checkpoint(part, prevent_cse=False), None, (kernel, ids))
    return jax.nn.logsumexp(total, axis=0) - picked.sum(axis=0)


def group_bits(group, groups):
    """Membership `[..., groups]` float32 of the bitmasks `[...]`."""
    return ((group[..., None] >> jnp.arange(groups)) & 1).astype(jnp.float32)


def group_weights(bits, counts):
    """Weight of each target in the loss: the mean over non-empty groups of the mean inside each group.

    A plain mean over all targets is wrong as soon as truncation or text-only rows make the groups differ in size.

    Args:
      bits: `[..., groups]` membership.
      counts: `[groups]` members over the whole global batch, micro-batches included.

    Returns:
      `[...]` float32; all zeros if nothing is supervised.
    """
    non_empty = jnp.maximum((counts > 0).sum(), 1)
    return (bits / jnp.maximum(counts, 1)).sum(axis=-1) / non_empty


def answered(answer, bits, shown):
    """Targets `[..., Q, scales]` float32 of each question at each scale: 0 where none stands, or no picture is shown.

    Args:
      answer: `[..., K]` int, the question that each target belongs to; -1 for none.
      bits: `[..., K, scales]` membership in the loss groups, one a scale.
      shown: `[..., Q, U]` int, the grids of each question's pictures.
    """
    return _over_answers(answer, bits, shown.shape[-2]) * (shown > 0).any(axis=-1)[..., None]


def router_losses(logits, ce, answer, bits, shown):
    """Binary cross-entropy of a router at each scale, and how many questions have one there.

    The label of a question at a scale is what the model makes of the true answer there: the geometric mean of the
    probabilities of its tokens, without the one that ends it. It has no gradient.

    Args:
      logits: `[G, Q, scales]` of the router.
      ce: `[G, K]` cross-entropy of the targets.
      answer, bits, shown: as for `answered`, with packs `[G]` in front.

    Returns:
      sums over the questions and their numbers, `[scales]` float32 each.
    """
    targets = answered(answer, bits, shown)
    total = _over_answers(answer, bits * ce[..., None], shown.shape[-2])
    label = jax.lax.stop_gradient(jnp.exp(-total / jnp.maximum(targets, 1)))
    there = targets > 0
    losses = jnp.where(there, jax.nn.softplus(logits) - label * logits, 0)
    return losses.sum(axis=(0, 1)), there.sum(axis=(0, 1), dtype=jnp.float32)


def _over_answers(answer, values, count):
    """Sums `[..., Q, scales]` of values `[..., K, scales]` over the targets of each of `count` questions."""
    own = (answer[..., None] == jnp.arange(count)).astype(jnp.float32)
    return jnp.einsum("...ka,...ks->...as", own, values, precision=jax.lax.Precision.HIGHEST)
