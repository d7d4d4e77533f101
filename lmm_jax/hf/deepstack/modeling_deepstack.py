"""DeepStack: LLaVA that adds what the tiles of a picture show to the hidden states before some decoder layers.

A picture comes as views: whole, its tiles row by row, and with `zoom` the zoomed tiles of each of these. Its visual
tokens and the stacks that lie over them, token for token, travel together, on the channel axis of one tensor.
"""

import functools
import inspect
import math

import torch
from torch import nn

from .configuration_deepstack import DeepStackConfig  # before the rest: it refuses a transformers that lacks it

# isort: split
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.utils.generic import can_return_tuple

# Names of tensors in the folder, and of parameters here. As that of LLaVA's folders, whose model type is known.
RENAMED = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector": "model.multi_modal_projector",
    r"^image_newline": "model.image_newline",
}


def mosaic(tiles, columns, rows):
    """Tiles `[..., rows · columns, g, g, C]` put together: `[..., rows · g, columns · g, C]`."""
    return tiles.unflatten(-4, (rows, columns)).transpose(-4, -3).flatten(-5, -4).flatten(-3, -2)


def sample(grid, columns, rows, sampling):
    """Takes a mosaic apart into columns · rows grids `[..., g, g, C]`, see `DeepStackConfig.sampling`."""
    height, width = grid.shape[-3] // rows, grid.shape[-2] // columns
    places = [(i, j) for i in range(rows) for j in range(columns)]
    if sampling == "2d":
        return [grid[..., i::rows, j::columns, :] for i, j in places]
    if sampling == "1d":
        cells = grid.flatten(-3, -2)
        return [cells[..., k :: len(places), :].unflatten(-2, (height, width)) for k in range(len(places))]
    return [grid[..., i * height : (i + 1) * height, j * width : (j + 1) * width, :] for i, j in places]


def inject(number, layer, args, kwargs):
    """Before a decoder layer runs: adds stack `number`, or none if it is None, at the visual tokens.

    Of `visual`, which the decoder hands to each of its layers and which no layer knows: positions `[B, T]` bool, and
    stacks `[N, D]`, N visual tokens in the order of the batch.
    """
    positions, stacks = kwargs.pop("visual", None) or (None, ())
    if number is None or not stacks:
        return args, kwargs
    hidden, *rest = args
    positions, stack = positions.to(hidden.device)[..., None], stacks[number].to(hidden)
    return (hidden + torch.zeros_like(hidden).masked_scatter(positions, stack), *rest), kwargs


class DeepStackModel(LlavaModel):
    """LLaVA's parts, and DeepStack's visual tokens."""

    config_class = DeepStackConfig

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.setdefault("key_mapping", RENAMED)
        return super().from_pretrained(*args, **kwargs)

    def __init__(self, config):
        super().__init__(config)
        if config.newline:
            width = config.text_config.hidden_size
            self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        numbers = {layer: number for number, layer in enumerate(config.inject_layers)}
        for index, layer in enumerate(self.language_model.layers):
            layer.register_forward_pre_hook(functools.partial(inject, numbers.get(index)), with_kwargs=True)

    def get_image_features(self, pixel_values, image_tilings, **kwargs):
        """Visual tokens of pictures, with what is added over them.

        Args:
          pixel_values: `[pictures, most views, 3, H, W]`; what a picture lacks in views is ignored.
          image_tilings: `[pictures, 2]` int, columns and rows of each picture's tiles, 0 if it has none.

        Returns:
          an output whose `pooler_output` has of each picture `[tokens, (1 + S) · D]`: token, stack 0, ….
        """
        zoom, tilings = self.config.zoom, image_tilings.tolist()
        zoomed = 1 + zoom**2 if zoom > 1 else 1
        counts = [(1 + columns * rows) * zoomed for columns, rows in tilings]
        views = torch.cat([own[:count] for own, count in zip(pixel_values, counts, strict=True)])
        grids = self.multi_modal_projector(self.encode(views))
        if self.config.regroup:
            counts = [1] * len(counts)
        arranged = [self.arrange(x, *tiling) for x, tiling in zip(grids.split(counts), tilings, strict=True)]
        return BaseModelOutputWithPooling(pooler_output=arranged)

    def encode(self, views):
        """Features `[V, g, g, C]` of views `[V, 3, H, W]`; with `regroup` of the whole pictures among them alone."""
        config = self.config
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)  # which it is depends on the version
        layers = tower.encoder.layers
        taken = inspect.signature(layers[0].forward).parameters
        masks = {name: None for name in ("attention_mask", "causal_attention_mask") if name in taken}
        end = range(len(layers) + 1)[config.vision_feature_layer]
        start, n = config.regroup or (end + 1, 0)
        hidden, stacks = tower.pre_layrnorm(tower.embeddings(views)), []
        side = math.isqrt(hidden.shape[1] - 1)
        for number in range(end + 1):
            if number == start:
                hidden = hidden.unflatten(0, (-1, 1 + n * n))
                tiles = hidden[:, 1:, 1:].unflatten(2, (side, side))
                stacks = [s.flatten(1, 2) for s in sample(mosaic(tiles, n, n), n, n, "2d")]
                hidden = hidden[:, 0]
            if 0 <= number - start < len(stacks):  # the class token receives nothing
                hidden = hidden + nn.functional.pad(stacks[number - start], (0, 0, 1, 0))
            if number < end:
                hidden = layers[number](hidden, **masks)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden[:, 1:].unflatten(1, (side, side))

    def arrange(self, grids, columns, rows):
        """What stands in the sequence for a picture, `[tokens, (1 + S) · D]`, of its grids `[views, g, g, D]`."""
        config, tiles = self.config, columns * rows
        units, stacks = grids, []
        if config.stacks == "samples":
            units, canvas = grids[:1], mosaic(grids[1:], columns, rows)
            stacks = [s[None] for s in sample(canvas, columns, rows, config.sampling)]
        elif config.stacks == "zoom":
            n, units = config.zoom, grids[: 1 + tiles]
            stacks = sample(mosaic(grids[1 + tiles :].unflatten(0, (-1, n * n)), n, n), n, n, "2d")
        blank = [torch.zeros_like(units)] * (len(config.inject_layers) - len(stacks))
        units = torch.cat([units, *stacks, *blank], dim=-1)
        tokens = units[0].flatten(0, 1)
        if config.sequence == "grid" and tiles:
            canvas = mosaic(units[1:], columns, rows)
            if config.newline:
                again = self.image_newline if config.newline_in_stacks else torch.zeros_like(self.image_newline)
                end = torch.cat([self.image_newline, *[again] * len(config.inject_layers)])
                canvas = torch.cat([canvas, end.to(canvas).expand(len(canvas), 1, -1)], dim=1)
            tokens = torch.cat([tokens, canvas.flatten(0, 1)])
        return tokens

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_tilings=None,
        inputs_embeds=None,
        mm_encoder_outputs=None,
        **kwargs,
    ):
        """As that of `DeepStackForConditionalGeneration`, up to the head."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        seen, visual = (mm_encoder_outputs or {}).get("image"), None
        if seen is None and pixel_values is not None:
            seen = self.get_image_features(pixel_values, image_tilings)
        if seen is not None:
            tokens, *stacks = (
                torch.cat(list(seen.pooler_output)).to(inputs_embeds).split(inputs_embeds.shape[-1], dim=-1)
            )
            positions = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=tokens)
            visual = positions[..., 0], stacks
            inputs_embeds = inputs_embeds.masked_scatter(positions, tokens)
        return self.language_model(inputs_embeds=inputs_embeds, visual=visual, **kwargs)


class DeepStackForConditionalGeneration(LlavaForConditionalGeneration):
    """DeepStack with its head. Stacks are added in the prefill; a step of decoding has no visual token.

    With transformers 4, as for every LLaVA there, beams need prompts of at most one picture: it mixes up several.
    """

    config_class = DeepStackConfig

    def __init__(self, config):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = DeepStackModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        kwargs.setdefault("key_mapping", RENAMED)
        return super().from_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_tilings=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        mm_encoder_outputs=None,
        **kwargs,
    ):
        """Logits, and the loss if there are labels.

        Args:
          input_ids: `[B, T]`, a placeholder for each visual token.
          pixel_values, image_tilings: pictures in the order of their placeholders, see `get_image_features`.
          mm_encoder_outputs: `{"image": get_image_features(…)}` in their place.
          others: as in `LlavaForConditionalGeneration`; the cache's name differs between versions of transformers.
        """
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_tilings=image_tilings,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.lm_head(out.last_hidden_state[:, kept]), None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        others = {name: value for name, value in out.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)
