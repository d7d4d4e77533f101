"""Cross-entropy at supervised positions, averaged inside each loss group and then over the groups."""

import jax
import jax.numpy as jnp

CHUNK = 512  # supervised positions of a pack whose logits exist at a time


def cross_entropy(logits_fn, h, targets):
    """Per-token cross-entropy, with logits of `CHUNK` positions a pack in memory at a time.

    Args:
      logits_fn: hidden states `[..., D]` to float32 logits `[..., vocabulary]`.
      h: `[G, K, D]` hidden states at supervised positions.
      targets: `[G, K]` int ids.

    Returns:
      `[G, K]` float32.
    """

    def one(h, targets):
        logits = logits_fn(h)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    G, K, D = h.shape
    if K <= CHUNK:
        return one(h, targets)
    chunks = -(-K // CHUNK)
    room = chunks * CHUNK - K
    # Every chunk-th position makes a chunk, so that a mesh that shares out positions shares out each chunk.
    h = jnp.pad(h, ((0, 0), (0, room), (0, 0))).reshape(G, CHUNK, chunks, D).transpose(2, 0, 1, 3)
    targets = jnp.pad(targets, ((0, 0), (0, room))).reshape(G, CHUNK, chunks).transpose(2, 0, 1)
    _, ce = jax.lax.scan(lambda _, x: (None, jax.checkpoint(one)(*x)), None, (h, targets))
    return ce.transpose(1, 2, 0).reshape(G, -1)[:, :K]


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
