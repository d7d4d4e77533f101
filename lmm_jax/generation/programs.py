"""The device's part of generation: a handful of programs, compiled once for each size of what they work on.

    see      pictures to grids of visual vectors, before any number of tokens is chosen
    expect   what the router expects of each number of tokens, where there is one
    read     prompts, packed into a row as segments, to their keys and values
    read_on  the rest of a prompt whose beginning was read before
    put      a prompt that was read into a free row of the batch
    decode   so many more tokens in every row of the batch

Everything that may differ from request to request is a traced value: lengths, limits, options of sampling, seeds.
"""

import collections
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax import sharding
from lmm_jax.generation import sampling
from lmm_jax.generation.sampling import Options
from lmm_jax.models.decoder import KVCache
from lmm_jax.sharding import constrain

CHUNK = 64  # tokens of a row that `decode` gives at most at a time


@flax.struct.dataclass
class Rows:
    """The batch that is being decoded: B rows, each a request or free.

    Attributes:
      cache: `KVCache` of everything read and drawn so far, but for the newest token of a row that is done.
      hidden: `[B, D]`, the last hidden state of each row, which the next token is drawn from.
      left: `[B]` int, tokens that may still be drawn; 0 = free or done.
      drawn: `[B]` int, tokens drawn so far.
      seen: `[B, vocabulary]` bool, tokens of the prompt and of the answer so far.
      options: `sampling.Options`.
    """

    cache: KVCache
    hidden: jax.Array
    left: jax.Array
    drawn: jax.Array
    seen: jax.Array
    options: Options


class Programs:
    """The compiled programs of a model.

    On a single CPU device layers are decoded one after the other, see `Decoder.one_by_one`; elsewhere in a scan.

    Attributes:
      stacks: what is added to the residual stream beside the bank, S.
    """

    def __init__(self, program, params):
        self._program, self._params = program, params
        model = program.model
        self.stacks = len(model.decoder.inject_layers)
        self._one = sharding.replicated(program.mesh)
        self._layers = _split(params["decoder"]["layers"], self._one) if _is_cpu(program.mesh) else None
        self._see = jax.jit(functools.partial(_see, model), out_shardings=self._one)
        self._score = jax.jit(functools.partial(_score, model), out_shardings=self._one)
        self._expect = jax.jit(functools.partial(_expect, model), out_shardings=self._one)
        self._density = jax.jit(functools.partial(_density, model), out_shardings=self._one)
        self._of_rows = {}

    def compiled(self) -> dict[str, int]:
        """How many programs of each kind were compiled so far."""
        once = {"see": self._see, "score": self._score, "expect": self._expect, "density": self._density}
        found = collections.Counter({name: program._cache_size() for name, program in once.items()})
        for programs in self._of_rows.values():
            found.update({name: program._cache_size() for name, program in programs.items()})
        return dict(found)

    def _for(self, rows):
        """The programs that give arrays of so many rows: those lie over the batch axes, heads over theirs.

        Where the arrays lie is said here, so that what one program gives is what the others were compiled for.
        """
        if rows not in self._of_rows:
            model, mesh, one = self._program.model, self._program.mesh, self._one
            decoder = model.decoder
            shape = (decoder.depth, rows, decoder.kv_heads, 1, decoder.head_width)
            spec = sharding.partition(shape, None, "batch", "kv_heads", None, None)
            keys = one if spec is None else jax.NamedSharding(mesh, spec)
            cache = KVCache(keys, keys, one, one, one)  # the same for each layer, where they have arrays of their own
            state = Rows(cache, one, one, one, one, Options(one, one, one, one, one))
            # A function of its own each, as JAX counts the programs of equal ones together.
            self._of_rows[rows] = {
                "read": jax.jit(functools.partial(_read, model), out_shardings=(one, (keys, keys))),
                "read_on": jax.jit(
                    functools.partial(_read_on, model), static_argnums=5, out_shardings=(one, (keys, keys))
                ),
                "free": jax.jit(
                    functools.partial(_free, model, self._layers is not None),
                    static_argnums=(0, 1),
                    out_shardings=state,
                ),
                "resize": jax.jit(functools.partial(_resize), static_argnums=(1, 2), out_shardings=state),
                "put": jax.jit(functools.partial(_put), donate_argnums=0, out_shardings=state),
                "decode": jax.jit(
                    functools.partial(_decode, model), donate_argnums=1, out_shardings=(state, one, one)
                ),
            }
        return self._of_rows[rows]

    def see(self, pixels, gather, extent):
        """Grids `[1 + S, G, U, h, w, D]` of pictures by each path, and importances: `LMM.weighed_grids`."""
        with self._program.use():
            return self._see(self._params, pixels, gather, extent)

    def expect(self, grids, shown, question):
        """What the router expects of each scale, see `LMM.expect`."""
        with self._program.use():
            return self._expect(self._params, grids, shown, question)

    def density(self, pooled):
        """Probability that pictures need the largest scale, see `LMM.density`."""
        with self._program.use():
            return self._density(self._params, pooled)

    def read(self, batch, visual):
        """See `LMM.read`: hidden states `[G, T, D]`, keys and values `[L, G, N, T, d]`."""
        with self._program.use():
            return self._for(len(batch["id"]))["read"](self._params, batch, visual)

    def read_on(self, batch, visual, before, length, size):
        """Reads a prompt from position `length` on.

        Args:
          batch, visual: of what is new, one row of one segment, see `LMM.read`.
          before: `(k, v)`, `[L, 1, N, P, d]` of the positions before, of which the first `length` count.
          length: int.
          size: static, P and what is new, or more.

        Returns:
          Hidden states `[1, T, D]` of what is new, keys and values `[L, 1, N, size, d]` of the whole.
        """
        with self._program.use():
            return self._for(1)["read_on"](self._params, batch, visual, before, length, size)

    def score(self, batch, visual, before, length, targets):
        """Log-probabilities `[T]` of the ids `targets` `[T]` behind each position of a row, as of `read_on`."""
        with self._program.use():
            return self._score(self._params, batch, visual, before, length, targets)

    def free(self, rows, size) -> Rows:
        """`rows` free rows with room for `size` positions."""
        with self._program.use():
            return self._for(rows)["free"](rows, size)

    def resize(self, state, rows, size) -> Rows:
        """More free rows, or more room in each."""
        with self._program.use():
            return self._for(rows)["resize"](state, rows, size)

    def put(self, state, row, prompt, ids, limit, options) -> Rows:
        """Gives a free row to a prompt that was read.

        Args:
          state: `Rows`, which is used up.
          row: its number.
          prompt: `(hidden [G, T, D], (k, v) [L, G, N, P, d], g, last, first, length, following)`: it is `length`
            positions of the keys and values of row g from `first` on; its last hidden state is number `last`, and the
            next position has the number `following`.
          ids: `[size]` int of the prompt, -1 elsewhere.
          limit: tokens of the answer.
          options: `sampling.Options` of scalars.
        """
        with self._program.use():
            return self._for(len(state.left))["put"](state, row, prompt, ids, limit, options)

    def decode(self, state, steps, end, alive):
        """Draws up to `steps` tokens, at most `CHUNK`, in every row that has some left, until none has.

        Args:
          state: `Rows`, which is used up.
          steps: int.
          end: id after which a row is done.
          alive: `[B]` bool, False for rows that nobody waits for any more.

        Returns:
          The new `Rows`; ids `[B, CHUNK]`, -1 behind the last of a row; their log-probabilities `[B, CHUNK]`.
        """
        with self._program.use():
            return self._for(len(state.left))["decode"](self._params, state, steps, end, alive, self._layers)


def _see(model, params, pixels, gather, extent):
    paths, importance, pooled = model.apply({"params": params}, pixels, gather, extent, method="weighed_grids")
    return tuple(map(jnp.stack, paths)), importance, pooled


def _expect(model, params, grids, shown, question):
    return model.apply({"params": params}, grids, shown, question, method="expect")


def _density(model, params, pooled):
    return model.apply({"params": params}, pooled, method="density")


def _read(model, params, batch, visual):
    return model.apply({"params": params}, batch, visual, method="read")


def _read_on(model, params, batch, visual, before, length, size):
    h, new = _read_behind(model, params, batch, visual, before, length)

    def join(old, new):
        old = jnp.pad(old, ((0, 0), (0, 0), (0, 0), (0, size - old.shape[3]), (0, 0)))
        # Padding behind what is new may reach past the end, and must not move what is written to the left.
        room = jnp.pad(old, ((0, 0), (0, 0), (0, 0), (0, new.shape[3]), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(room, new, length, axis=3)[:, :, :, :size]

    return h, tuple(join(old, x) for old, x in zip(before, new, strict=True))


def _read_behind(model, params, batch, visual, before, length):
    filled = (jnp.arange(before[0].shape[3]) < length)[None]
    return model.apply({"params": params}, batch, visual, before, filled, method="read")


def _score(model, params, batch, visual, before, length, targets):
    h, _ = _read_behind(model, params, batch, visual, before, length)
    logits = model.apply({"params": params}, h[0], method="logits")
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=-1)[:, 0]


def _is_cpu(mesh):
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _split(stacked, sharding):
    """Parameters of each layer: on a CPU the same memory, where JAX takes it as it lies."""
    stacked = jax.tree.map(np.asarray, stacked)

    def layer(n):
        return jax.tree.map(lambda x: jax.device_put(x[n], sharding, may_alias=True), stacked)

    return tuple(layer(n) for n in range(len(jax.tree.leaves(stacked)[0])))


def _free(model, one_by_one, rows, size):
    decoder, none = model.decoder, jnp.zeros(rows, jnp.int32)
    seen = jnp.zeros((rows, decoder.padded_vocabulary), bool)
    hidden = jnp.zeros((rows, decoder.width), decoder.dtype)
    return Rows(KVCache.empty(decoder, rows, size, one_by_one), hidden, none, none, seen, Options.greedy(rows))


def _resize(state, rows, size):
    extra = rows - len(state.left)

    def more(x):
        return jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1))

    others = jax.tree.map(more, state.replace(cache=None))
    return others.replace(cache=state.cache.resized(rows, size))


def _put(state, row, prompt, ids, limit, options):
    hidden, (k, v), g, last, first, length, following = prompt
    seen = (
        jnp.zeros(state.seen.shape[1:], bool).at[jnp.where(ids >= 0, ids, len(state.seen[0]))].set(True, mode="drop")
    )
    return Rows(
        cache=state.cache.put(row, k[:, g], v[:, g], first, length, following),
        hidden=state.hidden.at[row].set(hidden[g, last]),
        left=state.left.at[row].set(limit),
        drawn=state.drawn.at[row].set(0),
        seen=state.seen.at[row].set(seen),
        options=jax.tree.map(lambda old, new: old.at[row].set(new), state.options, options),
    )


def _decode(model, params, state, steps, end, alive, layers):
    rows = jnp.arange(len(state.left))
    nothing = jnp.full((len(rows), CHUNK), -1, jnp.int32), jnp.zeros((len(rows), CHUNK), jnp.float32)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < steps) & (state.left > 0).any()

    def step(carry):
        i, state, ids, logprobs = carry
        active = state.left > 0
        logits = model.apply({"params": params}, state.hidden, method="logits")
        logits = constrain(logits, "batch", None)
        new, logprob = sampling.draw(logits, state.seen, state.drawn, state.options)
        hidden, cache = model.apply({"params": params}, new, state.cache, layers, method="decode")
        state = Rows(
            cache=cache,
            hidden=hidden,
            left=jnp.where(active & (new != end), state.left - 1, 0),
            drawn=state.drawn + active,
            seen=state.seen.at[rows, new].set(True),
            options=state.options,
        )
        ids = ids.at[:, i].set(jnp.where(active, new, -1))
        return i + 1, state, ids, logprobs.at[:, i].set(logprob)

    state = state.replace(left=jnp.where(alive, state.left, 0))
    _, state, ids, logprobs = jax.lax.while_loop(unfinished, step, (jnp.zeros((), jnp.int32), state, *nothing))
    return state, ids, logprobs
