"""Pages of small print, read by a ConvNeXt of three or four stages: resolution against visual tokens (ConvLLaVA).

Or by a ViT that trains 1, 4, 16 and 64 tokens (M3), whose class token says which of them count.

    lmm prepare --dataset pages --out runs/pages_data
    lmm train --config configs/pages.py --workdir runs/pages_3
    lmm train --config configs/pages.py:stages=4,start=runs/pages_3 --workdir runs/pages_4

encoder        convnext; or vit, a token each for 8 × 8 pixels, which trains 1, 4, 16 and 64 of them, two a step
stages=3|4     of the ConvNeXt; one more gives a quarter of the tokens: (pixels / 16)² or (pixels / 32)²
pixels=32|64   a side of what the encoder sees of a page
start          workdir of three stages to go on from, as ConvLLaVA adds its stage to a trained ConvNeXt

Digits read right on 1,000 pages in fonts unseen in training: 4 tokens of 32 pixels .38, 4 tokens of 64 pixels by a
stage more .77, 16 tokens .90; the board in configs/README.md has the seeds. 1,500 steps take 4.9
minutes on 2 cores, 2026-11-20.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, encoder="convnext", stages=3, pixels=64, start="", data="runs/pages_data")
    cfg = c.base()
    cfg.model.dtype = "float32"
    cfg.model.decoder.update(vocab_size=128, width=64, depth=3, heads=4, kv_heads=4, mlp_dim=192, remat="none")
    cfg.data.update(path=a.data, rows=1, views=1, targets=33)
    cfg.train.update(steps=1500, batch_size=32, eval_every=500, save_every=500)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    if a.start:
        cfg.init.update({"from": a.start})
    c.choose("encoder", a.encoder, {"convnext": lambda: convnext(cfg, a), "vit": lambda: vit(cfg, a)})()
    return cfg


def convnext(cfg, a):
    c.use_encoder(cfg, "convnext")
    depths, widths = (1, 2, 1, 1), (32, 64, 96, 128)
    cfg.model.vision.update(image_size=a.pixels, patch_size=4, remat=False)
    cfg.model.vision.update(depths=depths[: a.stages], widths=widths[: a.stages])
    tokens = (a.pixels // (4 * 2 ** (a.stages - 1))) ** 2
    cfg.model.scales = (tokens,)
    cfg.data.length = 49 + tokens
    if a.start and a.stages == 4:
        cfg.init.new = ("vision/stage_4", "projector")


def vit(cfg, a):
    cfg.model.vision.update(image_size=a.pixels, patch_size=8, width=64, depth=4, heads=4, mlp_dim=256, level=-1)
    cfg.model.vision.remat = False
    cfg.model.scales = (1, 4, 16, 64)
    cfg.data.update(length=180, targets=66)  # two copies of a conversation
    cfg.train.update(steps=2000, scales_per_step=2)
