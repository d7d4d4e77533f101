"""The training and evaluation steps: pure functions of state and batch."""

import functools

import jax
import jax.numpy as jnp
import optax

from lmm_jax.sharding import constrain
from lmm_jax.training import adapters, optimizer
from lmm_jax.training.loss import answered, cross_entropy, group_bits, group_weights, router_losses


def token_losses(model, params, batch):
    """Losses at the supervised positions of a batch without a micro-batch axis, and a router's logits.

    Returns:
      cross-entropy `[G, K]` float32, and the logits of `LMM.route`, None without a router.
    """
    h, logits = model.apply({"params": params}, batch, method="route")
    # By row and position: a flat index would not be shared out where the positions of a row are.
    read = jax.vmap(lambda h, at: h.at[at // h.shape[1], at % h.shape[1]].get(mode="fill", fill_value=jnp.nan))
    h = constrain(read(h, batch["target_at"]), "batch", "length", "act_embed")
    decoder = model.decoder
    head = decoder.head_matrix(params["decoder"])
    h = decoder.to_head(h)
    return cross_entropy(h, head, batch["target"], decoder.vocab_size, decoder.dtype), logits


def _sums(model, ce, logits, bits, batch):
    """Sums over the targets of each group `[S]`; of a model with a router those of its losses behind them, `[2 · S]`.

    Returns:
      sums and how many are summed, of the same shape.
    """
    sums, counts = (bits * ce[..., None]).sum(axis=(0, 1)), bits.sum(axis=(0, 1))
    if model.router is None:
        return sums, counts
    routed = [jnp.zeros_like(sums)] * 2
    if logits is not None:
        routed = router_losses(logits, ce, batch["answer"], bits, batch["question_grids"])
    return tuple(jnp.concatenate(pair) for pair in zip((sums, counts), routed, strict=True))


def _no_sums(model):
    """Zeros of the shapes of `_sums`."""
    groups = len(model.scales) * (1 if model.router is None else 2)
    return jnp.zeros(groups), jnp.zeros(groups)


def loss_and_grads(model, trainable, frozen, batch, dropout=0.0, key=None):
    """Loss over all micro-batches, its gradient, and the loss of each group.

    Of a model with a router the gradient is that of the loss and of the router's loss, which is the mean over all
    pairs of a question and a scale, see `loss.router_losses`. No parameter has a gradient of both.

    Args:
      model: the `LMM`.
      trainable: flat dict of the leaves to differentiate.
      frozen: flat dict of the others.
      batch: arrays `[A, G, …]`; group counts are taken over all A micro-batches, so that accumulation changes
        nothing but the order of additions.
      dropout: share of the numbers that adapters read which are left out.
      key: random key of this step, for that; needed where it is not 0.

    Returns:
      loss (0 if nothing is supervised), gradients like `trainable`, losses `[groups]`, counts `[groups]`; of a model
      with a router the latter go on with its losses at each scale and the questions that have one, `[2 · groups]`.
    """
    S = len(model.scales)
    bits = group_bits(batch["group"], S)
    counts = bits.sum(axis=(0, 1, 2))
    pairs = (answered(batch["answer"], bits, batch["question_grids"]) > 0).sum() if "answer" in batch else 0

    def loss_fn(trainable, micro, bits, number=0):
        params = optimizer.merge(trainable, frozen)
        if dropout:
            params = adapters.with_dropout(params, dropout, jax.random.fold_in(key, number))
        ce, logits = token_losses(model, params, micro)
        loss = (group_weights(bits, counts) * ce).sum()
        sums = _sums(model, ce, logits, bits, micro)
        return loss + sums[0][S:].sum() / jnp.maximum(pairs, 1), (loss, sums)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if batch["group"].shape[0] == 1:
        micro = {name: x[0] for name, x in batch.items()}
        (_, aux), grads = grad_fn(trainable, micro, bits[0])
    else:

        def body(total, xs):
            (_, aux), grads = grad_fn(trainable, *xs)
            return jax.tree.map(jnp.add, total, (aux, grads)), None

        zero = ((jnp.zeros(()), _no_sums(model)), jax.tree.map(jnp.zeros_like, trainable))
        numbers = jnp.arange(len(bits)) if dropout else None
        (aux, grads), _ = jax.lax.scan(body, zero, (batch, bits, numbers))
    loss, (sums, counts) = aux
    return loss, grads, sums / jnp.maximum(counts, 1), counts


SIGMAS = 6.0  # standard deviations above the mean of the latest losses from which on a loss is a spike
LEAST_SIGMA = 0.01  # share of that mean that their standard deviation counts as at least


def is_spike(loss, recent, updates):
    """Whether a loss is far above those before it, as after a batch that would throw the model off its way.

    Losses that hardly differ have a standard deviation near 0, of which anything is a multiple: it counts as a share
    `LEAST_SIGMA` of their mean at least.

    Args:
      loss: of this step.
      recent: `[WINDOW]` losses of the latest updates, in any order.
      updates: that were made so far; before there are `WINDOW` nothing is a spike.
    """
    mean, sigma = recent.mean(), jnp.maximum(recent.std(), LEAST_SIGMA * jnp.abs(recent.mean()))
    return (updates >= recent.size) & (loss > mean + SIGMAS * sigma)


def train_step(model, tx, rates, state, batch, dropout=0.0, seed=0, max_skipped=None, skip_spikes=False):
    """One update; an update whose loss or gradient is not finite, or whose loss is a spike, is skipped and counted.

    All that is drawn is drawn from the seed and the number of the step. Once `max_skipped` updates in a row were
    skipped the state stays as it is, the step's number too: whoever hears of it after later steps were asked for
    finds the run where it was to stop.

    Args:
      model: the `LMM`.
      tx: optax transformation over the flat trainable leaves.
      rates: peak rate by path; decides what is trainable.
      state: `TrainState`.
      batch: arrays `[A, G, …]`.
      dropout: of adapters, see `loss_and_grads`.
      seed: of the run.
      max_skipped: see above; None to go on whatever was skipped.
      skip_spikes: whether spikes are skipped, see `is_spike`.

    Returns:
      The new state and metrics: loss, grad_norm, finite, spike, skipped_in_row, and of `loss_and_grads` group_loss
      and group_count.
    """
    trainable, frozen = optimizer.split(state.params, rates)
    key = jax.random.fold_in(jax.random.key(seed), state.step) if dropout else None
    loss, grads, group_loss, counts = loss_and_grads(model, trainable, frozen, batch, dropout, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, trainable)
    updated = optax.apply_updates(trainable, updates)
    made = state.step - state.skipped  # updates so far
    spike = finite & is_spike(loss, state.recent, made) if skip_spikes else jnp.zeros((), bool)
    goes_on = True if max_skipped is None else state.skipped_in_row < max_skipped
    good = finite & ~spike & goes_on
    skips = ~(finite & ~spike) & goes_on
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(good, new, old))
    state = state.replace(
        step=state.step + good + skips,
        params=optimizer.merge(keep(updated, trainable), frozen),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + skips,
        skipped_in_row=jnp.where(good, 0, state.skipped_in_row + skips),
        recent=keep(state.recent.at[made % state.recent.size].set(loss), state.recent),
    )
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        "finite": finite,
        "spike": spike,
        "skipped_in_row": state.skipped_in_row,
        "group_loss": group_loss,
        "group_count": counts,
    }
    return state, metrics


def eval_step(model, params, batch):
    """Sums of cross-entropy and member counts of each group for a batch `[A, G, …]`, `[groups]` each.

    Of a model with a router its own follow, as in `loss_and_grads`.
    """

    def body(total, micro):
        bits = group_bits(micro["group"], len(model.scales))
        ce, logits = token_losses(model, params, micro)
        return jax.tree.map(jnp.add, total, _sums(model, ce, logits, bits, micro)), None

    return jax.lax.scan(body, _no_sums(model), batch)[0]


def jit_train_step(program):
    """`train_step` compiled for a `state.Program`; the old state is donated."""
    config = program.config
    step = functools.partial(
        train_step,
        program.model,
        program.tx,
        program.rates,
        dropout=config.lora.dropout if config.lora.rank else 0.0,
        seed=config.seed,
        max_skipped=config.train.max_skipped,
        skip_spikes=config.train.skip_spikes,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(program.shardings, None))


def jit_eval_step(program):
    """`eval_step` compiled for a `state.Program`."""
    return jax.jit(functools.partial(eval_step, program.model))
