"""The router: how likely a question about pictures is answered right at each number of visual tokens.

It is a small head on what the model computes anyway. It reads the projected grids of the question's pictures, before
any number of tokens is made of them, and the words of the question, and gives a logit for each scale of the model:

    words of the question   [I, D]      norm, linear, GELU, softmax-pooled by a learned query   ->  asked
    cells of its pictures   [cells, D]  norm, linear, softmax-pooled by the queries of `asked`  ->  seen
    asked and seen, concatenated        norm, linear, GELU, linear, GELU, linear                ->  logits [scales]

The sigmoid of a logit is the probability that the model finds a token of the true answer at that scale: the geometric
mean over the answer's tokens, without the one that ends it. How it is learned, `training.loss.router_losses` says.

Granite-Docling's router is of the same kind, `DensityRouter`. It reads no question, and gives one logit, as it has
two scales: whether the pictures are so dense that they need the larger one.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lmm_jax.models.layers import Dense, LayerNorm


class Router(nn.Module):
    """See the module.

    Attributes:
      scales: of the model: as many logits.
      width: of what it computes with; 0 in a config means that the model has no router.
      heads: queries by which a question pools the cells.
      tokens: ids of a question that it is given at most, see `data.questions`.
      dtype: of the computation; the pooling weights and the logits are float32.
    """

    scales: int
    width: int = 0
    heads: int = 16
    tokens: int = 64
    dtype: str = "float32"

    @nn.compact
    def __call__(self, grids, shown, words, real):
        """Logits `[G, Q, scales]` float32 of Q questions in each of G packs.

        Args:
          grids: `[G, U, h, w, D]` of the packs' pictures, projected.
          shown: `[G, Q, U]` bool, the grids of each question's pictures; the logits of one without any mean nothing.
          words: `[G, Q, I, D]`, embeddings of each question's ids.
          real: `[G, Q, I]` bool, False behind a question.
        """
        G, U, h, w, D = grids.shape
        words = nn.gelu(self._dense("words", self.width, "embed", "mlp")(LayerNorm(name="words_norm")(words)))
        weights = _softmax(self._dense("word_query", 1, "mlp", "norm")(words)[..., 0], real)
        asked = jnp.einsum("gqi,gqid->gqd", weights, words) * real.any(axis=-1)[..., None]

        cells = LayerNorm(name="cells_norm")(grids.reshape(G, U * h * w, D))
        cells = self._dense("cells", self.width, "embed", "mlp")(cells)
        query = self._split(self._dense("query", self.width, "mlp", "embed")(asked))
        # A softmax does not see what is added to all keys.
        key = self._split(self._dense("key", self.width, "mlp", "embed", use_bias=False)(cells))
        value = self._split(self._dense("value", self.width, "mlp", "embed")(cells))
        weights = jnp.einsum("gqhd,gchd->gqhc", query, key) * (self.width // self.heads) ** -0.5
        weights = _softmax(weights, jnp.repeat(shown, h * w, axis=-1)[:, :, None])
        seen = jnp.einsum("gqhc,gchd->gqhd", weights, value).reshape(asked.shape)

        x = LayerNorm(name="norm")(jnp.concatenate([asked, seen], axis=-1))
        x = nn.gelu(self._dense("linear_0", 2 * self.width, "embed", "mlp")(x))
        x = nn.gelu(self._dense("linear_1", self.width, "mlp", "embed")(x))
        return self._dense("logits", self.scales, "embed", "norm")(x).astype(jnp.float32)

    def _dense(self, name, features, inputs, outputs, use_bias=True):
        return Dense((features,), (inputs,), (outputs,), use_bias, self.dtype, name=name)

    def _split(self, x):
        """`[..., width]` by heads."""
        return x.reshape(*x.shape[:-1], self.heads, -1)


class DensityRouter(nn.Module):
    """Whether pictures need the largest of a model's scales: from the encoder's features alone (Granite-Docling).

    Attributes:
      width: of its hidden layer; 0 in a config means that the model has none.
      threshold: probability from which on they do.
      dtype: of the computation.
    """

    width: int = 0
    threshold: float = 0.4
    dtype: str = "float32"

    def setup(self):
        self.attention = Dense((1,), ("embed",), ("norm",), True, self.dtype)
        self.norm = LayerNorm()
        self.linear_0 = Dense((self.width,), ("embed",), ("mlp",), True, self.dtype)
        self.linear_1 = Dense((1,), ("mlp",), ("norm",), True, self.dtype)

    def pool(self, features):
        """Softmax-pooled features `[..., C]` of each view's `[..., h, w, C]`."""
        cells = features.reshape(*features.shape[:-3], -1, features.shape[-1])
        weights = jax.nn.softmax(self.attention(cells).astype(jnp.float32), axis=-2)
        return (cells * weights.astype(cells.dtype)).sum(axis=-2)

    def __call__(self, pooled):
        """Probability `[...]` float32 that pictures of pooled views `[..., V, C]` need the largest scale."""
        x = nn.gelu(self.linear_0(self.norm(pooled.mean(axis=-2))), approximate=False)
        return jax.nn.sigmoid(self.linear_1(x)[..., 0].astype(jnp.float32))


def _softmax(weights, valid):
    """Softmax over the last axis among what is valid, in float32; uniform where nothing is."""
    masked = jnp.where(valid, weights.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(masked, axis=-1).astype(weights.dtype)
