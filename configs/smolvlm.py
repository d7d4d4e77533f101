"""SmolVLM, fine-tuned: a picture in tiles of 64 tokens each, with smaller budgets nested beneath them if you like.

    lmm prepare --data rows.json --images pictures/ --out data/mine --template smolvlm --tokenizer models/SmolVLM2
    lmm train --config configs/smolvlm.py:data=data/mine,model=models/SmolVLM2 --workdir runs/mine
    lmm export --workdir runs/mine --out out/mine

data=DIR    the prepared folder, of the model's tokenizer
model=DIR   a released folder, with all of its sizes; without one the sizes of the 256M model, and new parameters
scales=A+B  visual tokens of a tile; by default the model's own, 64 of a tile of 512 pixels
rate=R      learning rate; steps=N, packs=N of a step, length=N positions of a row

The longer side of every picture becomes four tiles long, small pictures enlarged, so that one takes 5 to 17 views:
320 to 1,088 tokens. scales=1+4+16+64 makes a model of four budgets of it, as M3 does: 17 to 1,088 tokens of the same
large picture. Transformers runs the largest, lmm_jax all of them. The rate is a guess.

256,484,928 parameters, as transformers' class has at the released sizes.
"""

from lmm_jax import config as c
from lmm_jax.data.views import longest_tilings
from lmm_jax.training import recipe

MOST_TILES = 4  # along the longer side of a picture


def get_config(arg=""):
    a = c.parse(arg, data="data/mine", model="", scales="", rate=2e-5, steps=1000, packs=32, length=4096)
    cfg = c.base()
    if a.model:
        recipe.use_model(cfg, a.model, a.data)
    else:
        new(cfg, a)
    if a.scales:
        cfg.model.scales = tuple(int(scale) for scale in a.scales.split("+"))
    cfg.data.update(rows=recipe.rows_of(cfg.model), length=a.length, too_long="cut")
    cfg.optimizer.update(learning_rate=a.rate, groups=(("vision", 0.0),))
    every = max(a.steps // 10, 1)
    cfg.train.update(steps=a.steps, batch_size=a.packs, eval_every=every, save_every=every)
    return cfg


def new(cfg, a):
    """The 256M model as its authors built it, with new parameters."""
    c.use_family(cfg, "llama", "smollm2-135m")
    c.use_family(cfg, "smolvlm", "b16-512")
    c.use_projector(cfg, "smolvlm", (4,))
    cfg.model.scales = (64,)
    cfg.model.decoder.update(vocab_size=49280, rope_theta=1e5, tied=False)
    cfg.data.update(path=a.data, template="smolvlm", aspect="longest", sequence="tiles")
    cfg.data.update(tilings=longest_tilings(MOST_TILES), marks="smolvlm")
