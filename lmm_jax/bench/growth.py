"""How the training step's time grows with visual tokens and with resolution."""

import dataclasses
import json
import os

import jax
import numpy as np

from lmm_jax import sharding
from lmm_jax.aot.flops import step_flops
from lmm_jax.bench.measure import Measurement
from lmm_jax.bench.shape import load_shape, model_config, side, synthetic_batch
from lmm_jax.bench.train import time_train
from lmm_jax.training.state import make_program

RESOLUTIONS = (0.5, 1.0, 1.5)  # of the shape's
DEPTHS = (1, 1, 3, 1, 1)  # of the ConvNeXt beside the shape's ViT; its last stage is as wide as the ViT


@dataclasses.dataclass(frozen=True)
class Point:
    """A step: `x` in the unit that `series` names, visual tokens or pixels a picture, its `seconds` and `flops`."""

    series: str
    x: int
    seconds: float
    flops: int


def bench_growth(name, dtype, folder, steps=5, checkpoint=False) -> list[Measurement]:
    """Times the training step at each of a shape's scales, and with growing pictures at one visual token.

    Linear in a picture's pixels is a ConvNeXt; a ViT's attention grows with their square. In visual tokens the
    decoder is linear but for its attention.

    Args:
      name: of a shape, or its file.
      dtype: of the computation.
      folder: of `growth.json`, the points, which `plots.draw_growth` draws; made if it is not there.
      steps: timed steps.
      checkpoint: recomputes layers in the backward pass.

    Returns:
      Rows of the points, each series ending with how far it is from a line, and how far all are from one over
      operations.
    """
    shape = load_shape(name)
    points = [*tokens_points(shape, dtype, steps, checkpoint), *pixels_points(shape, dtype, steps, checkpoint)]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "growth.json"), "w") as f:
        json.dump([dataclasses.asdict(point) for point in points], f, indent=1)
    rows = []
    for series in dict.fromkeys(point.series for point in points):
        mine = [point for point in points if point.series == series]
        rows += [Measurement(f"{series} {p.x:,}", p.seconds, "s", None, f"{p.flops / 1e12:.3g} TFLOP") for p in mine]
        for x, over in (([p.x for p in mine], series), ([p.flops for p in mine], "operations")):
            off = 100 * off_line(x, [p.seconds for p in mine])
            rows.append(Measurement(f"{series}: farthest off a line", off, "%", None, f"over {over}"))
    return rows


def tokens_points(shape, dtype, steps, checkpoint) -> list[Point]:
    """Steps at each scale, the picture and the text always the same."""
    points = []
    for scale in sorted(shape["scales"]):
        config = model_config(shape, dtype, (scale,), checkpoint)
        points.append(_point("visual tokens", scale, shape, config, (scale,), steps))
    return points


def pixels_points(shape, dtype, steps, checkpoint) -> list[Point]:
    """Steps over half to one and a half times the shape's resolution, pooled to one visual token a picture."""
    points = []
    for share in RESOLUTIONS:
        image = max(int(side(shape) * share), 1) * shape["vision"]["patch"]
        sized = shape | {"vision": shape["vision"] | {"image": image}}
        config = model_config(sized, dtype, (1,), checkpoint)
        points.append(_point("ViT, pixels", image * image, sized, config, (1,), steps))
    stride = 4 * 2 ** (len(DEPTHS) - 1)
    for share in RESOLUTIONS:
        image = max(round(shape["vision"]["image"] * share / stride), 1) * stride
        sized = shape | {"vision": shape["vision"] | {"image": image}}
        config = model_config(sized, dtype, (1,), checkpoint)
        width = shape["vision"]["width"]
        config.model.encoder, config.model.vision = (
            "convnext",
            {
                "image_size": image,
                "depths": DEPTHS,
                "widths": tuple(width >> n for n in reversed(range(len(DEPTHS)))),
                "remat": checkpoint,
            },
        )
        points.append(_point("ConvNeXt, pixels", image * image, sized, config, (1,), steps))
    return points


def off_line(x, y) -> float:
    """Largest distance of points from the line of least squares through them, over the largest y."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    line = np.polynomial.Polynomial.fit(x, y, 1)
    return float(np.abs(line(x) - y).max() / y.max())


def _point(series, x, shape, config, scales, steps):
    program = make_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    batch = synthetic_batch(shape, scales)
    timed = time_train(program, batch, "float32", steps, f"{series} {x}")
    return Point(series, x, timed.seconds, step_flops(program, batch))
