"""Granite-Docling, fine-tuned: both of its budgets in one packed step, and smaller ones nested beneath them.

    lmm prepare --data rows.json --images pages/ --out data/pages --template granite --tokenizer models/docling
    lmm train --config configs/granite_docling.py:data=data/pages,model=models/docling --workdir runs/pages
    lmm export --workdir runs/pages --out out/pages --verify

data=DIR    the prepared folder, of the model's tokenizer
model=DIR   a released folder, with all of its sizes; without one the sizes of the 500M model, and new parameters
scales=A+B  visual tokens of a tile of 512 pixels; 64+256 are the model's own, by its coarse and its fine path
router=N    without model=: width of the router that chooses between both, 0 for none. It is read, never trained
rate=R      learning rate; steps=N, packs=N of a step, length=N positions of a row

A page is cut into up to 32 tiles, which SigLIP sees one by one beside the whole page. What its blocks 3, 7 and 10
give, counted from 0, is added behind decoder layers 0, 1 and 2: DeepStack. The coarse path makes one token of 4×4
features, the fine path of 2×2; `scale="auto"` asks the router, as the model's authors do. Further scales pool what a
path gives, bank and levels alike, as M3 does: scales=1+4+16+64+256 makes one model of five budgets of it, where 1 to
16 are pooled from the coarse path. Transformers runs its two budgets, lmm_jax all of them. How its authors trained
it, they have not said; the rate is a guess.

543,428,352 parameters, as transformers' class has at its defaults, and 199,426 more with a router of width 256.

With random weights, written by transformers 5.24, on two CPU cores in float32 (2026-11-29): loaded in 8 s and 2.7 GB;
one step of one pack of 4,608 positions and 13 tiles at both budgets in 372 s, compiling included, and 12.6 GB;
exported and run by transformers beside ours in 946 s and 18.3 GB: prompts of 480 to 5,715 ids at both budgets alike,
logits of up to 2.6 within 1.9e-6, the answers the same.
"""

from lmm_jax import config as c
from lmm_jax.training import recipe

MOST_TILES = 32
SIDES = range(1, 17)  # tiles along a side of a page


def get_config(arg=""):
    a = c.parse(
        arg, data="data/pages", model="", scales="64+256", router=0, rate=2e-5, steps=1000, packs=32, length=8192
    )
    cfg = c.base()
    if a.model:
        recipe.use_model(cfg, a.model, a.data)
    else:
        new(cfg, a)
    cfg.model.scales = tuple(int(scale) for scale in a.scales.split("+"))
    cfg.data.update(rows=recipe.rows_of(cfg.model), length=a.length, too_long="cut")
    cfg.optimizer.update(learning_rate=a.rate, groups=(("vision", 0.0), ("density_router", 0.0)))
    every = max(a.steps // 10, 1)
    cfg.train.update(steps=a.steps, batch_size=a.packs, eval_every=every, save_every=every)
    return cfg


def new(cfg, a):
    """The 500M model as its authors built it, with new parameters."""
    c.use_family(cfg, "granite_docling_text", "0.5b")
    c.use_family(cfg, "granite_docling", "b16-512")
    c.use_projector(cfg, "granite_docling", (4, 2))
    cfg.model.vision.stack_levels, cfg.model.decoder.inject_layers = (4, 8, 11), (1, 2, 3)
    cfg.model.density_router.width = a.router
    tilings = tuple((columns, rows) for columns in SIDES for rows in SIDES if columns * rows <= MOST_TILES)
    cfg.data.update(path=a.data, template="granite", aspect="stretch", sequence="tiles", choice="ratio")
    cfg.data.update(tilings=tilings, marks="granite_docling")
