"""The large multimodal model: encoder, projector, bank and stacks, decoder. Everything static-shaped and pure."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmm_jax import sharding
from lmm_jax.models.decoder import Decoder, KVCache
from lmm_jax.models.encoders import make_encoder
from lmm_jax.models.projector import Projector, shuffle
from lmm_jax.models.router import DensityRouter, Router
from lmm_jax.models.visual_tokens import bank, sample_strided, splice, take
from lmm_jax.reduction import factor_of, find_reduction
from lmm_jax.sharding import constrain


class LMM(nn.Module):
    """One model for every recipe; what differs is in the batch's index arrays and in these fields.

    Attributes:
      vision: the encoder, pictures to grids: the bank's, then finer or earlier ones that become stacks.
      projector: features to decoder width, by one path or by several.
      level_projectors: one for each further level of the encoder, of the same paths.
      decoder: the language model.
      scales: tokens per grid that the bank holds, M3's nested sets.
      reduction: how a grid becomes so many tokens, a name in `lmm_jax.reduction.REDUCTIONS`.
      newline: the bank ends with one learned vector, `image_newline`, for the ends of rows (LLaVA-NeXT).
      newline_in_stacks: every stack adds it there once more, as DeepStack-L-HD does; zeros otherwise.
      router: says how likely a question is answered right at each scale; None for a model without.
      density_router: says whether pictures need the largest scale; likewise.
      finer: n, where what the projector makes one token of is merged once more, n × n times as finely: each of the n²
        finer tokens that lie beneath a token of the bank is in a stack of its own (DeepStack-E). 0 for none.
      finer_projector: makes them, one path for each of the projector's; None without.
    """

    vision: nn.Module
    projector: Projector
    level_projectors: tuple[Projector, ...]
    decoder: Decoder
    scales: tuple[int, ...]
    reduction: str = "pool"
    newline: bool = False
    newline_in_stacks: bool = True
    router: Router | None = None
    density_router: DensityRouter | None = None
    finer: int = 0
    finer_projector: Projector | None = None

    @property
    def stack_strides(self) -> tuple[int, ...]:
        """Of each map that stacks are sampled from, by how much it is finer than the bank: n² stacks of each."""
        return (*self.vision.level_strides, *([self.finer] if self.finer else []))

    def setup(self):
        if self.newline:
            init = nn.with_logical_partitioning(nn.initializers.normal(self.decoder.width**-0.5), ("norm",))
            self.image_newline = self.param("image_newline", init, (self.decoder.width,), jnp.float32)

    def visual_tokens(self, pixels, gather=None, extent=None, scales=None):
        """Encodes the pictures of each pack to its bank and stacks.

        Args:
          pixels: `[G, V, H, W, 3]` uint8.
          gather: `[G, 1 + S, U, h, w]` int, index into the pack's V·h·w features for each bank cell and, cell for
            cell, for each stack; -1 = zeros. None takes every view as it stands and no stacks from tiles.
          extent: `[G, V, 2]` int, height and width of the picture in each view, pixels; None if they fill it.
          scales: as the field, which is the default.

        Returns:
          bank `[G, P, D]` and stacks `[S, G, P, D]`, those from tiles before those from the encoder's levels, or
          None without stacks.
        """
        paths, importance, _ = self.weighed_grids(pixels, gather, extent)
        return self._banks(paths, importance, scales)

    def _banks(self, paths, importance, scales):
        """Bank and stacks of what `weighed_grids` returned, see `visual_tokens`."""
        reduction, regions = find_reduction(self.reduction), []
        for scale in self.scales if scales is None else scales:
            factor = factor_of(scale, self.vision.grid, self.projector.shuffle)
            grids, side = paths[self.projector.shuffle.index(factor)], self.vision.grid // factor
            if importance is None:
                regions.append([bank(x, (scale,), side, reduction) for x in grids])
            else:  # of the stacks the cells that are chosen in the bank
                regions.append(bank(jnp.stack(grids), (scale,), side, reduction, importance))
        slots = [jnp.concatenate(of_scales, axis=-2) for of_scales in zip(*regions, strict=True)]
        banks = [self._bank(x, self.newline_in_stacks or not i) for i, x in enumerate(slots)]
        return banks[0], jnp.stack(banks[1:]) if len(banks) > 1 else None

    def grids(self, pixels, gather=None, extent=None) -> list:
        """Encodes and projects the pictures of each pack: what every number of visual tokens is made of.

        Arguments are those of `visual_tokens`.

        Returns:
          for each path of the projector its grids `[G, U, h, w, D]`: those of the bank, then those of each stack in
          its order.
        """
        return self.weighed_grids(pixels, gather, extent)[0]

    def weighed_grids(self, pixels, gather=None, extent=None):
        """As `grids`, and how important each of the bank's cells is if the reduction needs to know.

        Returns:
          what `grids` returns; `[G, U, h, w]` float32, 0 where a cell is empty, or None if it is not needed; and what
          a `DensityRouter` reads of each view, `[G, V', C]`, or None without one.
        """
        features, *levels = self._encode(pixels, extent)
        importance = None
        if find_reduction(self.reduction).needs_importance:
            importance = levels.pop()
            if gather is not None:
                importance = take(importance.reshape(len(importance), -1, 1), gather[:, 0])
            importance = importance[..., 0]
        h, w = features.shape[2:4]
        whole = None if gather is None else gather[:, :1]
        under = [
            (project, sample)
            for project, level, n in zip(self.level_projectors, levels, self.vision.level_strides, strict=True)
            for sample in sample_strided(level[:, :, : n * h, : n * w], n)
        ]
        paths = []
        for factor in self.projector.shuffle:
            grids = [*self._grids(self.projector, factor, features, gather)]
            for project, sample in under:
                grids += [*self._grids(project, factor, sample, whole)]
            if self.finer:
                rows, columns = (self.finer * side for side in grids[0].shape[2:4])
                (beneath,) = self._grids(self.finer_projector, factor // self.finer, features, whole)
                grids += [*sample_strided(beneath[:, :, :rows, :columns], self.finer)]
            paths.append(grids)
        pooled = None if self.density_router is None else self.density_router.pool(features)
        return paths, importance, pooled

    def _encode(self, pixels, extent):
        """Features `[G, V', h, w, C]` of the views, and of the encoder's levels; V' leaves out those regrouped.

        Where the reduction needs it, the last is how important each cell is, `[G, V', h, w, 1]`.
        """
        G, V, H, W = pixels.shape[:4]
        picture = 1 + self.vision.extra_views
        devices = sharding.ways("views")  # over which blank views make those of all packs divide
        room = ((0, 0), (0, -V % (picture * devices // math.gcd(devices, G))))
        pixels = jnp.pad(pixels, (*room, (0, 0), (0, 0), (0, 0))).reshape(-1, H, W, 3)
        extent = None if extent is None else jnp.pad(extent, (*room, (0, 0))).reshape(-1, 2)
        further = {"importance": True} if find_reduction(self.reduction).needs_importance else {}
        maps = self.vision(pixels, extent, **further)
        return [x.reshape(G, -1, *x.shape[1:])[:, : V // picture] for x in maps]

    def _grids(self, project, factor, features, gather):
        """Grids `[K, G, U, h / factor, …, D]` of features `[G, V, h, w, C]`, by `[G, K, U, h, w]` or as is."""
        if gather is None:
            return project(features, factor)[None]
        G, *_, C = features.shape
        rows = take(features.reshape(G, -1, C), gather.reshape(G, -1))
        rows = constrain(rows, "batch", "length", None)  # the projector's work is shared out like the decoder's
        grids = project(rows.reshape(*gather.shape, C), factor)
        there = shuffle((gather >= 0)[..., None], factor).all(axis=-1, keepdims=True)
        return jnp.where(there, grids, 0).swapaxes(0, 1)

    def _bank(self, slots, newline):
        if self.newline:
            last = self.image_newline.astype(slots.dtype) if newline else jnp.zeros_like(slots[0, 0])
            slots = jnp.concatenate([slots, jnp.broadcast_to(last, (slots.shape[0], 1, slots.shape[2]))], axis=1)
        return constrain(slots, "batch", None, "act_embed")

    def __call__(self, batch, scales=None):
        """Hidden states `[G, R, T, D]` of a batch of `lmm_jax.data.pipeline`; one without pixels is text alone.

        `scales` are those of the bank that the slots refer to, all of the model's if None.
        """
        visual, stacks = None, None
        if "pixels" in batch:
            visual, stacks = self._see(batch, scales)
        return self._decode(batch, visual, stacks)[0]

    def route(self, batch):
        """Hidden states as of a call, and what the router says of the batch's questions, see `data.questions`.

        Neither the encoder nor the decoder's table has a gradient of the latter.

        Returns:
          `[G, R, T, D]`, and logits `[G, Q, scales]` float32, or None without a router or without questions.
        """
        if self.density_router is not None and self.is_initializing():
            self.density_router(self.weighed_grids(batch["pixels"], batch.get("gather"), batch.get("extent"))[2])
        if self.router is None or "question" not in batch:
            return self(batch), None
        paths, importance, _ = self.weighed_grids(batch["pixels"], batch.get("gather"), batch.get("extent"))
        h = self._decode(batch, *self._banks(paths, importance, None))[0]
        return h, self._expect(paths[0][0], batch["question_grids"] > 0, batch["question"])

    def expect(self, grids, shown, question):
        """How likely the model finds a token of the true answer of a question at each of its scales.

        Args:
          grids: `[G, U, h, w, D]`, the bank's of `grids`, of the pictures of each of G questions.
          shown: `[G, U]` bool, False where a question has fewer grids.
          question: `[G, I]` int ids of `data.questions.read_questions`, -1 behind them.

        Returns:
          `[G, scales]` float32, 0 … 1.
        """
        return jax.nn.sigmoid(self._expect(grids, shown[:, None], question[:, None])[:, 0])

    def density(self, pooled):
        """Probability `[G]` that pictures need the largest scale, of what `weighed_grids` pooled, `[G, V, C]`."""
        return self.density_router(pooled)

    def _expect(self, grids, shown, question):
        """Logits `[G, Q, scales]` for questions `[G, Q, I]`; nothing but the router has a gradient of them."""
        words = self.decoder.embed(jnp.maximum(question, 0))
        return self.router(*map(jax.lax.stop_gradient, (grids, shown, words)), question >= 0)

    def logits(self, h):
        """Float32 logits of hidden states, see `Decoder.logits`."""
        return self.decoder.logits(h)

    def prefill(self, batch, size, scales):
        """Sees pictures and reads prompts, one row a pack, and fills a cache.

        Args:
          batch: as for training, with R = 1 and the prompt at the start of each row.
          size: positions of the cache, at least T.
          scales: bank scales that the slots refer to.

        Returns:
          Hidden states `[G, D]` of each prompt's last token, and the `KVCache`.
        """
        visual, stacks = self._see(batch, scales)
        h, (k, v) = self._decode(batch, visual, stacks)
        read = batch["segment"][:, 0] > 0
        length = read.sum(axis=-1)
        last = jnp.take_along_axis(h[:, 0], (length - 1)[:, None, None], axis=1)[:, 0]
        position = batch["position"][:, 0].reshape(*read.shape, -1).max(axis=-1)
        return last, KVCache.fill(k, v, size, length, jnp.where(read, position, -1).max(axis=-1) + 1)

    def read(self, batch, visual, cache=None, filled=None):
        """Reads positions whose visual vectors are known, after others or as the first ones of their rows.

        Args:
          batch: `id`, `slot`, `position` and `segment`, `[G, 1, T]`, positions also `[G, 1, T, 3]`; of the slots it
            counts which are none.
          visual: `[1 + S, G, 1, T, D]`, at the positions that have a slot what stands there, and what each stack
            adds; zeros elsewhere.
          cache: keys and values `[L, G, N, size, d]` that all segments of a row see; None for none.
          filled: `[G, size]` bool, the places of the cache that hold a position.

        Returns:
          Hidden states `[G, T, D]`, and keys and values `[L, G, N, T, d]`, heads first as in a cache.
        """
        h = jnp.where((batch["slot"] >= 0)[..., None], visual[0], self.decoder.embed(batch["id"]))
        h = constrain(h, "batch", None, "length", "act_embed")
        context = {"position": batch["position"], "segment": batch["segment"]}
        if len(visual) > 1:
            context["stacks"] = constrain(visual[1:], None, "batch", None, "length", "act_embed")
        if cache is not None:
            context["filled"] = filled
        h, (k, v) = self.decoder(h, context, cache)
        return h[:, 0], (k.swapaxes(2, 3), v.swapaxes(2, 3))

    def decode(self, tokens, cache, layers=None):
        """One more token a row: `[B]` ids to hidden states `[B, D]` and the longer cache.

        With `layers`, and a cache of arrays for each, they run one after the other, see `Decoder.one_by_one`.
        """
        h = self.decoder.embed(tokens[:, None, None])
        position = cache.next[:, None, None]
        if self.decoder.rope_axes:  # of text all three are the same
            position = jnp.stack([position] * 3, axis=-1)
        context = {
            "position": position,
            "segment": jnp.ones((len(tokens), 1, 1), jnp.int32),
            "filled": cache.filled(),
        }
        if layers is None:
            h, (k, v) = self.decoder(h, context, (cache.k, cache.v))
            return h[:, 0, 0], cache.append(k, v)
        h, (k, v) = self.decoder.one_by_one(h, context, (cache.k, cache.v), layers)
        return h[:, 0, 0], cache.append(k, v, after=h)

    def _see(self, batch, scales=None):
        return self.visual_tokens(batch["pixels"], batch.get("gather"), batch.get("extent"), scales)

    def _decode(self, batch, visual, stacks):
        slot = batch["slot"]
        h = self.decoder.embed(batch["id"])
        if visual is not None:
            blend = (batch["blend_slot"], batch["blend_share"]) if "blend_slot" in batch else None
            h = splice(h, visual, slot, blend)
        h = constrain(h, "batch", None, "length", "act_embed")
        context = {"position": batch["position"], "segment": batch["segment"], "slot": slot}
        if stacks is not None:
            context["stacks"] = stacks
            context |= {name: batch[name] for name in ("blend_slot", "blend_share") if name in batch}
        return self.decoder(h, context)


def build(config) -> LMM:
    """The model that `config.model` describes; each part's fields are the schema of its section.

    Raises:
      ValueError: an encoder that does not exist, or see `Decoder.check`.
    """
    common = {"dtype": config.dtype}
    vision = make_encoder(config)
    decoder = Decoder(**config.decoder, **common)
    decoder.check()
    router = Router(len(config.scales), **config.router, **common) if config.router.width else None
    density = DensityRouter(**config.density_router, **common) if config.density_router.width else None
    of_levels = {**config.projector, **{name: x for name, x in config.level_projector.items() if x is not None}}
    kinds = [config.projector, *[of_levels] * len(vision.level_strides)]
    projectors = [Projector(width=decoder.width, **fields, **common) for fields in kinds]
    finer = None
    if config.finer:
        merged = {"shuffle": tuple(factor // config.finer for factor in config.projector.shuffle)}
        finer = Projector(width=decoder.width, **of_levels | merged, **common)
    return LMM(
        vision,
        projectors[0],
        tuple(projectors[1:]),
        decoder,
        scales=tuple(config.scales),
        reduction=config.reduction,
        newline=config.newline,
        newline_in_stacks=config.newline_in_stacks,
        router=router,
        density_router=density,
        finer=config.finer,
        finer_projector=finer,
    )
