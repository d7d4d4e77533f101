"""The large multimodal model: encoder, projector, bank and stacks, decoder. Everything static-shaped and pure."""

import flax.linen as nn
import jax.numpy as jnp

from lmm_jax.models.decoder import Decoder, KVCache
from lmm_jax.models.visual_tokens import Projector, bank, splice, take
from lmm_jax.models.vit import ViT
from lmm_jax.sharding import constrain


class LMM(nn.Module):
    """One model for every recipe; what differs is in the batch's index arrays and in these fields.

    Attributes:
      vision: the encoder, pictures to grids.
      projector: features to decoder width.
      decoder: the language model.
      scales: tokens per grid that the bank holds, M3's nested sets.
    """

    vision: nn.Module
    projector: Projector
    decoder: Decoder
    scales: tuple[int, ...]

    def visual_tokens(self, pixels, source=None, scales=None):
        """Encodes the pictures of each pack to its bank and stacks.

        Args:
          pixels: `[G, V, H, W, 3]` uint8.
          source: `[G, 1 + S, U, g, g]` int, index into the pack's V·h·w features for each bank cell and, cell for
            cell, for each stack; -1 = zeros. None takes every view as it stands and no stacks.
          scales: as the field, which is the default.

        Returns:
          bank `[G, P, D]` and stacks `[S, G, P, D]`, or None without stacks.
        """
        G, V = pixels.shape[:2]
        scales = self.scales if scales is None else scales
        features = self.vision(pixels.reshape(G * V, *pixels.shape[2:]))
        features = features.reshape(G, V, *features.shape[1:])
        if source is None:
            grids = self.projector(features)[None]
        else:
            features = take(features.reshape(G, -1, features.shape[-1]), source.reshape(G, -1))
            grids = self.projector(features.reshape(*source.shape, -1))
            grids = jnp.where((source >= 0)[..., None], grids, 0).swapaxes(0, 1)
        banks = jnp.stack([constrain(bank(x, scales), "batch", None, "act_embed") for x in grids])
        return banks[0], banks[1:] if len(banks) > 1 else None

    def __call__(self, batch):
        """Hidden states `[G, R, T, D]` of a batch of `lmm_jax.data.pipeline`; one without pixels is text alone."""
        visual, stacks = None, None
        if "pixels" in batch:
            visual, stacks = self.visual_tokens(batch["pixels"], batch.get("source"))
        return self._decode(batch, visual, stacks)[0]

    def logits(self, h):
        """Float32 logits of hidden states, see `Decoder.logits`."""
        return self.decoder.logits(h)

    def prefill(self, batch, size, scales):
        """Reads prompts, one row a pack, and fills a cache.

        Args:
          batch: as for training, with R = 1 and the prompt at the start of each row.
          size: positions of the cache, at least T.
          scales: bank scales that the slots refer to.

        Returns:
          Logits `[G, vocabulary]` after each prompt's last token, and the `KVCache`.
        """
        visual, stacks = self.visual_tokens(batch["pixels"], batch.get("source"), scales)
        h, (k, v) = self._decode(batch, visual, stacks)
        length = (batch["segment"][:, 0] > 0).sum(axis=-1)
        last = jnp.take_along_axis(h[:, 0], (length - 1)[:, None, None], axis=1)[:, 0]
        room = ((0, 0), (0, 0), (0, size - k.shape[2]), (0, 0), (0, 0))
        return self.logits(last), KVCache(jnp.pad(k, room), jnp.pad(v, room), length)

    def decode(self, tokens, cache):
        """One more token a row: `[B]` ids to logits `[B, vocabulary]` and the longer cache."""
        h = self.decoder.embed(tokens[:, None, None])
        context = {"position": cache.length[:, None, None], "length": cache.length}
        h, (k, v) = self.decoder(h, context, cache)
        return self.logits(h[:, 0, 0]), KVCache(k, v, cache.length + 1)

    def _decode(self, batch, visual, stacks):
        slot = batch["slot"]
        G = slot.shape[0]
        h = self.decoder.embed(batch["id"])
        if visual is not None:
            h = splice(h.reshape(G, -1, h.shape[-1]), visual, slot.reshape(G, -1)).reshape(h.shape)
        h = constrain(h, "batch", None, "length", "act_embed")
        context = {"position": batch["position"], "segment": batch["segment"], "slot": slot}
        if stacks is not None:
            context["stacks"] = stacks
        return self.decoder(h, context)


def build(config) -> LMM:
    """The model that `config.model` describes; each part's fields are the schema of its section.

    Raises:
      ValueError: scales that do not tile the encoder's grid, or heads that do not divide the width.
    """
    common = {"dtype": config.dtype}
    vision = ViT(**config.vision, **common)
    decoder = Decoder(**config.decoder, **common)
    for name, part in (("vision", vision), ("decoder", decoder)):
        if part.width % part.heads:
            raise ValueError(f"model.{name}: width {part.width} does not divide into {part.heads} heads")
    projector = Projector(width=decoder.width, **config.projector, **common)
    return LMM(vision, projector, decoder, scales=tuple(config.scales))
