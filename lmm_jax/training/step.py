"""The training and evaluation steps: pure functions of state and batch."""

import functools

import jax
import jax.numpy as jnp
import optax

from lmm_jax.sharding import constrain
from lmm_jax.training import optimizer
from lmm_jax.training.loss import cross_entropy, group_bits, group_weights


def token_losses(model, params, batch):
    """Cross-entropy `[G, K]` float32 at the supervised positions of a batch without a micro-batch axis."""
    h = model.apply({"params": params}, batch)
    # By row and position: a flat index would not be shared out where the positions of a row are.
    read = jax.vmap(lambda h, at: h.at[at // h.shape[1], at % h.shape[1]].get(mode="fill", fill_value=jnp.nan))
    h = constrain(read(h, batch["target_at"]), "batch", "length", "act_embed")
    decoder = model.decoder
    head = decoder.head_matrix(params["decoder"])
    return cross_entropy(h, head, batch["target"], decoder.vocab_size, decoder.dtype)


def loss_and_grads(model, trainable, frozen, batch):
    """Loss over all micro-batches, its gradient, and the loss of each group.

    Args:
      model: the `LMM`.
      trainable: flat dict of the leaves to differentiate.
      frozen: flat dict of the others.
      batch: arrays `[A, G, …]`; group counts are taken over all A micro-batches, so that accumulation changes
        nothing but the order of additions.

    Returns:
      loss (0 if nothing is supervised), gradients like `trainable`, losses `[groups]`, counts `[groups]`.
    """
    bits = group_bits(batch["group"], len(model.scales))
    counts = bits.sum(axis=(0, 1, 2))

    def loss_fn(trainable, micro, bits):
        ce = token_losses(model, optimizer.merge(trainable, frozen), micro)
        return (group_weights(bits, counts) * ce).sum(), (bits * ce[..., None]).sum(axis=(0, 1))

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if batch["group"].shape[0] == 1:
        micro = {name: x[0] for name, x in batch.items()}
        (loss, sums), grads = grad_fn(trainable, micro, bits[0])
    else:

        def body(total, xs):
            (loss, sums), grads = grad_fn(trainable, *xs)
            return jax.tree.map(jnp.add, total, (loss, sums, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(bits.shape[-1]), jax.tree.map(jnp.zeros_like, trainable))
        (loss, sums, grads), _ = jax.lax.scan(body, zero, (batch, bits))
    return loss, grads, sums / jnp.maximum(counts, 1), counts


def train_step(model, tx, rates, state, batch):
    """One update; an update whose loss or gradient is not finite is skipped and counted.

    Args:
      model: the `LMM`.
      tx: optax transformation over the flat trainable leaves.
      rates: peak rate by path; decides what is trainable.
      state: `TrainState`.
      batch: arrays `[A, G, …]`.

    Returns:
      The new state and metrics: loss, grad_norm, finite, group_loss `[groups]`, group_count `[groups]`.
    """
    trainable, frozen = optimizer.split(state.params, rates)
    loss, grads, group_loss, counts = loss_and_grads(model, trainable, frozen, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    updated = optax.apply_updates(trainable, updates)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    state = state.replace(
        step=state.step + 1,
        params=optimizer.merge(keep(updated, trainable), frozen),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "finite": finite,
        "group_loss": group_loss,
        "group_count": counts,
    }
    return state, metrics


def eval_step(model, params, batch):
    """Sums of cross-entropy and member counts of each group, `[groups]` each, for a batch `[A, G, …]`."""

    def body(total, micro):
        bits = group_bits(micro["group"], len(model.scales))
        ce = token_losses(model, params, micro)
        return jax.tree.map(jnp.add, total, ((bits * ce[..., None]).sum((0, 1)), bits.sum((0, 1)))), None

    zero = (jnp.zeros(len(model.scales)), jnp.zeros(len(model.scales)))
    return jax.lax.scan(body, zero, batch)[0]


def jit_train_step(program):
    """`train_step` compiled for a `state.Program`; the old state is donated."""
    step = functools.partial(train_step, program.model, program.tx, program.rates)
    return jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, None))


def jit_eval_step(program):
    """`eval_step` compiled for a `state.Program`."""
    return jax.jit(functools.partial(eval_step, program.model))
