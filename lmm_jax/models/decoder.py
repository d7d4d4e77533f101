"""LLaMA-like decoder as one scan over its layers, with visual stacks added to the residual stream on the way.

What LLaMA's successors do otherwise is a field of `Decoder` that is off for LLaMA.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lmm_jax.models.attention.attention import attention, cached_attention
from lmm_jax.models.attention.context import bring_back, context_attention, share_out, ways
from lmm_jax.models.attention.on_mesh import SAVED
from lmm_jax.models.layers import Dense, RMSNorm, check_rope_scaling, contract, rope
from lmm_jax.models.visual_tokens import take
from lmm_jax.sharding import constrain

# What a layer keeps for the backward pass beside its input, the most first: what is not kept is computed again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(),
        names_which_can_be_offloaded=("layer_input",),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@flax.struct.dataclass
class KVCache:
    """Keys and values of every layer: an explicit value, in and out.

    Attributes:
      k: `[L, B, N, size, d]`, the key of position t at index t; heads first, as attention reads it.
      v: like `k`.
      length: `[B]` int, filled positions of each row.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array

    @classmethod
    def fill(cls, k, v, size, length):
        """A cache of `size` positions, of which `[L, B, T, N, d]` of the layers are the first."""
        room = ((0, 0), (0, 0), (0, 0), (0, size - k.shape[2]), (0, 0))
        return cls(*(jnp.pad(x.swapaxes(2, 3), room) for x in (k, v)), length)

    def append(self, k, v):
        """The cache with one more position a row, `[L, B, 1, N, d]` of all layers: written at once, in place."""
        write = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=2), (1, 1, 0), 1)
        k, v = (write(old, new.swapaxes(2, 3), self.length) for old, new in ((self.k, k), (self.v, v)))
        return KVCache(k, v, self.length + 1)


def inject(h, added, number):
    """Adds stack `number` to the residual stream (DeepStack, section 3).

    Args:
      h: `[G, R, T, D]`.
      added: `[S, G, R, T, D]`, what each stack adds at each position, see `at_positions`.
      number: int scalar; nothing is added below 0, so that one scan body serves every layer.

    Returns:
      `[G, R, T, D]`.
    """
    one = jax.lax.dynamic_index_in_dim(added, jnp.maximum(number, 0), keepdims=False)
    return h + jnp.where(number >= 0, one, 0)


def at_positions(stacks, slot):
    """What stacks `[S, G, P, D]` add at the positions of slots `[G, R, T]`: `[S, G, R, T, D]`, zeros at text.

    Looked up here once: inside the scan every layer would, on a TPU by a product with all P slots, which at eight
    pictures of DeepStack-L-HD is half as much as the layer's own. Where positions are shared out so are these.
    """
    added = jax.vmap(take, in_axes=(0, None))(stacks, slot)
    return constrain(added, None, "batch", None, "length", "act_embed")


class Block(nn.Module):
    """One decoder layer: optional injection, grouped-query attention, SwiGLU.

    What is recomputed in the backward pass starts after the injection, which is linear and needs no value of its
    own there: neither a second lookup of the stack, nor the stacks in memory.

    The fields are those of `Decoder`, but `head_dim` is always the width of a head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    qk_norm: bool
    qkv_bias: bool
    rope_theta: float
    rope_scaling: tuple
    norm_eps: float
    dtype: str
    remat: str

    def __call__(self, h, layer, context):
        """Runs the layer.

        Args:
          h: `[G, R, T, D]`.
          layer: `(stack number, (k, v) of the cache [B, N, size, d] or None)`.
          context: dict of `position` and either `segment` `[G, R, T]`, with `stacks` as `inject` takes
            them if there are any, or `length` `[B]` when decoding one position over a cache.

        Returns:
          `h` and `(k, v)` of its positions, `[G·R, T, N, d]`.
        """
        number, cache = layer
        if "stacks" in context:
            h = inject(h, context["stacks"], number)
            context = {name: x for name, x in context.items() if name != "stacks"}
        transform = Block.transform
        if self.remat != "none":
            transform = nn.remat(transform, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        return transform(self, h, cache, context)

    @nn.compact
    def transform(self, h, cache, context):
        """The layer without injection; arguments and result are those of `__call__`."""
        G, R, T, D = h.shape
        h = checkpoint_name(h, "layer_input")
        y = RMSNorm(self.norm_eps, name="attention_norm")(h)
        q = self._heads("q", self.heads, "heads")(y)
        k = self._heads("k", self.kv_heads, "kv_heads")(y)
        v = self._heads("v", self.kv_heads, "kv_heads")(y)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, name="k_norm")(k)
        q = rope(q, context["position"], self.rope_theta, self.rope_scaling)
        k = rope(k, context["position"], self.rope_theta, self.rope_scaling)
        q, k, v = (x.reshape(G * R, T, *x.shape[3:]) for x in (q, k, v))
        q = constrain(q, "batch", "length", "heads", None)
        if cache is None and ways(T) > 1:
            y = context_attention(q, k, v, context["segment"].reshape(G * R, T))
        elif cache is None:
            y = attention(q, k, v, context["segment"].reshape(G * R, T), causal=True)
        else:
            y = cached_attention(q, k, v, *cache, context["length"])
        y = y.reshape(G, R, T, self.heads, self.head_dim)
        h += self._dense("o", (D,), ("heads", "head_dim"), ("embed",))(y)

        y = RMSNorm(self.norm_eps, name="mlp_norm")(h)
        gate = self._dense("gate", (self.mlp_dim,), ("embed",), ("mlp",))(y)
        up = self._dense("up", (self.mlp_dim,), ("embed",), ("mlp",))(y)
        h += self._dense("down", (D,), ("mlp",), ("embed",))(nn.silu(gate) * up)
        return constrain(h, "batch", None, "length", "act_embed"), (k, v)

    def _heads(self, name, heads, axis):
        """The map from the residual stream to queries, keys or values of so many heads."""
        return self._dense(name, (heads, self.head_dim), ("embed",), (axis, "head_dim"), self.qkv_bias)

    def _dense(self, name, features, inputs, outputs, use_bias=False):
        return Dense(features, inputs, outputs, use_bias, dtype=self.dtype, name=name)


class Decoder(nn.Module):
    """Token table, scanned layers, final norm and head.

    Attributes:
      vocab_size: pieces of the tokenizer; the table is padded to a multiple of `vocab_multiple`.
      width, depth, heads, kv_heads, mlp_dim: sizes; `kv_heads` below `heads` is grouped-query attention.
      head_dim: width of a head of attention; 0 = width / heads.
      tied: the head is the transposed token table and has no parameters of its own.
      qk_norm: each head's queries and keys pass an RMSNorm before they are rotated (Qwen3).
      qkv_bias: the maps to queries, keys and values have biases (Qwen2).
      rope_theta, norm_eps: constants of the checkpoint family.
      rope_scaling: of the rotary frequencies, `()` for none, see `layers.scale_frequencies`.
      inject_layers: stack s is added before layer `inject_layers[s]`; a layer past the last one drops its stack.
      vocab_multiple: so that the table divides over meshes; padded ids are never predicted.
      dtype: of the computation.
      remat: what a layer keeps for the backward pass: "none" everything, "dots" what matmuls and attention gave,
        "full" its input alone, and "offload" that in the host's memory.
    """

    vocab_size: int = 32000
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp_dim: int = 11008
    head_dim: int = 0
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()
    norm_eps: float = 1e-5
    inject_layers: tuple[int, ...] = ()
    vocab_multiple: int = 128
    dtype: str = "float32"
    remat: str = "full"

    def setup(self):
        padded = -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
        table = nn.with_logical_partitioning(nn.initializers.normal(self.width**-0.5), ("vocab", "embed"))
        self.table = self.param("table", table, (padded, self.width), jnp.float32)
        if not self.tied:
            self.head = Dense((padded,), ("embed",), ("vocab",), dtype=self.dtype)
        self.norm = RMSNorm(self.norm_eps)
        self.layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**self.block_fields())

    def check(self):
        """Raises ValueError for fields that contradict each other, naming them as fields of the config."""
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"model.decoder: width {self.width} does not divide into {self.heads} heads; set "
                "model.decoder.head_dim if heads have a width of their own"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.decoder: {self.heads} heads do not divide into groups for {self.kv_heads} kv_heads"
            )
        if self.head_width % 2:
            raise ValueError(f"model.decoder: heads have an odd width, {self.head_width}; rope wants an even one")
        check_rope_scaling(self.rope_scaling)

    @property
    def head_width(self) -> int:
        """Width of a head of attention, whether `head_dim` gives it or it follows from width and heads."""
        return self.head_dim or self.width // self.heads

    def block_fields(self) -> dict:
        """Fields of the `Block` that the scan repeats."""
        names = [f.name for f in dataclasses.fields(Block) if f.name not in ("parent", "name")]
        return {name: getattr(self, name) for name in names} | {"head_dim": self.head_width}

    def stack_numbers(self) -> np.ndarray:
        """`[L]` int32: number of the stack that is added before each layer, -1 for none."""
        numbers = np.full(self.depth, -1, np.int32)
        for stack, layer in enumerate(self.inject_layers):
            if layer < self.depth:
                numbers[layer] = stack
        return numbers

    def embed(self, tokens):
        """Token embeddings `[..., T, D]` of `[..., T]` ids; gathered in float32, see `visual_tokens.take`."""
        return self.table[tokens].astype(self.dtype)

    def __call__(self, h, context, cache=None):
        """Runs all layers and the final norm.

        Args:
          h: `[G, R, T, D]`.
          context: see `Block`, but `stacks` as they lie over the bank, `[S, G, P, D]`, with `slot` `[G, R, T]`.
          cache: `KVCache` when decoding.

        Returns:
          Normalised `[G, R, T, D]`, and keys and values of its positions, `[L, G·R, T, N, d]`.
        """
        layers = (jnp.asarray(self.stack_numbers()), None if cache is None else (cache.k, cache.v))
        shared = cache is None and ways(h.shape[2]) > 1
        of_h = ("batch", None, "length", "act_embed")
        context = dict(context)
        if shared:
            h = share_out(h, *of_h)
            context |= {n: share_out(context[n], *of_h[:3]) for n in ("position", "segment", "slot") if n in context}
        if "stacks" in context:
            context["stacks"] = at_positions(context["stacks"], context.pop("slot"))
        h, keys_values = self.layers(h, layers, context)
        if shared:
            h = bring_back(h, *of_h)
            keys_values = tuple(bring_back(x, None, "batch", "length", "kv_heads", None) for x in keys_values)
        return self.norm(h), keys_values

    def head_matrix(self, params):
        """The float32 matrix `[D, padded vocabulary]` that turns hidden states into logits.

        Args:
          params: the decoder's parameters, a nested dict.
        """
        return params["table"].T if self.tied else params["head"]["kernel"]

    def logits(self, h):
        """Float32 logits `[..., padded vocabulary]`; padded ids get the lowest float."""
        if self.tied:
            kernel = self.head_matrix({"table": self.table})
            logits = contract(h, kernel, ("embed",), ("vocab",), self.dtype).astype(jnp.float32)
        else:
            logits = self.head(h).astype(jnp.float32)
        real = jnp.arange(logits.shape[-1]) < self.vocab_size
        return jnp.where(real, logits, jnp.finfo(jnp.float32).min)
