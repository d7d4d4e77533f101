"""DeepStack's processor: pictures to views and to placeholders in the text."""

import math

import numpy as np
from PIL import Image, ImageOps

from .configuration_deepstack import LEAST  # noqa: F401 - before the rest: it refuses a transformers that lacks it

# isort: split
from transformers import LlavaProcessor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, make_flat_list_of_images
from transformers.processing_utils import MultiModalData


def to_rgb(picture):
    """An upright RGB picture; transparency is composited on white."""
    picture = ImageOps.exif_transpose(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def fit(picture, width, height):
    """A picture fitted into a black canvas, centred, its aspect ratio kept, the shorter side rounded up."""
    across, down = width / picture.width, height / picture.height
    if across < down:
        w, h = width, min(math.ceil(picture.height * across), height)
    else:
        w, h = min(math.ceil(picture.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize((w, h), Image.Resampling.BICUBIC), ((width - w) // 2, (height - h) // 2))
    return canvas


class DeepStackImageProcessor(BaseImageProcessor):
    """Pictures to views: whole, tiles row by row, and with `zoom` the zoomed tiles of each of these.

    Attributes:
      size: `{"height": pixels, "width": pixels}` of a view, which is square.
      crop_size: the same, for programs that look there.
      patch_size: side of the pixels that one visual token stands for.
      tilings: (columns, rows) of tiles; a picture gets those that keep most of it, the earlier ones of equals.
      aspect: of a tiled picture: "stretch", not kept, or "anyres", kept, on a black canvas.
      zoom, sequence, newline: as in `DeepStackConfig`.
      image_mean, image_std: RGB, in 0..1.
    """

    model_input_names = ["pixel_values", "image_tilings"]  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        size=None,
        patch_size=14,
        tilings=(),
        aspect="stretch",
        zoom=1,
        sequence="whole",
        newline=False,
        image_mean=OPENAI_CLIP_MEAN,
        image_std=OPENAI_CLIP_STD,
        crop_size=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size = size or {"height": 336, "width": 336}
        self.crop_size = crop_size or dict(self.size)
        self.patch_size = patch_size
        self.tilings = tilings
        self.aspect = aspect
        self.zoom = zoom
        self.sequence = sequence
        self.newline = newline
        self.image_mean = image_mean
        self.image_std = image_std

    def preprocess(self, images, return_tensors=None, **kwargs):
        """Views of pictures.

        Args:
          images: pictures, paths or links, in any nesting; other keywords are ignored.
          return_tensors: "np" or "pt".

        Returns:
          `pixel_values` `[pictures, most views, 3, height, width]` float32, zeros where a picture has fewer views,
          and `image_tilings` `[pictures, 2]`, columns and rows of its tiles, 0 if it has none.
        """
        pictures = [to_rgb(to_pil_image(x)) for x in make_flat_list_of_images(self.fetch_images(images))]
        tilings = [self.tiling(*picture.size) for picture in pictures]
        views = [self.views(picture, *tiling) for picture, tiling in zip(pictures, tilings, strict=True)]
        side = self.size["height"]
        pixels = np.zeros((len(views), max(map(len, views)), 3, side, side), np.float32)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        for own, seen in zip(pixels, views, strict=True):
            own[: len(seen)] = ((seen.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
        return BatchFeature({"pixel_values": pixels, "image_tilings": np.array(tilings)}, tensor_type=return_tensors)

    def tiling(self, width, height):
        """(columns, rows) of the tiles of a picture, sizes in pixels."""
        side = self.size["height"]

        def kept(tiling):
            w, h = tiling[0] * side, tiling[1] * side
            scale = min(w / width, h / height)
            area = min(int(width * scale) * int(height * scale), width * height)
            return area, area - w * h

        return max(self.tilings, key=kept, default=(0, 0))

    def views(self, picture, columns, rows):
        """`[views, side, side, 3]` uint8 of an RGB picture."""
        side, views = self.size["height"], []
        for zoom in (1, self.zoom) if self.zoom > 1 else (1,):
            for across, down in ((1, 1), (columns, rows)) if columns else ((1, 1),):
                width, height = across * zoom * side, down * zoom * side
                if self.aspect == "anyres" and (across, down) != (1, 1):
                    canvas = fit(picture, width, height)
                else:
                    canvas = picture.resize((width, height), Image.Resampling.BICUBIC)
                cells = np.asarray(canvas).reshape(down, zoom, side, across, zoom, side, 3)
                views.append(cells.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, side, side, 3))
        return np.concatenate(views)

    def tokens(self, columns, rows):
        """Visual tokens of a picture of so many tiles."""
        g = self.size["height"] // self.patch_size
        mosaic = rows * g * (columns * g + self.newline) if self.sequence == "grid" else 0
        return g * g + mosaic

    def count_views(self, columns, rows):
        """Views of a picture of so many tiles."""
        return (1 + columns * rows) * (1 + self.zoom**2 if self.zoom > 1 else 1)


class DeepStackProcessor(LlavaProcessor):
    """Opens each `<image>` in a text to a placeholder for each of the picture's visual tokens, and tokenises."""

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """The placeholders of picture number `image_idx` of what the image processor made."""
        return self.image_token * self.image_processor.tokens(*map(int, image_inputs["image_tilings"][image_idx]))

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Placeholders and views of pictures of sizes `(height, width)`, for programs that plan before they read."""
        if image_sizes is None:
            return MultiModalData()
        see = self.image_processor
        tilings = [see.tiling(width, height) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[see.tokens(*tiling) for tiling in tilings],
            num_image_patches=[see.count_views(*tiling) for tiling in tilings],
        )

    def __call__(self, images=None, text=None, videos=None, audio=None, **kwargs):
        """Inputs of `DeepStackForConditionalGeneration`.

        Args:
          images: pictures, in the order of their `<image>`, in any nesting.
          text: str or a list of str.
          videos, audio: must be None.
          kwargs: of the tokenizer, and `return_tensors`; also inside `text_kwargs` or `common_kwargs`.

        Raises:
          ValueError: the text has not as many `<image>` as there are pictures, or it was cut inside a picture.
        """
        if videos is not None or audio is not None:
            raise ValueError("DeepStack takes pictures and text, no videos and no audio")
        if hasattr(LlavaProcessor, "replace_image_token"):  # from transformers 5 on its own call asks for it
            return super().__call__(images=images, text=text, **kwargs)
        kwargs.pop("images_kwargs", None)
        options = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("text_kwargs", {}), **kwargs}
        return_tensors = options.pop("return_tensors", None)
        data = {} if images is None else dict(self.image_processor(images))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            pictures = len(data.get("image_tilings", ()))
            named = sum(one.count(self.image_token) for one in texts)
            if named != pictures:
                raise ValueError(f"{named} {self.image_token} tokens in the text, {pictures} pictures")
            opened = iter([self.replace_image_token(data, index) for index in range(pictures)])
            texts = [self.open(one, opened) for one in texts]
            encoded = self.tokenizer(texts, **options)
            self._check_special_mm_tokens(texts, encoded, modalities=["image"])
            data = {**encoded, **data}
        return BatchFeature(data, tensor_type=return_tensors)

    def open(self, text, opened):
        """A text with the next of `opened` for each `<image>`."""
        first, *rest = text.split(self.image_token)
        return first + "".join(next(opened) + part for part in rest)
