"""Pages of small print, read by a ConvNeXt of three or four stages: resolution against visual tokens (ConvLLaVA).

    lmm prepare --dataset pages --out runs/pages_data
    lmm train --config configs/pages.py --workdir runs/pages_3
    lmm train --config configs/pages.py:stages=4,start=runs/pages_3 --workdir runs/pages_4

stages=3|4     a stage more gives a quarter of the tokens: (pixels / 16)² or (pixels / 32)²
pixels=32|64   a side of what the encoder sees of a page
start          workdir of three stages to go on from, as ConvLLaVA adds its stage to a trained ConvNeXt

Digits read right on 1,000 pages in fonts unseen in training: 4 tokens of 32 pixels .38, 4 tokens of 64 pixels by a
stage more .77, 16 tokens .90; the board in configs/README.md has the seeds. 1,500 steps take 4.9
minutes on 2 cores, 2026-11-20.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, stages=3, pixels=64, start="", data="runs/pages_data")
    cfg = c.base()
    cfg.model.dtype = "float32"
    c.use_encoder(cfg, "convnext")
    depths, widths = (1, 2, 1, 1), (32, 64, 96, 128)
    cfg.model.vision.update(image_size=a.pixels, patch_size=4, remat=False)
    cfg.model.vision.update(depths=depths[: a.stages], widths=widths[: a.stages])
    tokens = (a.pixels // (4 * 2 ** (a.stages - 1))) ** 2
    cfg.model.scales = (tokens,)
    cfg.model.decoder.update(vocab_size=128, width=64, depth=3, heads=4, kv_heads=4, mlp_dim=192, remat="none")
    cfg.data.update(path=a.data, rows=1, views=1, length=49 + tokens, targets=33)
    if a.start:
        cfg.init.update({"from": a.start, "new": ("vision/stage_4", "projector") if a.stages == 4 else ()})
    cfg.train.update(steps=1500, batch_size=32, eval_every=500, save_every=500)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    return cfg
