"""Floating-point operations of a training step, counted in the traced model instead of by a table of layers."""

import math

import flax.linen as nn
import jax
from jax.extend import core
from jax.interpreters import partial_eval as pe

from lmm_jax import sharding
from lmm_jax.models.attention.attention import counting
from lmm_jax.training import optimizer
from lmm_jax.training.step import loss_and_grads, token_losses


def step_flops(program, batch) -> int:
    """Operations of all matrix products of one update, over all devices: what model FLOPs utilisation counts.

    The forward pass is traced; a product of m × k and k × n counts 2 · m · k · n, attention over all pairs of
    positions (PaLM, appendix B), a loop's body as often as it runs. Each factor whose gradient is needed costs the
    same once more, so that frozen parts cost what they cost. What is computed again to save memory is left out, and
    so are the products by which a TPU looks up rows.

    Args:
      program: `state.Program`.
      batch: arrays or `ShapeDtypeStruct`s `[A, G, …]`.
    """
    params = nn.unbox(program.boxed)
    micro = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
    with sharding.use(sharding.make_mesh({}, jax.devices("cpu")[:1]), program.config.rules), counting():
        traced = jax.make_jaxpr(lambda params, micro: token_losses(program.model, params, micro))(params, micro)
    paths = (jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params))
    differentiated = [program.rates[path] > 0 for path in paths] + [False] * len(micro)
    flops, _ = _count(traced.jaxpr, differentiated)
    return flops * batch["id"].shape[0]


def executed_flops(program, batch) -> int:
    """Operations of all matrix products of one update as it runs: with what is computed again to save memory.

    Counted in the traced gradient, what nothing needs left out, otherwise as `step_flops`.
    """
    micro = {name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    trainable, frozen = optimizer.split(nn.unbox(program.boxed), program.rates)

    def grads(trainable, frozen, micro):
        return loss_and_grads(program.model, trainable, frozen, micro)[1]

    with sharding.use(sharding.make_mesh({}, jax.devices("cpu")[:1]), program.config.rules), counting():
        traced = jax.make_jaxpr(grads)(trainable, frozen, micro).jaxpr
    needed, _ = pe.dce_jaxpr(traced, [True] * len(traced.outvars))
    return _count(needed, [False] * len(needed.invars))[0] * batch["id"].shape[0]


def inference_flops(step, *args) -> int:
    """Operations of all matrix products of `step(*args)`, a forward pass, counted as those of `step_flops`."""
    with sharding.use(sharding.make_mesh({}, jax.devices("cpu")[:1]), {}), counting():
        traced = jax.make_jaxpr(step)(*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args))
    return _count(traced.jaxpr, [False] * len(traced.jaxpr.invars))[0]


def _count(jaxpr, differentiated):
    """Operations of a jaxpr and its gradient; which of its outputs depend on what is differentiated.

    Args:
      jaxpr: a `Jaxpr`.
      differentiated: for each input, whether a gradient flows to it.
    """
    needed = {var for var, d in zip(jaxpr.invars, differentiated, strict=True) if d}
    total = 0
    for eqn in jaxpr.eqns:
        into = [not isinstance(x, core.Literal) and x in needed for x in eqn.invars]
        inner = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            total += _product(eqn) * (1 + sum(into))
            out = [any(into)]
        elif inner is not None:
            flops, out = _inner(eqn, getattr(inner, "jaxpr", inner), into)
            total += flops
        elif eqn.primitive.name == "stop_gradient":
            out = [False]
        else:
            out = [any(into)] * len(eqn.outvars)
        needed.update(var for var, d in zip(eqn.outvars, out, strict=True) if d)
    return total, [not isinstance(x, core.Literal) and x in needed for x in jaxpr.outvars]


def _inner(eqn, jaxpr, into):
    """`_count` of an equation that runs `jaxpr`."""
    if eqn.primitive.name != "scan":
        return _count(jaxpr, into)
    # Constants, carry and slices, in this order: only slices, and outputs that are stacked, have an axis less inside.
    carried = _as_outside(eqn.outvars, jaxpr.outvars)
    first = _as_outside(eqn.invars, jaxpr.invars) - carried
    while True:  # what one turn makes depend, the next one takes in
        flops, out = _count(jaxpr, into)
        carry = [a or b for a, b in zip(into[first : first + carried], out[:carried], strict=True)]
        if carry == into[first : first + carried]:
            return flops * eqn.params["length"], out
        into = into[:first] + carry + into[first + carried :]


def _as_outside(outside, inside):
    """How many values have as many axes in a loop's body as outside of it."""
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outside, inside, strict=True))


def _product(eqn):
    """Operations of a matrix product or convolution."""
    out, (left, right) = math.prod(eqn.outvars[0].aval.shape), (x.aval.shape for x in eqn.invars)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(left[axis] for axis in contracted)
    return 2 * out * math.prod(right) // right[eqn.params["dimension_numbers"].rhs_spec[0]]
