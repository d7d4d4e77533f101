"""From logits to the next token: greedily, or drawn from what temperature, top-k and top-p leave of the distribution.

Every option is a traced array with a value for each row, so that unlike requests share a batch and a program.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Options:
    """How each row draws; arrays `[B]`.

    Attributes:
      temperature: float32, that logits are divided by; 0 takes the most probable token.
      top_k: int32, only so many of the most probable tokens may be drawn; 0 for all.
      top_p: float32, only the most probable tokens that together have this probability may be drawn; 1 for all.
      penalty: float32, that logits of tokens seen before are divided by, or multiplied where negative (Keskar et al.
        2019, arXiv 1909.05858, as transformers has it); 1 for none.
      seed: uint32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    penalty: jax.Array
    seed: jax.Array

    @classmethod
    def greedy(cls, rows):
        """The most probable token in each of so many rows."""
        zeros, ones = jnp.zeros(rows, jnp.float32), jnp.ones(rows, jnp.float32)
        return cls(zeros, jnp.zeros(rows, jnp.int32), ones, ones, jnp.zeros(rows, jnp.uint32))


def draw(logits, seen, drawn, options):
    """The next token of each row.

    A row's randomness follows from its seed and from how many tokens it has drawn: not from the batch, the devices,
    or the rows beside it.

    Args:
      logits: `[B, vocabulary]` float32.
      seen: `[B, vocabulary]` bool, tokens of the prompt and of the answer so far.
      drawn: `[B]` int, tokens that the row has drawn so far.
      options: `Options`.

    Returns:
      ids `[B]` int32, and of each its log-probability `[B]` under the logits as they came.
    """
    penalty = options.penalty[:, None]
    wanted = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    random = options.temperature > 0
    ids = jnp.argmax(wanted, axis=-1).astype(jnp.int32)
    ids = jax.lax.cond(random.any(), lambda: jnp.where(random, _random(wanted, drawn, options), ids), lambda: ids)
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return ids, chosen - jax.nn.logsumexp(logits, axis=-1)


def _random(logits, drawn, options):
    """A token of each row by the Gumbel-max method."""
    logits /= jnp.where(options.temperature > 0, options.temperature, 1)[:, None]
    cut = (options.top_k > 0) | (options.top_p < 1)
    logits = jax.lax.cond(cut.any(), lambda: keep_likely(logits, options.top_k, options.top_p), lambda: logits)

    def noise(seed, count):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[1:])

    return jnp.argmax(logits + jax.vmap(noise)(options.seed, drawn), axis=-1).astype(jnp.int32)


def keep_likely(logits, top_k, top_p):
    """Logits `[B, vocabulary]` with -inf for what top-k, and then top-p (Holtzman et al. 2019), leave out.

    Tokens that are as probable as the last one that stays stay too. The most probable one always stays.

    Args:
      logits: `[B, vocabulary]` float32.
      top_k: `[B]` int, 0 for all.
      top_p: `[B]` float, 1 for all.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    ordered = jnp.where((top_k[:, None] == 0) | (rank < top_k[:, None]), ordered, -jnp.inf)
    probability = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # of the more probable ones
    # Rounded sums reach 1 before the last token does.
    likely = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    stays = (ordered > -jnp.inf) & likely
    least = jnp.min(jnp.where(stays, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
