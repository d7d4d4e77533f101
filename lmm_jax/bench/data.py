"""The input path by stage, and the cores that a host needs so that no training step waits for it."""

import io
import json
import os
import time

import jax
import numpy as np
from PIL import Image

from lmm_jax import sharding
from lmm_jax.aot.flops import step_flops
from lmm_jax.aot.topology import CHIPS
from lmm_jax.bench.measure import Measurement
from lmm_jax.config import visual_layout
from lmm_jax.data.images import image_size, open_picture
from lmm_jax.data.pipeline import HOST_ONLY, Packs
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.data.prepared import as_turns
from lmm_jax.training.state import make_program

CHIPS_OF_HOST = (4, 8)
PHOTOGRAPH = (640, 480)  # pixels, as most of COCO's
WORDS = 180  # of an answer


def bench_data(config, records=200, step_seconds=None, packs_per_host=None) -> list[Measurement]:
    """Times the input path by stage, in CPU time of one core, on the first records of the stream.

    Args:
      config: names data, layout and batch.
      records: about how many records to read.
      step_seconds: time of a training step; if None, that of a chip at its peak rate, below which no step comes.
      packs_per_host: packs that a host reads for it; with `step_seconds`.

    Returns:
      Rates of each stage and of all together, bare Pillow's beside the pictures' part, and the cores that a host
      needs so that no step waits.
    """
    packs = Packs(config, visual_layout(config), config.data.train, config.train.batch_size, shuffle=True)
    chosen, position = [], 0
    while len(chosen) < records:
        chosen += packs.members(position)
        position += 1
    stored, read = _timed(lambda: [packs.data[dataset][record] for dataset, record in chosen])
    images = [data for record in stored for data in record["images"]]
    layout, visual, scales = packs.layout, packs.layout.visual, packs.layout.scales
    sizes = [list(map(image_size, record["images"])) for record in stored]

    def text():
        for record, of_record in zip(stored, sizes, strict=True):
            layout.training_segments(as_turns(record), of_record, packs.tokenizer, scales)

    _, laid_out = _timed(text)
    pictures, decoded = _timed(lambda: list(map(open_picture, images)))
    _, resized = _timed(lambda: list(map(layout.see, pictures)))
    _, bare = _timed(lambda: [_bare_pillow(data, visual.size, visual.aspect == "pad") for data in images])
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
    rows += [
        Measurement("whole records, packed", len(stored) / whole, "records/s/core"),
        Measurement("records of a pack", len(stored) / position, "records"),
        Measurement("a pack", 1e3 * per_pack, "ms of a core"),
    ]
    if step_seconds:
        name = f"cores for {packs_per_host} packs in {step_seconds:g} s"
        return [*rows, Measurement(name, per_pack * packs_per_host / step_seconds, "cores/host")]
    flops = pack_flops(config, packs[0])
    for name, chip in CHIPS.items():
        for chips in CHIPS_OF_HOST:
            seconds = flops / chip.flops
            against = f"{seconds:.3g} s, a pack on a {name} at {chip.flops / 1e12:.0f} TFLOP/s"
            rows.append(
                Measurement(f"cores for {chips} {name}", chips * per_pack / seconds, "cores/host", None, against)
            )
    return rows


def pack_flops(config, pack) -> int:
    """Operations of the training step for one pack, an array dict of `Packs`."""
    program = make_program(config, sharding.make_mesh({}, jax.devices("cpu")[:1]))
    arrays = {name: x for name, x in pack.items() if name not in HOST_ONLY}
    return step_flops(program, {n: jax.ShapeDtypeStruct((1, 1, *x.shape), x.dtype) for n, x in arrays.items()})


def use_photographs(config, folder, count):
    """Gives a config synthetic photographs instead of its data: `count` conversations of one picture each.

    The pictures are JPEGs of `PHOTOGRAPH` pixels with as much detail as to take about 100 kB, the text random words.

    Args:
      config: locked, or not.
      folder: an empty one, to write and prepare them in.
      count: conversations.
    """
    rng, rows = np.random.default_rng(0), []
    words = ["".join(rng.choice(list("aeioulmnrst"), rng.integers(2, 8))) for _ in range(2000)]
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            PHOTOGRAPH, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 12, (*PHOTOGRAPH[::-1], 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(os.path.join(folder, f"{n}.jpg"), quality=90)
        answer = " ".join(rng.choice(words, WORDS))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(n), "image": f"{n}.jpg", "conversations": turns})
    data = os.path.join(folder, "rows.json")
    with open(data, "w") as f:
        json.dump(rows, f)
    prepared = os.path.join(folder, "prepared")
    prepare_rows(data, None, prepared, template=config.data.template, workers=0)
    with config.unlocked():
        config.data.path, config.data.mixture = prepared, ()


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
        square = Image.new("RGB", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
