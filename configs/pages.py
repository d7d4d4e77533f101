"""Pages of small print, read by a ConvNeXt of four or five stages: resolution against visual tokens (ConvLLaVA).

    lmm prepare --dataset pages --out runs/pages_data
    lmm train --config configs/pages.py:recipe=stage5,pixels=128 --workdir runs/pages

recipe=stage4|stage5   a stage more gives a quarter of the tokens: (pixels / 32)² or (pixels / 64)²
pixels=64|128          a side of what the encoder sees of a page

The test's fonts are unseen in training. Not yet measured.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, recipe="stage5", pixels=128, data="runs/pages_data")
    stages = c.choose("recipe", a.recipe, {"stage4": 4, "stage5": 5})
    cfg = c.base()
    cfg.model.dtype = "float32"
    c.use_convnext(cfg)
    cfg.model.vision.update(image_size=a.pixels, remat=False)
    cfg.model.vision.update(depths=(1, 1, 2, 1, 1)[:stages], widths=(16, 32, 64, 96, 128)[:stages])
    tokens = (a.pixels // (4 * 2 ** (stages - 1))) ** 2
    cfg.model.scales = (tokens,)
    cfg.model.decoder.update(vocab_size=128, width=64, depth=3, heads=4, kv_heads=4, mlp_dim=192, remat="none")
    cfg.data.update(path=a.data, rows=1, views=1, length=61 + tokens, targets=49)
    cfg.train.update(steps=1500, batch_size=32, eval_every=100, save_every=500)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    return cfg
