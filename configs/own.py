"""Your own data: a model of any size, or one that you have, trained on a folder that `lmm prepare` wrote.

    lmm prepare --data rows.json --images pictures/ --out data/mine --validation 0.05 --test 0.05
    lmm train --config configs/own.py:data=data/mine --workdir runs/mine
    lmm train --config configs/own.py:data=data/mine,model=llava-1.5-7b-hf --workdir runs/mine

data=DIR            the prepared folder; template, vocabulary, length, batch and steps follow from it
size=tiny|small|1b  from nothing: 6, 56 or 1,300 million parameters; tiny trains on two CPU cores in minutes
size=7b|13b         Vicuna 1.5 and CLIP from the folder that models= names, with a projector that starts fresh
model=DIR           in place of size: a released LLaVA, an export, or a workdir, with all its sizes and its template
freeze=A+B          parts that stay as they are, of vision, projector and decoder; none to train all
rate=R              learning rate; length=N positions of a row; epochs=N

The data must be prepared with the tokenizer of a model that is tuned: `lmm prepare … --tokenizer DIR`.
"""

from lmm_jax import config as c
from lmm_jax.training import recipe

# Of each size: sides of a picture and of its patches, the encoder, the decoder, the rate, packs of a step.
SIZES = {
    "tiny": ((96, 16), (128, 4, 4, 512), (192, 4, 4, 4, 512), 1e-3, 8),
    "small": ((224, 16), (384, 12, 6, 1536), (512, 8, 8, 8, 1408), 5e-4, 32),
    "1b": ((336, 14), (1024, 24, 16, 4096), (2048, 22, 32, 4, 5632), 3e-4, 64),
}


def get_config(arg=""):
    a = c.parse(
        arg, data="data/mine", size="tiny", model="", models="models", freeze="", rate=0.0, length=0, epochs=3.0
    )
    cfg = c.base()
    if a.model:
        packs, most = tuned(cfg, a)
    elif a.size in ("7b", "13b"):
        packs, most = vicuna(cfg, a)
    else:
        packs, most = fresh(cfg, a, *c.choose("size", a.size, SIZES))
    cfg.optimizer.learning_rate = a.rate or cfg.optimizer.learning_rate
    freeze(cfg, a)
    if cfg.model.density_router.width:  # which says which budget a page needs; it is read, not trained
        cfg.optimizer.groups = (("density_router", 0.0), *cfg.optimizer.groups)
    batch = recipe.fit_batch(cfg, a.epochs, packs, a.length, most)
    cfg.data.update(rows=recipe.rows_of(cfg.model), length=batch.length, too_long="cut")
    every = max(batch.steps // 10, 1)
    cfg.train.update(steps=batch.steps, batch_size=batch.packs, log_every=max(batch.steps // 50, 1))
    cfg.train.update(eval_every=every, save_every=every, eval_batches=batch.validation)
    return cfg


def fresh(cfg, a, picture, encoder, decoder, rate, packs):
    """A model that starts from nothing, in float32 where it is small."""
    recipe.use_data(cfg, a.data)
    cfg.model.families.vision = "clip"
    cfg.model.vision.update(dict(zip(("image_size", "patch_size"), picture, strict=True)))
    cfg.model.vision.update(dict(zip(("width", "depth", "heads", "mlp_dim"), encoder, strict=True)), level=-1)
    names = ("width", "depth", "heads", "kv_heads", "mlp_dim")
    cfg.model.decoder.update(dict(zip(names, decoder, strict=True)))
    cfg.model.scales = ((picture[0] // picture[1]) ** 2,)
    if a.size == "tiny":
        cfg.model.dtype, cfg.model.decoder.remat, cfg.model.vision.remat = "float32", "none", False
    cfg.optimizer.update(learning_rate=rate, b2=0.98, weight_decay=0.01)
    return packs, 2048


def vicuna(cfg, a):
    """LLaVA-1.5 anew: the parts that it was made of, and a projector that starts fresh."""
    c.use_family(cfg, "llama", a.size)
    cfg.data.path, cfg.data.template = a.data, recipe.open_data(a.data).about["template"]
    parts = {"vision": f"{a.models}/clip-vit-large-patch14-336", "language": f"{a.models}/vicuna-{a.size}-v1.5"}
    cfg.init.update(parts, new=("projector",))
    cfg.optimizer.update(learning_rate=2e-5, groups=(("vision", 0.0), ("projector", 1e-3)))
    return 64, 2048


def tuned(cfg, a):
    """The model of a folder, whose pictures' encoder stays as it is."""
    recipe.use_model(cfg, a.model, a.data)
    cfg.optimizer.update(learning_rate=2e-5, groups=(("vision", 0.0),))
    return 64, cfg.data.length


def freeze(cfg, a):
    if a.freeze:
        parts = [] if a.freeze == "none" else a.freeze.split("+")
        for part in parts:
            c.choose("freeze", part, {name: None for name in ("vision", "projector", "decoder")})
        cfg.optimizer.groups = tuple((part, 0.0) for part in parts)
