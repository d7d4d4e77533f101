"""M3 on real handwriting: one model that reads a 3×3 mosaic of scanned digits from 1, 4, 9 or 36 visual tokens.

    lmm prepare --dataset digits --out runs/digits_data
    lmm train --config configs/digits.py --workdir runs/digits

recipe=m3         trains all four budgets, two a step in rotation
recipe=full       trains at 36 tokens only: the control
recipe=deepstack  9 tokens of the whole picture, 4 stacks of 9 from its tiles at double resolution

Cells read right at 1, 4, 9, 36 tokens: m3 .29 .76 .98 .98; full .04 .15 .18 .97. 272 s of training on 2 cores
(JAX_NUM_CPU_DEVICES=2), seed 0, 3,000 questions, 2026-11-20.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, recipe="m3", data="runs/digits_data")
    cfg = c.base()
    cfg.model.dtype = "float32"
    cfg.model.scales = (1, 4, 9, 36)
    cfg.model.vision.update(image_size=24, patch_size=4, width=48, depth=2, heads=4, mlp_dim=192, level=-1)
    cfg.model.decoder.update(vocab_size=128, width=64, depth=3, heads=4, kv_heads=4, mlp_dim=192)
    cfg.data.update(path=a.data, rows=1, views=1, length=120, targets=40)
    cfg.train.update(steps=2600, batch_size=32, scales_per_step=2, eval_every=500, save_every=500)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    c.choose("recipe", a.recipe, {"m3": m3, "full": full, "deepstack": deepstack})(cfg)
    return cfg


def m3(cfg):
    del cfg  # as above


def full(cfg):
    cfg.model.scales = (36,)
    cfg.data.length = 80
    cfg.train.scales_per_step = 1


def deepstack(cfg):
    cfg.model.scales = (9,)
    cfg.model.vision.image_size = 12
    cfg.model.decoder.update(depth=4, inject_layers=(0, 1, 2, 3))
    cfg.data.update(aspect="stretch", tilings=((2, 2),), sequence="whole", stacks="samples", views=5)
    cfg.train.scales_per_step = 1
