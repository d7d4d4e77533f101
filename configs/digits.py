"""Real handwriting, 3×3 mosaics of scanned digits: M3 from 1, 4, 9 or 36 visual tokens, and DeepStack's effect.

    lmm prepare --dataset digits --out runs/digits_data
    lmm train --config configs/digits.py --workdir runs/digits

recipe=m3           trains all four budgets, two a step in rotation
recipe=full         trains one budget alone, scale=36 by default: the control
recipe=low          9 tokens of the picture shrunk to 6×6 pixels, 2×2 a digit
recipe=deepstack    the same 9 tokens, and 4 stacks of 9 from tiles at double resolution (DeepStack-L)
recipe=deepstack_v  the same, the tiles stacked inside the encoder (DeepStack-V)
recipe=high         all 36 tokens of the picture at that resolution in the sequence
recipe=router       of start=WORKDIR, a run of m3: learns how likely it is right at each budget, nothing else trains

Digits read right, 1,000 mosaics, means of the seeds on the board in configs/README.md: m3 .20 .76 .98 .98 at 1, 4, 9,
36 tokens, one model for each .19 .87 .97 .97, full pooled .07 .12 .11 .97; low .59, deepstack .94, deepstack_v .96,
high .94. On 2 cores, 2026-11-20.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, recipe="m3", scale=36, data="runs/digits_data", start="runs/digits")
    cfg = c.base()
    cfg.model.dtype = "float32"
    cfg.model.vision.update(image_size=24, patch_size=4, width=48, depth=2, heads=4, mlp_dim=192, level=-1)
    cfg.model.decoder.update(vocab_size=128, width=64, depth=3, heads=4, kv_heads=4, mlp_dim=192)
    cfg.data.update(path=a.data, rows=1, views=1, length=120, targets=40)
    cfg.train.update(steps=1500, batch_size=32, eval_every=500, save_every=500)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    tiled = {"tilings": ((2, 2),), "views": 5}
    recipes = {
        "m3": lambda: m3(cfg),
        "full": lambda: full(cfg, a.scale),
        "low": lambda: coarse(cfg),
        "deepstack": lambda: coarse(cfg, inject_layers=(0, 1, 2, 3), stacks="samples", **tiled),
        "deepstack_v": lambda: coarse(cfg, regroup=(1, 2), stacks="encoder", **tiled),
        "high": lambda: coarse(cfg, side=12, length=80),
        "router": lambda: router(cfg, a.start),
    }
    c.choose("recipe", a.recipe, recipes)()
    return cfg


def m3(cfg):
    cfg.model.scales = (1, 4, 9, 36)
    cfg.train.update(steps=2000, scales_per_step=2)  # each budget for 1,000


def router(cfg, start):
    m3(cfg)
    cfg.init.update({"from": start, "new": ("router",)})
    cfg.model.router.update(width=128, heads=32, tokens=8)
    cfg.data.update(length=202, targets=80)  # all four copies stand in a row
    cfg.train.update(steps=3000, scales_per_step=None)
    cfg.optimizer.learning_rate = 2e-3
    cfg.optimizer.groups = (("vision", 0.0), ("projector", 0.0), ("decoder", 0.0))


def full(cfg, scale):
    cfg.model.scales = (scale,)
    cfg.data.length = 44 + scale


def coarse(cfg, side=6, inject_layers=(), regroup=(), **data):
    cfg.model.scales = ((side // 2) ** 2,)
    cfg.model.vision.update(image_size=side, patch_size=2, depth=5, regroup=regroup)
    cfg.model.decoder.update(depth=4, inject_layers=inject_layers)
    cfg.data.update({"aspect": "stretch", "length": 53} | data)
