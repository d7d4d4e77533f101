"""A model that answers from a list, for tests of the page: of what `lmm.load` returns, what the page asks for."""

import types

from lmm_jax.config import load_config, visual_layout
from lmm_jax.data.images import image_size
from lmm_jax.models.lmm import build


class Asked:
    """A stand-in for `generation.model.Model`.

    Attributes:
      calls: `(scale, options)` of each answer, in order.
      closed: how many answers have ended, or were given up.
    """

    def __init__(self, config, pieces=("six ", "and ", "two"), errors=()):
        config = load_config(config) if isinstance(config, str) else config
        self.program = types.SimpleNamespace(config=config, model=build(config.model))
        self.scales = tuple(config.model.scales)
        self.tokenizer = None  # which only text inside a picture's block asks for
        self.pieces, self.errors, self.calls, self.closed = pieces, dict(errors), [], 0
        self.auto = None

    def check_scale(self, scale):
        """As `Model.check_scale`."""
        visual_layout(self.program.config).token_grid(scale)
        return scale

    def visual_tokens(self, images, scale):
        """As `Model.visual_tokens`."""
        sizes = [image_size(image) for image in images]
        return int(visual_layout(self.program.config).tokens(sizes, scale).sum())

    def stream(self, images=None, prompt="", scale=None, **options):
        """As `Model.stream`: the pieces, or the error that stands for this scale; "auto" tries 1 and 9 tokens."""
        self.calls.append((scale, options))
        if scale in self.errors:
            raise self.errors[scale]
        try:
            yield from self.pieces
            return types.SimpleNamespace(visual_tokens=10 if scale == "auto" else scale, scale=9)
        finally:
            self.closed += 1
