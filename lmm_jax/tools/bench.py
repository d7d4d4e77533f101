"""Measurements as rows of name, value, unit and a ratio against a ceiling or peer measured in the same run."""

import dataclasses
import io
import time

import numpy as np
from PIL import Image

from lmm_jax.data.images import image_size, open_picture
from lmm_jax.data.pipeline import Packs
from lmm_jax.data.prepared import as_turns
from lmm_jax.data.views import MEAN_COLOUR


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of a table.

    Attributes:
      name, value, unit: what was measured.
      ratio: value against what `against` names, None if there is nothing to compare with.
      against: the ceiling or peer.
    """

    name: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""


def bench_data(config, step_seconds, packs_per_host, records=200) -> list[Measurement]:
    """Times the input path by stage, in CPU time of one core, on the first records of the stream.

    Args:
      config: names data, layout and batch.
      step_seconds: time of a training step.
      packs_per_host: packs that a host reads for it.
      records: about how many records to read.

    Returns:
      Rates of each stage and of all together, bare Pillow's beside the pictures' part, and the cores that a host
      needs so that no step waits.
    """
    packs = Packs(config, config.data.train, config.train.batch_size, shuffle=True)
    chosen, position = [], 0
    while len(chosen) < records:
        chosen += packs.members(position)
        position += 1
    stored, read = _timed(lambda: [packs.data[source][row] for source, row in chosen])
    images = [data for record in stored for data in record["images"]]
    layout, arrangement, scales = packs.layout, packs.layout.arrangement, packs.layout.scales
    sizes = [list(map(image_size, record["images"])) for record in stored]

    def text():
        for record, of_record in zip(stored, sizes, strict=True):
            layout.training_segments(as_turns(record), of_record, packs.tokenizer, scales)

    _, laid_out = _timed(text)
    pictures, decoded = _timed(lambda: list(map(open_picture, images)))
    _, resized = _timed(lambda: list(map(layout.see, pictures)))
    _, bare = _timed(lambda: [_bare_pillow(data, arrangement.size, arrangement.aspect == "pad") for data in images])
    _, whole = _timed(lambda: [packs[p] for p in range(position)])
    n, per_pack = len(images), whole / position
    rows = [
        Measurement("read records", len(stored) / read, "records/s/core"),
        Measurement("tokenise and lay out", len(stored) / laid_out, "records/s/core"),
    ]
    if n:
        rows += [
            Measurement("decode pictures", n / decoded, "images/s/core"),
            Measurement("resize to views", n / resized, "images/s/core"),
            Measurement(
                "decode and resize",
                n / (decoded + resized),
                "images/s/core",
                bare / (decoded + resized),
                f"bare Pillow, {n / bare:.0f} images/s/core",
            ),
        ]
    return [
        *rows,
        Measurement("whole records, packed", len(stored) / whole, "records/s/core"),
        Measurement(
            f"cores for {packs_per_host} packs in {step_seconds:g} s",
            per_pack * packs_per_host / step_seconds,
            "cores/host",
        ),
    ]


def table(rows) -> str:
    """Measurements as text."""
    lines = []
    for r in rows:
        ratio = f"{r.ratio:5.2f} × {r.against}" if r.ratio is not None else ""
        lines.append(f"{r.name:<32} {r.value:>10,.2f} {r.unit:<16} {ratio}".rstrip())
    return "\n".join(lines)


def _timed(run):
    """What `run` returned, and the CPU seconds of this thread that it took; never quite nothing."""
    begin = time.thread_time()
    result = run()
    return result, max(time.thread_time() - begin, 1e-9)


def _bare_pillow(data, size, pad) -> np.ndarray:
    """The plain way to a picture of `size` × `size`: open, convert, paste on a square if `pad`, resize."""
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    if pad and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), MEAN_COLOUR)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
