"""Shapes of a model and its batch that ours and the peer are measured on, and synthetic batches of them.

A shape is a JSON object: `name`; `batch` conversations, each of `text_len` ids with one picture after the first 8 and
the second half supervised; `scales`, M3's visual tokens; `vision` and `text`, the sizes. Without jax, as the peer's
process reads it too.
"""

import dataclasses
import json
import pathlib
import types

import numpy as np

from lmm_jax.data.conversation import IMAGE
from lmm_jax.data.pack_layout import bank_slots
from lmm_jax.data.segments import lay_out, pack
from lmm_jax.ranges import each, whole

FOLDER = pathlib.Path(__file__).parent / "shapes"
BEFORE_PICTURE = 8  # text ids
SIZES = {"width", "mlp", "layers", "heads"}
COUNT = whole(1)
SCALES = each(COUNT, least=1, distinct=True)
FIELDS = {
    "": {"name", "batch", "text_len", "scales", "vision", "text"},
    "vision": {"image", "patch"} | SIZES,
    "text": {"vocab_size"} | SIZES,
}


def load_shape(name) -> dict:
    """A shape by its name, or from a file.

    Raises:
      ValueError: no such shape, or a field is missing; the message names what there is.
    """
    path = FOLDER / f"{name}.json"
    path = path if path.exists() else pathlib.Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json")))
        raise ValueError(f"--shape {name} is neither a file nor one of {known}")
    try:
        shape = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--shape {path} is no JSON: {error}") from error
    for part, fields in FIELDS.items():
        found = shape[part] if part else shape
        what = f"--shape {path}: {part or 'the shape'}"
        if not isinstance(found, dict):
            raise ValueError(f"{what} is {found!r}, an object with {', '.join(sorted(fields))} is expected")
        missing = fields - found.keys()
        if missing:
            raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")
        counts = found if part else {"batch": shape["batch"], "text_len": shape["text_len"]}
        for name, value in counts.items():
            if not COUNT.holds(value):
                raise ValueError(f"{what} has {name}={value!r}, {COUNT} is expected")
    if not SCALES.holds(tuple(shape["scales"]) if isinstance(shape["scales"], list) else shape["scales"]):
        raise ValueError(f"--shape {path}: scales={shape['scales']!r}, expected {SCALES}")
    return shape


def side(shape) -> int:
    """Side of the encoder's grid."""
    return shape["vision"]["image"] // shape["vision"]["patch"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One of a queue: `text` ids, a picture of `scale` visual tokens after the first 8, and `new` ids to generate."""

    text: int
    scale: int
    new: int


def queue(shape, count=16, seed=0) -> list[Question]:
    """Questions of unlike lengths and budgets, each about a picture of its own."""
    rng, scales = np.random.default_rng(seed), shape["scales"]
    shortest = min(BEFORE_PICTURE + 4, shape["text_len"])
    texts, new = rng.integers(shortest, shape["text_len"] + 1, count), rng.integers(16, 65, count)
    return [Question(int(texts[n]), scales[n % len(scales)], int(new[n])) for n in range(count)]


def lengths(shape, scales) -> list[int]:
    """Positions of a conversation's copy at each scale."""
    return [shape["text_len"] + scale for scale in scales]


def fewest_positions(sizes, rows) -> tuple[list[int], int]:
    """Row of each of `sizes`, the longest first into the emptiest row, and the positions that rows then need."""
    used, where = np.zeros(rows, np.int64), [0] * len(sizes)
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        where[n] = int(used.argmin())
        used[where[n]] += sizes[n]
    return where, int(used.max())


def synthetic_batch(shape, scales, copies=None, rows=1, seed=0) -> dict[str, np.ndarray]:
    """A batch `[1, G, …]` of the shape's conversations, one a pack, as `lmm_jax.data.pipeline` would give it.

    Args:
      shape: see the module.
      scales: of the bank.
      copies: scales that the pack holds a copy for; all if None.
      rows: of a pack, whose positions are as few as hold the copies.
      seed: of ids and pixels.
    """
    rng, n = np.random.default_rng(seed), shape["text_len"]
    copies = scales if copies is None else copies
    where, length = fewest_positions(lengths(shape, copies), rows)
    supervised = np.insert(np.arange(n) >= n // 2, BEFORE_PICTURE, False)
    numbers = [scales.index(scale) for scale in copies]
    slots = [bank_slots(np.arange(scales[i]), 0, i, scales, 1) for i in numbers]
    packs = []
    for _ in range(shape["batch"]):
        ids = np.insert(rng.integers(3, shape["text"]["vocab_size"] - 1, n), BEFORE_PICTURE, IMAGE)
        segments = [lay_out(ids, supervised, [s], 1 << i) for i, s in zip(numbers, slots, strict=True)]
        packs.append(pack(segments, where, rows, length, len(copies) * int(supervised.sum())))
        pixels = (1, shape["vision"]["image"], shape["vision"]["image"], 3)
        packs[-1]["pixels"] = rng.integers(0, 256, pixels, np.uint8)
    return {name: np.stack([p[name] for p in packs])[None] for name in packs[0]}


def model_config(shape, dtype, scales, checkpoint=False):
    """What `training.state.make_program` reads of a config, without ml_collections: everything trains, by AdamW.

    Args:
      shape: see the module.
      dtype: of the computation.
      scales: of the bank.
      checkpoint: recomputes layers in the backward pass, else the decoder's matmuls are kept, the encoder whole.
    """
    vision, text = shape["vision"], shape["text"]
    return types.SimpleNamespace(
        seed=0,
        model=types.SimpleNamespace(
            router=types.SimpleNamespace(width=0),  # none
            dtype=dtype,
            scales=tuple(scales),
            reduction="pool",
            newline=False,
            newline_in_stacks=True,
            encoder="vit",
            vision={
                "image_size": vision["image"],
                "patch_size": vision["patch"],
                **_sizes(vision),
                "remat": checkpoint,
            },
            finer=0,
            projector={"depth": 2},
            level_projector={},
            density_router=types.SimpleNamespace(width=0),
            decoder={
                "vocab_size": text["vocab_size"],
                **_sizes(text),
                "kv_heads": text.get("kv_heads", text["heads"]),
                "remat": "full" if checkpoint else "dots",
            },
        ),
        lora=types.SimpleNamespace(rank=0),  # none
        optimizer=types.SimpleNamespace(
            learning_rate=1e-5,
            groups=(),
            warmup=0.03,
            final=0.0,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            clip=0.0,
            moments="float32",
            second_moment="full",
            frozen_dtype="float32",
        ),
        data=types.SimpleNamespace(length=max(lengths(shape, scales))),
        train=types.SimpleNamespace(steps=1000, max_skipped=10, skip_spikes=False),
        rules={},
    )


def _sizes(part):
    return {"width": part["width"], "depth": part["layers"], "heads": part["heads"], "mlp_dim": part["mlp"]}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Attention of one layer of a shape.

    Attributes:
      name: what it is.
      batch, heads, kv_heads, head_dim: sizes.
      scales: visual tokens of each copy of a conversation, () for the encoder.
      lengths: of the copies, or of what the encoder sees.
    """

    name: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    scales: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def causal(self) -> bool:
        """Whether a position sees only itself and what stands before it: in the decoder."""
        return bool(self.scales)

    @property
    def flops(self) -> int:
        """Operations of the two products over the pairs that see each other."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4 * self.batch * self.heads * self.head_dim * pairs


def attention_cases(shape) -> list[AttentionCase]:
    """Attention as the encoder, the decoder over one sequence, and the decoder over M3's packed copies have it."""
    vision, text = shape["vision"], shape["text"]
    full = side(shape) ** 2
    heads, head_dim = text["heads"], text["width"] // text["heads"]
    decoder = (shape["batch"], heads, text.get("kv_heads", heads), head_dim)
    encoder = (shape["batch"], vision["heads"], vision["heads"], vision["width"] // vision["heads"])
    return [
        AttentionCase("encoder", *encoder, (), (1 + full,)),
        *(
            AttentionCase(name, *decoder, tuple(scales), tuple(lengths(shape, scales)))
            for name, scales in (("decoder", [full]), ("decoder, packed", shape["scales"]))
        ),
    ]
