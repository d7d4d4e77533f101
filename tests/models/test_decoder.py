"""The scanned decoder against its layers one by one, injection included."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lmm_jax import config, sharding
from lmm_jax.models import visual_tokens
from lmm_jax.models.attention.attention import SHORT
from lmm_jax.models.decoder import Block, Decoder, at_positions, inject
from lmm_jax.models.layers import RMSNorm

SMALL = dict(vocab_size=40, width=16, depth=4, heads=4, kv_heads=2, mlp_dim=24, vocab_multiple=8)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    decoder = Decoder(**SMALL, inject_layers=(1, 3))
    h = jnp.asarray(rng.normal(size=(2, 2, 6, 16)), jnp.float32)
    context = {
        "position": jnp.tile(jnp.arange(6), (2, 2, 1)),
        "segment": jnp.array([[[1] * 6, [1, 1, 1, 2, 2, 0]]] * 2),
        "slot": jnp.asarray(rng.integers(-1, 5, (2, 2, 6))),
        "stacks": jnp.asarray(rng.normal(size=(2, 2, 5, 16)), jnp.float32),
    }
    variables = nn.unbox(decoder.init(jax.random.key(0), h, context))
    return decoder, variables, h, context


def unrolled(decoder, variables, h, context):
    """The same layers in a Python loop, each adding its stack by itself."""
    params = variables["params"]
    plain = {name: context[name] for name in ("position", "segment")}
    for i in range(decoder.depth):
        if i in decoder.inject_layers:
            stack = context["stacks"][decoder.inject_layers.index(i)]
            for g in range(h.shape[0]):
                added = jnp.where(context["slot"][g][..., None] >= 0, stack[g][context["slot"][g]], 0)
                h = h.at[g].add(added)
        layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
        h, _ = Block(**decoder.block_fields()).apply({"params": layer}, h, (jnp.int32(-1), None), plain)
    return RMSNorm(decoder.norm_eps).apply({"params": params["norm"]}, h)


def gradients(f, variables, h, context):
    """Gradients with respect to variables, input and stacks of a mean that weights each output differently."""
    weights = np.random.default_rng(1).normal(size=h.shape).astype(np.float32)

    def loss(variables, h, stacks):
        return (f(variables, h, {**context, "stacks": stacks}) * weights).mean()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(variables, h, context["stacks"])


def test_scan_equals_unrolled_layers(case):
    decoder, variables, h, context = case
    scanned, _ = decoder.apply(variables, h, context)
    np.testing.assert_allclose(scanned, unrolled(decoder, variables, h, context), atol=1e-5)


def test_gradients_of_scan_equal_unrolled_layers(case):
    decoder, variables, h, context = case

    scanned = gradients(lambda v, h, c: decoder.apply(v, h, c)[0], variables, h, context)
    looped = gradients(lambda *args: unrolled(decoder, *args), variables, h, context)
    # The table and head take no part here.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, looped)
    assert all(np.abs(s).max() > 1e-3 for s in scanned[2])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_full_remat_keeps_one_hidden_state_a_layer(case, monkeypatch, platform):
    """And nothing of the injection: neither one-hot matrices of the slots, as a TPU takes them, nor stacks."""
    decoder, variables, h, context = case
    monkeypatch.setattr(visual_tokens, "platform", lambda: platform)

    def loss(variables, h, stacks):
        return decoder.apply(variables, h, {**context, "stacks": stacks})[0].sum()

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(variables, h, context["stacks"])
    forward, _ = [e for e in traced.eqns if e.primitive.name == "scan"]
    kept = [x.aval.shape for x in forward.outvars if x.aval.dtype == h.dtype]
    keys_values = (4, 6, 2, 4)  # results, which training does not ask for
    assert kept[0] == h.shape  # what the layers hand on
    assert [shape[1:] for shape in kept[1:] if shape[1:] != keys_values] == [h.shape]


def test_a_stack_before_the_first_layer(case):
    _, variables, h, context = case
    decoder = Decoder(**SMALL, inject_layers=(0, 3))
    scanned, _ = decoder.apply(variables, h, context)
    np.testing.assert_allclose(scanned, unrolled(decoder, variables, h, context), atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, "full"),
        pytest.param({"fsdp": 2, "tensor": 4}, "dots", marks=pytest.mark.long),
    ],
)
def test_sharded_injection_has_the_gradients_of_one_device(mesh, remat):
    rng = np.random.default_rng(0)
    decoder = Decoder(**SMALL, inject_layers=(0, 1, 3), remat=remat)
    h = jnp.asarray(rng.normal(size=(8, 2, 6, 16)), jnp.float32)
    context = {
        "position": jnp.tile(jnp.arange(6), (8, 2, 1)),
        "segment": jnp.asarray(np.sort(rng.integers(0, 3, (8, 2, 6)))),
        "slot": jnp.asarray(rng.integers(-1, 5, (8, 2, 6))),
        "stacks": jnp.asarray(rng.normal(size=(3, 8, 5, 16)), jnp.float32),
    }
    boxed = jax.eval_shape(lambda: decoder.init(jax.random.key(0), h, context))
    params = nn.unbox(decoder.init(jax.random.key(0), h, context))["params"]
    outputs = lambda params, h, context: decoder.apply({"params": params}, h, context)[0]  # noqa: E731
    want = gradients(outputs, params, h, context)

    rules, mesh = dict(config.base().rules), sharding.make_mesh(mesh)
    placed = sharding.param_shardings(boxed["params"], mesh, rules)
    up = placed["layers"]["up"]["kernel"]
    assert up.shard_shape((4, 16, 24)) == (4, 16 // mesh.shape["fsdp"], 24 // mesh.shape["tensor"])
    with sharding.use(mesh, rules):
        found = gradients(outputs, jax.device_put(params, placed), h, context)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)
    assert (np.abs(want[2]).max(axis=(1, 2, 3)) > 1e-3).all()  # of each stack


def test_what_matmuls_and_attention_gave_is_not_computed_again_by_remat_of_dots():
    T = SHORT + 1
    h, row = jnp.zeros((1, 1, T, 16)), jnp.zeros((1, 1, T), jnp.int32)
    context = {"position": row, "segment": row}
    variables = nn.unbox(jax.eval_shape(Decoder(**SMALL).init, jax.random.key(0), h, context))

    def counted(remat):
        """Products with a kernel, and loops of attention whose ends the data sets: one a pass over the blocks."""
        decoder = Decoder(**SMALL, remat=remat)
        grad = jax.make_jaxpr(jax.grad(lambda v: decoder.apply(v, h, context)[0].sum()))(variables)
        found = collections.Counter()
        pending = [grad.jaxpr]
        while pending:
            for e in pending.pop().eqns:
                of_kernel = e.primitive.name == "dot_general" and not any(e.params["dimension_numbers"][1])
                found[e.primitive.name] += of_kernel or e.primitive.name == "while"
                pending += jaxprs_in_params(e.params)
        return found["dot_general"], found["while"]

    assert counted("dots") == counted("none") == (3 * 7, 2)
    assert counted("full") == (3 * 7 + 6, 3)  # nothing needs again what the last matmul gave


@pytest.mark.parametrize("remat", ["none", "dots", "offload"])
def test_remat_changes_nothing(case, remat):
    decoder, variables, h, context = case
    other = Decoder(**SMALL, inject_layers=(1, 3), remat=remat)
    found, want = (
        jax.jit(jax.value_and_grad(lambda v, d=d: (d.apply(v, h, context)[0] ** 2).sum()))(variables)
        for d in (other, decoder)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, want)


def test_offloading_moves_the_inputs_of_layers_to_the_host(case):
    _, variables, h, context = case
    decoder = Decoder(**SMALL, inject_layers=(1, 3), remat="offload")
    grad = jax.grad(lambda v: decoder.apply(v, h, context)[0].sum())
    assert "<host>" in str(jax.make_jaxpr(grad)(variables))


def test_injection_adds_only_at_visual_positions(case):
    _, _, h, context = case
    added = at_positions(context["stacks"], context["slot"])
    out = inject(h, added, jnp.int32(1))
    text = context["slot"] < 0
    np.testing.assert_array_equal(out[text], h[text])
    assert (np.asarray(out[~text]) != np.asarray(h[~text])).any(axis=-1).all()
    np.testing.assert_array_equal(inject(h, added, jnp.int32(-1)), h)


def test_stack_numbers_drop_layers_past_the_last():
    numbers = Decoder(**SMALL, inject_layers=(0, 2, 9)).stack_numbers()
    np.testing.assert_array_equal(numbers, [0, -1, 1, -1])


def test_padded_vocabulary_is_never_predicted():
    decoder = Decoder(**{**SMALL, "vocab_size": 37})
    variables = nn.unbox(decoder.init(jax.random.key(0), jnp.ones((1, 16)), method="logits"))
    logits = decoder.apply(variables, jnp.ones((1, 16)), method="logits")
    assert logits.shape == (1, 40) and (logits[0, 37:] < -1e30).all() and (logits[0, :37] > -1e3).all()


def test_stacks_over_blended_positions_are_blended_alike():
    stacks = jax.random.normal(jax.random.key(0), (2, 1, 5, 3))
    slot = jnp.array([[[-1, 0, 4, 2]]])
    blend = jnp.array([[[[-1] * 4, [0, 1, 2, 3], [4] * 4, [2, 3, 2, 3]]]]), jnp.array([[[[0.0] * 4, [0.25] * 4]]])
    shares = jnp.concatenate([blend[1], jnp.array([[[[1.0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4]]]])], axis=2)
    found = at_positions(stacks, slot, (blend[0], shares))
    parts = [at_positions(stacks, blend[0][..., k]) * shares[..., k, None] for k in range(4)]
    np.testing.assert_allclose(found, sum(parts), atol=1e-6)
    np.testing.assert_array_equal(found[:, 0, 0, 0], 0)
