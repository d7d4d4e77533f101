"""LLaMA-like decoder as one scan over its layers, with visual stacks added to the residual stream on the way.

What LLaMA's successors do otherwise is a field of `Decoder` that is off for LLaMA.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lmm_jax.models.attention.attention import attention, cached_attention
from lmm_jax.models.attention.context import bring_back, context_attention, share_out, ways
from lmm_jax.models.attention.on_mesh import SAVED
from lmm_jax.models.layers import (
    Dense,
    RMSNorm,
    check_multipliers,
    check_rope_axes,
    check_rope_scaling,
    contract,
    rope,
)
from lmm_jax.models.visual_tokens import take, take_blended
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
    """Keys and values of every layer, an explicit value, in and out: a ring that all rows write at one place.

    Rows of different lengths end at the same place and begin at different ones, so that a step writes its positions
    by one copy, whichever rows it serves, and a row that is done can be given to another prompt at any time. With
    room for eight positions, `end` at 3 and rows of 2, 5 and 1 positions, of which the oldest is 0:

        place     0  1  2 [3] 4  5  6  7
        row 0     .  0  1  .  .  .  .  .
        row 1     2  3  4  .  .  .  0  1
        row 2     .  .  0  .  .  .  .  .

    Where a position lies does not matter to attention, as its rotation is in its key.

    Attributes:
      k: `[L, B, N, size, d]`; heads first, as attention reads it. Or a tuple of `[1, B, N, size, d]`, one for each
        layer, where layers run one after the other instead of in a scan, see `Decoder.one_by_one`.
      v: like `k`.
      end: int scalar, the place that every row's next position is written to.
      length: `[B]` int, filled positions of each row, which lie before `end`, around the ring.
      next: `[B]` int, the number of each row's next position: its length, but less where a picture's positions have
        fewer numbers than there are of them, see `segments.positions`.
    """

    k: jax.Array | tuple[jax.Array, ...]
    v: jax.Array | tuple[jax.Array, ...]
    end: jax.Array
    length: jax.Array
    next: jax.Array

    @property
    def size(self) -> int:
        """Positions that a row has room for."""
        return jax.tree.leaves(self.k)[0].shape[3]

    @classmethod
    def empty(cls, decoder, rows, size, one_by_one=False):
        """A cache of a `Decoder` without any position: free rows. With `one_by_one` of arrays for each layer."""
        shape = (rows, decoder.kv_heads, size, decoder.head_width)
        if one_by_one:
            room = tuple(jnp.zeros((1, *shape), decoder.dtype) for _ in range(decoder.depth))
        else:
            room = jnp.zeros((decoder.depth, *shape), decoder.dtype)
        none = jnp.zeros(rows, jnp.int32)
        return cls(room, room, jnp.zeros((), jnp.int32), none, none)

    @classmethod
    def fill(cls, k, v, size, length, following=None):
        """A cache of `size` positions whose rows begin with `[L, B, T, N, d]` of the layers, `length` `[B]` of T.

        `following` is `next`, which is the length if it is None.
        """
        room = ((0, 0), (0, 0), (0, size - k.shape[2]), (0, 0))
        to_end = jax.vmap(lambda x, n: jnp.roll(jnp.pad(x, room), -n, axis=2), (1, 0), 1)
        k, v = (to_end(x.swapaxes(2, 3), length) for x in (k, v))
        return cls(k, v, jnp.zeros((), jnp.int32), length, length if following is None else following)

    def filled(self):
        """`[B, size]` bool: the places that hold a position of their row."""
        age = (self.end - 1 - jnp.arange(self.size)) % self.size
        return age < self.length[:, None]

    def append(self, k, v, after=None):
        """The cache with one more position a row, `[L, B, 1, N, d]` of all layers or a tuple of them: in place.

        Args:
          k, v: as those of the cache, but positions before heads.
          after: an array that is computed from all of the cache. What is written could be known before the last layer
            has read, and XLA would copy the cache to be safe; so the place is made to depend on this, by adding 0.
        """
        place = self.end
        if after is not None:
            place += jnp.minimum(jnp.isnan(after.reshape(-1)[0]).astype(jnp.int32), 0)

        def write(old, new):
            return jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(2, 3), place, axis=3)

        k, v = jax.tree.map(write, self.k, k), jax.tree.map(write, self.v, v)
        return KVCache(k, v, (self.end + 1) % self.size, jnp.minimum(self.length + 1, self.size), self.next + 1)

    def put(self, row, k, v, first, length, following):
        """The cache whose `row` holds `length` positions, `[L, N, T, d]` from `first` on; the others stay.

        The number of its next one is `following`.
        """
        age = (self.end - 1 - jnp.arange(self.size)) % self.size
        source = jnp.clip(first + length - 1 - age, 0, k.shape[2] - 1)

        def write(old, new):
            new = jnp.take(new, source, axis=2)[:, None]
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), row, axis=1)

        if isinstance(self.k, tuple):
            k, v = (tuple(x[n : n + 1] for n in range(len(x))) for x in (k, v))
        k, v = jax.tree.map(write, self.k, k), jax.tree.map(write, self.v, v)
        length, following = self.length.at[row].set(length), self.next.at[row].set(following)
        return KVCache(k, v, self.end, length, following)

    def resized(self, rows, size):
        """The cache with more rows, which are free, and more room in each."""
        more = rows - len(self.length)
        extra = ((0, 0), (0, more), (0, 0), (0, size - self.size), (0, 0))
        k, v = jax.tree.map(lambda x: jnp.pad(jnp.roll(x, -self.end, axis=3), extra), (self.k, self.v))
        length, following = (jnp.pad(x, (0, more)) for x in (self.length, self.next))
        return KVCache(k, v, jnp.asarray(self.size % size, jnp.int32), length, following)


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


def at_positions(stacks, slot, blend=None):
    """What stacks `[S, G, P, D]` add at the positions of slots `[G, R, T]`: `[S, G, R, T, D]`, zeros at text.

    With `blend`, `[G, R, T, 4]` each, it is made of several slots, see `visual_tokens.take_blended`.

    Looked up here once: inside the scan every layer would, on a TPU by a product with all P slots, which at eight
    pictures of DeepStack-L-HD is half as much as the layer's own. Where positions are shared out so are these.
    """
    if blend is None:
        added = jax.vmap(take, in_axes=(0, None))(stacks, slot)
    else:
        added = jax.vmap(take_blended, in_axes=(0, None, None))(stacks, *blend)
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
    rope_axes: tuple
    multipliers: tuple
    norm_eps: float
    dtype: str
    remat: str

    def __call__(self, h, layer, context):
        """Runs the layer.

        Args:
          h: `[G, R, T, D]`.
          layer: `(stack number, (k, v) of the cache [B, N, size, d] or None)`.
          context: dict of `position` `[G, R, T]`, or `[G, R, T, 3]` with `rope_axes`, and `segment` `[G, R, T]`, with
            `stacks` as `inject` takes them if there are any; over a cache also `filled` `[B, size]` bool, its places
            that hold a position.

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
        residual, of_scores = self.multipliers[1:3] if self.multipliers else (1.0, None)
        h = checkpoint_name(h, "layer_input")
        y = RMSNorm(self.norm_eps, name="attention_norm")(h)
        q = self._heads("q", self.heads, "heads")(y)
        k = self._heads("k", self.kv_heads, "kv_heads")(y)
        v = self._heads("v", self.kv_heads, "kv_heads")(y)
        if self.qk_norm:
            q = RMSNorm(self.norm_eps, name="q_norm")(q)
            k = RMSNorm(self.norm_eps, name="k_norm")(k)
        of_rope = context["position"], self.rope_theta, self.rope_scaling, self.rope_axes
        q, k = rope(q, *of_rope), rope(k, *of_rope)
        if of_scores is not None:  # which attention divides by the root of the width
            q *= jnp.asarray(of_scores * self.head_dim**0.5, q.dtype)
        q, k, v = (x.reshape(G * R, T, *x.shape[3:]) for x in (q, k, v))
        q = constrain(q, "batch", "length", "heads", None)
        if cache is None and ways(T) > 1:
            y = context_attention(q, k, v, context["segment"].reshape(G * R, T))
        elif cache is None:
            y = attention(q, k, v, context["segment"].reshape(G * R, T), causal=True)
        else:
            y = cached_attention(q, k, v, *cache, context["filled"], context["segment"].reshape(G * R, T))
        y = y.reshape(G, R, T, self.heads, self.head_dim)
        h += _times(self._dense("o", (D,), ("heads", "head_dim"), ("embed",))(y), residual)

        y = RMSNorm(self.norm_eps, name="mlp_norm")(h)
        gate = self._dense("gate", (self.mlp_dim,), ("embed",), ("mlp",))(y)
        up = self._dense("up", (self.mlp_dim,), ("embed",), ("mlp",))(y)
        h += _times(self._dense("down", (D,), ("mlp",), ("embed",))(nn.silu(gate) * up), residual)
        return constrain(h, "batch", None, "length", "act_embed"), (k, v)

    def _heads(self, name, heads, axis):
        """The map from the residual stream to queries, keys or values of so many heads."""
        return self._dense(name, (heads, self.head_dim), ("embed",), (axis, "head_dim"), self.qkv_bias)

    def _dense(self, name, features, inputs, outputs, use_bias=False):
        return Dense(features, inputs, outputs, use_bias, dtype=self.dtype, name=name)


def _times(x, factor):
    """`x` times a multiplier, in its dtype; 1 leaves no trace in the program."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


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
      rope_axes: `()`, or how many of the frequencies turn with each axis of a position that has three: time, row and
        column of what a picture shows, and thrice the same of text (Qwen3-VL), see `layers.rope_axis`.
      multipliers: `()`, or of (embeddings, what a layer adds, scores of attention, logits), as Granite has them; that
        of the scores takes the place of head_dim^-1/2, and the logits are divided by theirs.
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
    rope_axes: tuple[int, ...] = ()
    multipliers: tuple = ()
    norm_eps: float = 1e-5
    inject_layers: tuple[int, ...] = ()
    vocab_multiple: int = 128
    dtype: str = "float32"
    remat: str = "full"

    def setup(self):
        padded = self.padded_vocabulary
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
        check_rope_axes(tuple(self.rope_axes), self.head_width)
        check_multipliers(self.multipliers)

    @property
    def head_width(self) -> int:
        """Width of a head of attention, whether `head_dim` gives it or it follows from width and heads."""
        return self.head_dim or self.width // self.heads

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the token table."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def position_shape(self) -> tuple[int, ...]:
        """Shape of the position of one token: one number, or three."""
        return (3,) if self.rope_axes else ()

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
          context: see `Block`, but `stacks` as they lie over the bank, `[S, G, P, D]`, with `slot` `[G, R, T]` and
            if these are blended `blend_slot` and `blend_share` `[G, R, T, 4]`; or without `slot` as they lie over
            the positions, `[S, G, R, T, D]`.
          cache: keys and values `[L, B, N, size, d]` of positions that came before, which are only read; or None.

        Returns:
          Normalised `[G, R, T, D]`, and keys and values of its positions, `[L, G·R, T, N, d]`.
        """
        layers = (jnp.asarray(self.stack_numbers()), cache)
        shared = cache is None and ways(h.shape[2]) > 1
        of_h = ("batch", None, "length", "act_embed")
        context = dict(context)
        if shared:
            h = share_out(h, *of_h)
            context |= {
                name: share_out(context[name], *of_h[:3], *[None] * (context[name].ndim - 3))
                for name in ("position", "segment", "slot", "blend_slot", "blend_share")
                if name in context
            }
        if "stacks" in context and "slot" in context:
            blend = context.pop("blend_slot", None), context.pop("blend_share", None)
            blend = None if blend[0] is None else blend
            context["stacks"] = at_positions(context["stacks"], context.pop("slot"), blend)
        elif "stacks" in context and shared:
            context["stacks"] = share_out(context["stacks"], None, *of_h)
        h, keys_values = self.layers(self._enter(h), layers, context)
        if shared:
            h = bring_back(h, *of_h)
            keys_values = tuple(bring_back(x, None, "batch", "length", "kv_heads", None) for x in keys_values)
        return self.norm(h), keys_values

    def one_by_one(self, h, context, cache, layers):
        """As `__call__` with a cache, but layer after layer, each with arrays of its own.

        A scan takes a layer's parameters and its part of the cache out of arrays of all layers. On a CPU that copies
        them, which takes longer than all else of a decoding step, see lmm_jax/bench/README.md.

        Args:
          h, context: see `__call__`.
          cache: tuples of `[1, B, N, size, d]`, keys and values of each layer.
          layers: parameters of each layer: what `layers` of the decoder's has along its first axis, as a tuple.

        Returns:
          Normalised `[G, R, T, D]`, and tuples of the keys and values of its positions, `[1, G·R, T, N, d]`.
        """
        block, new, h = Block(**self.block_fields(), parent=None), [], self._enter(h)
        for params, k, v in zip(layers, *cache, strict=True):
            h, keys_values = block.apply({"params": params}, h, (-1, (k[0], v[0])), context)
            new.append([x[None] for x in keys_values])
        return self.norm(h), tuple(map(tuple, zip(*new, strict=True)))

    def _enter(self, h):
        """What the first layer takes of text and pictures alike."""
        return _times(h, self.multipliers[0]) if self.multipliers else h

    def to_head(self, h):
        """Hidden states as `head_matrix` takes them."""
        return _times(h, 1 / self.multipliers[3]) if self.multipliers else h

    def head_matrix(self, params):
        """The float32 matrix `[D, padded vocabulary]` that turns hidden states, after `to_head`, into logits.

        Args:
          params: the decoder's parameters, a nested dict.
        """
        return params["table"].T if self.tied else params["head"]["kernel"]

    def logits(self, h):
        """Float32 logits `[..., padded vocabulary]`; padded ids get the lowest float."""
        h = self.to_head(h)
        if self.tied:
            kernel = self.head_matrix({"table": self.table})
            logits = contract(h, kernel, ("embed",), ("vocab",), self.dtype).astype(jnp.float32)
        else:
            logits = self.head(h).astype(jnp.float32)
        real = jnp.arange(logits.shape[-1]) < self.vocab_size
        return jnp.where(real, logits, jnp.finfo(jnp.float32).min)
