"""DeepStack's configuration: LLaVA's, and where what the tiles of a picture show is added."""

import transformers

# What the other two files import, and how LLaVA's parts are put together, is so from this version on. They import
# this file before they import any of it.
LEAST = (4, 57)
if tuple(map(int, transformers.__version__.split(".")[:2])) < LEAST:
    raise ImportError(
        f"DeepStack's code needs transformers {'.'.join(map(str, LEAST))} or newer, and this is "
        f"{transformers.__version__}: pip install --upgrade transformers"
    )


class DeepStackConfig(transformers.LlavaConfig):
    """Configuration of `DeepStackForConditionalGeneration`.

    Attributes:
      inject_layers: stack s is added before decoder layer `inject_layers[s]`; a layer past the last one drops it.
      sequence: what of a picture stands in the sequence: "whole", the whole picture, or "grid", the whole picture and
        then the mosaic of its tiles row by row.
      stacks: what is added over it: "samples", the mosaic of the tiles, sampled; "zoom", of the whole picture and of
        each tile its own zoomed tiles, sampled; "encoder", tiles are stacked inside the vision tower.
      sampling: stack k = i · columns + j of a mosaic of (columns, rows) tiles is "2d": every (rows, columns)-th cell
        from (i, j); "1d": every (columns · rows)-th cell from k on, row by row; "grid": tile k.
      zoom: side, in tiles, of what a view is zoomed to; 1 = no zoom.
      newline: `image_newline` ends each row of the mosaic of a "grid".
      newline_in_stacks: each stack adds it there once more.
      regroup: (s, n) of stacks "encoder": n · n tiles run through s layers of the vision tower beside the whole
        picture, and before layer s + k their k-th sample is added to it.
    """

    model_type = "deepstack_llava"
    # Without annotations: so they are plain defaults, in transformers 5 too, whose configs are dataclasses.
    inject_layers = ()
    sequence = "whole"
    stacks = "samples"
    sampling = "2d"
    zoom = 1
    newline = False
    newline_in_stacks = True
    regroup = ()
