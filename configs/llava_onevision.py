"""LLaVA-OneVision, fine-tuned on pictures, with smaller budgets nested beneath its own if you like.

    lmm prepare --data rows.json --images pictures/ --out data/mine --template chatml --tokenizer models/onevision
    lmm train --config configs/llava_onevision.py:data=data/mine,model=models/onevision --workdir runs/mine
    lmm export --workdir runs/mine --out out/mine

data=DIR    the prepared folder, of the model's tokenizer
model=DIR   a released folder, with all of its sizes; without one the sizes of the 0.5B model, and new parameters
scales=A+B  visual tokens of a view of 384 pixels; 729 are the model's own
rate=R      learning rate; steps=N, packs=N of a step, length=N positions of a row

A picture is seen whole and in up to 6 × 6 tiles. Their 27 × 27 tokens each, without those of padding, are put
together, and shrunk bilinearly to those of about nine views where they are more than 1.21 times as many: up to 8,765
tokens. Pictures of a conversation that has several are seen whole alone, 730 tokens each. scales=9+81+729 makes a
model of three budgets of it, as M3 does: cells of a view are pooled 9 × 9 or 3 × 3, and what tiles have is shrunk at
each budget alike.
Transformers runs the largest, lmm_jax all of them. The rate is that of the authors' last stage, which trains all.
"""

from lmm_jax import config as c
from lmm_jax.training import recipe

SIDES = range(1, 7)  # tiles along a side of a picture


def get_config(arg=""):
    a = c.parse(arg, data="data/mine", model="", scales="729", rate=1e-5, steps=1000, packs=32, length=10240)
    cfg = c.base()
    if a.model:
        recipe.use_model(cfg, a.model, a.data)
    else:
        new(cfg, a)
    cfg.model.scales = tuple(int(scale) for scale in a.scales.split("+"))
    cfg.data.update(rows=1, length=a.length, too_long="cut")
    cfg.optimizer.update(learning_rate=a.rate, groups=(("vision", 2e-6),))
    every = max(a.steps // 10, 1)
    cfg.train.update(steps=a.steps, batch_size=a.packs, eval_every=every, save_every=every)
    return cfg


def new(cfg, a):
    """The 0.5B model as its authors built it, with new parameters."""
    c.use_family(cfg, "qwen2", "0.5b")
    c.use_family(cfg, "siglip", "so400m14-384")
    cfg.model.vision.level = -2  # a released folder has the tower without its last block, and reads what is last
    cfg.model.newline = True
    cfg.data.update(path=a.data, template="chatml", aspect="anyres", sequence="unpad", shrink=9, tiled_alone=True)
    cfg.data.tilings = tuple((columns, rows) for rows in SIDES for columns in SIDES)
