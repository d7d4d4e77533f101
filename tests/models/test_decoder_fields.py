"""What LLaMA's successors do otherwise, as fields of the decoder, against transformers' own models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from lmm_jax import config, sharding
from lmm_jax.data.segments import positions
from lmm_jax.models.decoder import Decoder, KVCache
from lmm_jax.models.layers import rope
from lmm_jax.training.loss import cross_entropy

SMALL = {"vocab_size": 53, "width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "mlp_dim": 48, "vocab_multiple": 8}
LLAMA3 = ("llama3", 8.0, 1.0, 4.0, 128)
T = 24

# Each case: transformers' class, its config beside the sizes, and our fields.
CASES = {
    "llama": ("Llama", {}, {}),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 12}, {"head_dim": 12, "qk_norm": True, "tied": True}),
    "llama3 rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
        {"rope_scaling": LLAMA3},
    ),
    "linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_scaling": ("linear", 4.0)},
    ),
}

# Our path in a layer, and their name in theirs.
NAMES = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    **{f"{ours}_norm/scale": f"self_attn.{ours}_norm.weight" for ours in "qk"},
    **{f"{ours}/kernel": f"self_attn.{ours}_proj.weight" for ours in "qkvo"},
    **{f"{ours}/bias": f"self_attn.{ours}_proj.bias" for ours in "qkv"},
    **{f"{ours}/kernel": f"mlp.{ours}_proj.weight" for ours in ("gate", "up", "down")},
}


def as_ours(theirs, shapes):
    """Their arrays by name in our tree of `shapes`: layers stacked, kernels transposed, the vocabulary padded."""

    def one(path, shape):
        if path.startswith("layers/"):
            name = NAMES[path.removeprefix("layers/")]
            array = np.stack([theirs.pop(f"model.layers.{i}.{name}") for i in range(shape.shape[0])])
        else:
            names = {"table": "embed_tokens.weight", "norm/scale": "norm.weight"}
            array = theirs.pop(f"model.{names[path]}" if path in names else "lm_head.weight")
        array = array.swapaxes(-1, -2) if path.endswith("kernel") else array
        if path in ("table", "head/kernel"):
            array = np.pad(array, [(0, n - m) for n, m in zip(shape.shape, array.shape, strict=True)])
        return jnp.asarray(array.reshape(shape.shape))

    found = {path: one(path, shape) for path, shape in flatten_dict(shapes, sep="/").items()}
    assert not theirs, f"not read: {sorted(theirs)}"
    return unflatten_dict(found, sep="/")


def init(decoder):
    """Boxed abstract parameters."""
    h, row = jnp.zeros((1, 1, 2, decoder.width)), jnp.zeros((1, 1, 2), jnp.int32)

    def whole(decoder, h):
        return decoder.logits(decoder(h, {"position": row, "segment": row})[0])

    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), h, method=whole))["params"]


def forward(decoder, params, ids):
    """Hidden states `[B, T, D]`, keys and values of a row a pack; ids below 0 are padding."""
    variables, B = {"params": params}, len(ids)
    h = decoder.apply(variables, jnp.maximum(ids, 0)[:, None], method="embed")
    position = jnp.broadcast_to(jnp.arange(ids.shape[1]), (B, 1, ids.shape[1]))
    h, keys_values = decoder.apply(variables, h, {"position": position, "segment": (ids >= 0)[:, None].astype(int)})
    return h[:, 0], keys_values


def logits_of(decoder, params, h):
    return decoder.apply({"params": params}, h, method="logits")


def loss_of(decoder, params, ids):
    """Mean cross-entropy of each next id, as the training step takes it."""
    h = forward(decoder, params, ids)[0][:, :-1]
    return cross_entropy(h, decoder.head_matrix(params), ids[:, 1:], decoder.vocab_size, decoder.dtype).mean()


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """`(decoder, its parameters, ids, their logits, gradients of their loss as ours)`."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'lmm_jax[hf]'")
    transformers = pytest.importorskip("transformers", reason="as torch")
    family, theirs, ours = CASES[request.param]
    decoder = Decoder(**SMALL, **ours)
    sizes = {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.mlp_dim,
        "rms_norm_eps": decoder.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "tie_word_embeddings": decoder.tied,
    }
    of_theirs = getattr(transformers, f"{family}Config")(**sizes | theirs)
    model = getattr(transformers, f"{family}ForCausalLM")(of_theirs).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.uniform_(-0.4, 0.4).add_(1.0 if "norm" in name else 0.0)
    ids = np.random.default_rng(0).integers(0, decoder.vocab_size, (2, T))
    logits = model(input_ids=torch.tensor(ids)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(ids[:, 1:]).flatten())
    loss.backward()
    shapes = nn.unbox(init(decoder))
    params = as_ours({name: x.detach().numpy().copy() for name, x in model.named_parameters()}, shapes)
    grads = as_ours({name: x.grad.numpy().copy() for name, x in model.named_parameters()}, shapes)
    return decoder, params, jnp.asarray(ids), logits.detach().numpy(), grads


def test_logits_are_those_of_transformers(case):
    decoder, params, ids, want, _ = case
    found = jax.jit(lambda p, ids: logits_of(decoder, p, forward(decoder, p, ids)[0]))(params, ids)
    assert want.std() > 0.5
    np.testing.assert_allclose(found[..., : decoder.vocab_size], want, atol=1e-4)


def test_gradients_reach_every_parameter_and_are_those_of_transformers(case):
    decoder, params, ids, _, want = case
    found = jax.jit(jax.grad(lambda p: loss_of(decoder, p, ids)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, want)
    for path, x in flatten_dict(found, sep="/").items():
        each = x.reshape(x.shape[0], -1) if path.startswith("layers/") else x.reshape(1, -1)
        assert (jnp.abs(each).max(axis=1) > 1e-4).all(), path


def test_greedy_decoding_over_the_cache_gives_what_rereading_gives(case):
    decoder, params, ids, *_ = case
    prompt, new = 13, 8

    @jax.jit
    def reread(ids):
        return logits_of(decoder, params, forward(decoder, params, ids)[0])

    want = jnp.where(jnp.arange(prompt + new) < prompt, ids[:, : prompt + new], -1)
    for t in range(prompt, prompt + new):
        want = want.at[:, t].set(reread(want)[:, t - 1].argmax(axis=-1))

    @jax.jit
    def step(token, cache):
        h = decoder.apply({"params": params}, token[:, None, None], method="embed")
        position, segment = cache.length[:, None, None], jnp.ones((2, 1, 1), jnp.int32)
        context = {"position": position, "segment": segment, "filled": cache.filled()}
        h, (k, v) = decoder.apply({"params": params}, h, context, (cache.k, cache.v))
        return logits_of(decoder, params, h[:, 0, 0]).argmax(axis=-1), cache.append(k, v)

    h, (k, v) = forward(decoder, params, ids[:, :prompt])
    assert k.shape == (decoder.depth, 2, prompt, decoder.kv_heads, decoder.head_width)
    cache = KVCache.fill(k, v, prompt + new, jnp.full(2, prompt))
    token, found = logits_of(decoder, params, h[:, -1]).argmax(axis=-1), []
    for _ in range(new):
        found.append(token)
        token, cache = step(token, cache)
    np.testing.assert_array_equal(jnp.stack(found, axis=1), want[:, prompt:])


EVERYTHING = {"head_dim": 12, "tied": True, "qk_norm": True, "qkv_bias": True, "rope_scaling": LLAMA3}


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, "full", marks=pytest.mark.long),
        ({"fsdp": 2, "tensor": 2, "context": 2}, "dots"),
    ],
)
def test_all_fields_together_give_on_eight_devices_what_one_gives(mesh, remat):
    rng = np.random.default_rng(0)
    decoder = Decoder(**SMALL, **EVERYTHING, remat=remat)
    boxed, ids = init(decoder), jnp.asarray(rng.integers(0, decoder.vocab_size, (8, T)))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0.0, 0.4, x.shape), jnp.float32), nn.unbox(boxed))
    loss = jax.value_and_grad(lambda params, ids: loss_of(decoder, params, ids))
    want = jax.jit(loss)(params, ids)

    rules, mesh = dict(config.base().rules), sharding.make_mesh(mesh)
    placed = sharding.param_shardings(boxed, mesh, rules)
    assert placed["table"].shard_shape((56, 32)) == (56 // 2, 32 // 2 // mesh.shape["context"])
    with sharding.use(mesh, rules):
        batch = jax.NamedSharding(mesh, sharding.partition(ids.shape, "batch", None))
        found = jax.jit(loss)(jax.device_put(params, placed), jax.device_put(ids, batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)
    assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(want)) > 1e-4


@pytest.mark.long
def test_a_model_with_all_fields_learns(setup):
    fields = [f"model.decoder.{name}={value!r}" for name, value in EVERYTHING.items()]
    case = setup(8, *fields, "mesh.tensor=2", "mesh.context=2")
    assert "head" not in case.state.params["decoder"]
    state, losses = case.state, []
    for _ in range(3):
        state, metrics = case.run(state, case.host_batch(0))
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]


def test_a_decoder_without_the_fields_has_the_parameters_of_a_llama():
    paths = flatten_dict(nn.unbox(init(Decoder(**SMALL))), sep="/").keys()
    kernels = {f"layers/{name}/kernel" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    norms = {"layers/attention_norm/scale", "layers/mlp_norm/scale", "norm/scale"}
    assert paths == kernels | norms | {"table", "head/kernel"}


@pytest.mark.parametrize("scaling", [LLAMA3, ("linear", 4.0)])
def test_scaled_positions_turn_slower_where_they_turned_slowly(scaling):
    x, at = jnp.ones((1, 1, 1, 8)), jnp.array([[100]])
    plain, scaled = rope(x, at, 1e4), rope(x, at, 1e4, scaling)
    slow = np.arccos(scaled[..., 3] / 2**0.5) / np.arccos(plain[..., 3] / 2**0.5)
    assert (jnp.abs(plain - scaled) > 1e-3).any()
    # The angle of (1, 1) is 45°, from which the slowest pair turns by 0.1 radians, or by a part of that.
    np.testing.assert_allclose(slow, (np.pi / 4 + 0.1 / scaling[1]) / (np.pi / 4 + 0.1), rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 30}, "width 30 does not divide into 4 heads"),
        ({"head_dim": 7}, "odd width, 7"),
        ({"rope_scaling": ("yarn", 4.0)}, r"rope_scaling=\('yarn', 4.0\): expected"),
        ({"rope_scaling": ("linear",)}, "rope_scaling"),
        ({"rope_scaling": ("linear", "4")}, "rope_scaling"),
        ({"rope_scaling": ("llama3", 8.0, 4.0, 1.0, 128)}, "low_freq_factor below"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Decoder(**SMALL | fields).check()


def test_heads_with_a_width_of_their_own_need_not_divide_the_models():
    Decoder(**SMALL | {"width": 30, "head_dim": 12}).check()


@pytest.mark.long
def test_positions_of_three_axes_are_shared_out_with_their_row():
    decoder = Decoder(**SMALL, head_dim=16, qk_norm=True, rope_axes=(4, 2, 2))
    slot = np.full(32, -1)
    slot[3:15] = np.arange(12)
    position = jnp.asarray([[positions(slot, [(3, 4)])]] * 2)
    h = jax.random.normal(jax.random.key(1), (2, 1, 32, decoder.width))
    context = {"position": position, "segment": jnp.ones((2, 1, 32), jnp.int32)}
    params = nn.unbox(decoder.init(jax.random.key(0), h, context))

    def loss(params):
        return (decoder.apply(params, h, context)[0] ** 3).sum()

    one = jax.jit(jax.value_and_grad(loss))(params)
    with sharding.use(sharding.make_mesh({"fsdp": 2, "context": 4}), config.base().rules):
        shared = jax.jit(jax.value_and_grad(loss))(params)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(shared), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))
