"""Qwen3-VL, fine-tuned on pictures at their own sizes, with all of M3's budgets nested in it if you like.

    lmm prepare --data rows.json --images pictures/ --out data/mine --template qwen3_vl --tokenizer models/Qwen3-VL-4B
    lmm train --config configs/qwen3vl.py:data=data/mine,model=models/Qwen3-VL-4B --workdir runs/mine
    lmm export --workdir runs/mine --out out/mine

data=DIR       the prepared folder, of the model's tokenizer
model=DIR      a released folder, with all of its sizes; without one those of size=2b|4b|8b|32b, and new parameters
scales=A+B     visual tokens of a picture of 768×768 pixels, 576 are the model's own: one of 32×32 pixels each
most=N         pixels of a picture at most, 1024² here; `data.min_pixels` are those at least
rate=R         learning rate; steps=N, packs=N of a step, length=N positions of a row

A picture keeps its shape: its sides become multiples of 32 pixels. Pictures of like shape share a step
(`data.canvases`), and when the model is asked each has a canvas of its own. Its tokens are numbered by rows and
columns (`model.decoder.rope_axes`), and what blocks 8, 16 and 24 of the encoder give, or 5, 11 and 17 of the smaller
models', counted from 0, is added behind decoder layers 0, 1 and 2: DeepStack. scales=9+36+144+576 makes a model of
four budgets of it: a smaller one averages neighbouring tokens behind the merger, bank and levels alike, and is
numbered as a picture of so many tokens would be. A picture must have a token at each of them: one that is less than
256 pixels high or wide has none at 9, and is left out. Transformers runs the largest budget, this library all.

Sizes are those of the released models; rates and steps are ours. Not yet trained with at these sizes.
"""

from lmm_jax import config as c
from lmm_jax.training import recipe

STEP = 32  # pixels a token stands for, along a side
ENCODERS = {"2b": "small", "4b": "small", "8b": "large", "32b": "large"}
# Shapes of canvases, height to width, each of as many pixels as a picture may have: what other shapes leave is blank.
SHAPES = ((1, 1), (3, 4), (4, 3), (9, 16), (16, 9), (1, 2), (2, 1), (1, 3), (3, 1))


def get_config(arg=""):
    a = c.parse(
        arg,
        data="data/mine",
        model="",
        size="4b",
        scales="576",
        most=1024**2,
        rate=1e-5,
        steps=1000,
        packs=32,
        length=4096,
    )
    cfg = c.base()
    if a.model:
        recipe.use_model(cfg, a.model, a.data)
    else:
        new(cfg, a)
    cfg.model.scales = tuple(int(scale) for scale in a.scales.split("+"))
    canvases = {
        tuple(STEP * -(-int((a.most * x / y) ** 0.5) // STEP) for x, y in ((h, w), (w, h))) for h, w in SHAPES
    }
    cfg.data.update(
        rows=recipe.rows_of(cfg.model),
        length=a.length,
        too_long="cut",
        max_pixels=a.most,
        canvas=(),
        canvases=tuple(sorted(canvases)),
    )
    cfg.optimizer.update(learning_rate=a.rate, groups=(("vision", 0.0),))
    every = max(a.steps // 10, 1)
    cfg.train.update(steps=a.steps, batch_size=a.packs, eval_every=every, save_every=every)
    return cfg


def new(cfg, a):
    """A model of a released size with new parameters."""
    c.use_family(cfg, "qwen3_vl_text", a.size)
    c.use_family(cfg, "qwen3_vl_vision", ENCODERS[a.size])
    c.use_projector(cfg, "qwen3_vl", (2,))
    cfg.model.decoder.inject_layers = tuple(range(1, 1 + len(cfg.model.vision.stack_levels)))
    cfg.data.update(path=a.data, template="qwen3_vl", aspect="native")
