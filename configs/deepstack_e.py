"""DeepStack-E: four times fewer visual tokens, each with the four finer ones that it stands for stacked over it.

    lmm prepare --data rows.json --images pictures/ --out data/mine --template chatml --tokenizer models/Qwen2.5-1.5B
    lmm train --config configs/deepstack_e.py:data=data/mine --workdir runs/deepstack_e

data=DIR         the prepared folder, of the decoder's tokenizer
size=0.5b|1.5b   of Qwen2.5, from the folder models=DIR that also holds the tower; 3b and 7b likewise
scales=36        visual tokens of a picture; scales=1+4+9+36 makes the model nested (M3)
rate=R           learning rate; steps=N, packs=N of a step, length=N positions of a row

The idea is that of DeepStack's author after DeepStack (SliMM). SigLIP-L/16 gives a picture of 384 pixels 24×24
features. Merged 2×2, as Qwen2-VL does, they would be 144 tokens. Here 4×4 of them become one token of the bank, 36 in
all, and the four 2×2 merges beneath each are added at its place before decoder layers 0 to 3, through a projector of
their own: the sequence is four times shorter, and nothing of the picture is left out of it. SliMM does so with
Qwen2-VL's tower; this is its idea on SigLIP, not its checkpoint, and a folder of SliMM is not read.

Nothing has been measured with it.
"""

from lmm_jax import config as c
from lmm_jax.training import recipe


def get_config(arg=""):
    a = c.parse(
        arg,
        data="data/mine",
        models="models",
        size="1.5b",
        scales="36",
        rate=2e-5,
        steps=5000,
        packs=128,
        length=2048,
    )
    cfg = c.base()
    c.use_family(cfg, "qwen2", a.size)
    c.use_family(cfg, "siglip", "l16-384")
    cfg.model.projector.update(shuffle=(4,), norm="block")
    cfg.model.finer, cfg.model.decoder.inject_layers = 2, (0, 1, 2, 3)
    cfg.model.scales = tuple(int(scale) for scale in a.scales.split("+"))
    cfg.data.update(path=a.data, template="chatml", aspect="stretch", length=a.length, too_long="cut")
    cfg.data.rows = recipe.rows_of(cfg.model)
    parts = {"vision": f"{a.models}/siglip-large-patch16-384", "language": f"{a.models}/Qwen2.5-{a.size.upper()}"}
    cfg.init.update(parts, new=("projector", "finer_projector"))
    cfg.optimizer.update(
        learning_rate=a.rate, groups=(("vision", 0.0), ("projector", 1e-4), ("finer_projector", 1e-4))
    )
    every = max(a.steps // 10, 1)
    cfg.train.update(steps=a.steps, batch_size=a.packs, eval_every=every, save_every=every)
    return cfg
