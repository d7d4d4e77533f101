"""DeepStack from several levels of one encoder, as in Qwen3-VL, at all of M3's budgets; on real handwriting.

    lmm prepare --dataset digits --out runs/digits_data
    lmm train --config configs/qwen3vl_style.py --workdir runs/qwen3vl_style
    lmm evaluate --workdir runs/qwen3vl_style

What 1, 2 and 3 blocks of the encoder give is added before decoder layers 1, 2 and 3, each through a projector of its
own; what all 4 give is the bank. A budget pools both alike. Qwen3-VL itself is configs/qwen3vl.py: this is its idea
alone, by CLIP's encoder and LLaVA's projectors, at a size that trains in minutes. Its levels are 9, 17 and 25 of 27.

Digits read right at 1, 4, 9, 36 tokens: .24 .45 .94 .66, after 600 steps, the loss still falling; seed 0, one CPU
device, the first 500 test mosaics, 2026-11-20.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, data="runs/digits_data")
    cfg = c.base()
    cfg.model.dtype = "float32"
    cfg.model.scales = (1, 4, 9, 36)
    cfg.model.vision.update(image_size=24, patch_size=4, width=48, depth=4, heads=4, mlp_dim=192, level=-1)
    cfg.model.vision.update(stack_levels=(1, 2, 3), remat=False)
    cfg.model.decoder.update(vocab_size=128, width=64, depth=4, heads=4, kv_heads=4, mlp_dim=192)
    cfg.model.decoder.update(inject_layers=(1, 2, 3), remat="none")
    cfg.data.update(path=a.data, rows=1, views=1, length=120, targets=40)
    cfg.train.update(steps=600, batch_size=32, scales_per_step=2, eval_every=300, save_every=300)
    cfg.mesh.update(data=-1, fsdp=1)
    cfg.optimizer.update(learning_rate=3e-3, b2=0.98, weight_decay=0.01)
    return cfg
