"""Greedy decoding as one program: prefill, then a loop over the key-value cache."""

import jax
import jax.numpy as jnp


def generate_tokens(model, params, batch, scale, max_new_tokens, eos):
    """Greedy decoding over an explicit key-value cache, until every row has ended.

    Args:
      model: the `LMM`.
      params: its parameters.
      batch: prompts, one row a pack, `[G, 1, T]`; every prompt starts its row.
      scale: the bank's only scale.
      max_new_tokens: static bound.
      eos: id that ends a row, see `data.conversation.stop_id`; -1 lets every row run to its bound.

    Returns:
      tokens `[G, max_new_tokens]` int32 and lengths `[G]`, the end not counted.
    """
    variables = {"params": params}
    size = batch["id"].shape[-1] + max_new_tokens
    logits, cache = model.apply(variables, batch, size, (scale,), method="prefill")
    G = logits.shape[0]
    tokens = jnp.full((G, max_new_tokens), eos, jnp.int32)

    def unfinished(carry):
        i, _, done, *_ = carry
        return (i < max_new_tokens) & ~done.all()

    def body(carry):
        i, logits, done, tokens, cache = carry
        new = jnp.where(done, eos, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = tokens.at[:, i].set(new)
        logits, cache = model.apply(variables, new, cache, method="decode")
        return i + 1, logits, done | (new == eos), tokens, cache

    start = (jnp.zeros((), jnp.int32), logits, jnp.zeros(G, bool), tokens, cache)
    tokens = jax.lax.while_loop(unfinished, body, start)[3]
    ended = (tokens == eos).any(axis=1)
    return tokens, jnp.where(ended, jnp.argmax(tokens == eos, axis=1), max_new_tokens)
