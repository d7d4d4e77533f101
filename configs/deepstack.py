"""DeepStack: what tiles show is added to the tokens of the whole picture; the sequence stays as long as it was.

    lmm train --config configs/deepstack.py:stage=align --workdir runs/deepstack_l_align
    lmm train --config configs/deepstack.py --workdir runs/deepstack_l

recipe=l    576 tokens; the mosaic of two to four tiles in strided samples, added before decoder layers 1, 2, 3, 4
recipe=hd   overview and tiles in the sequence, 1,752 to 2,976 tokens, each doubled and added so; from LLaVA-NeXT
recipe=v    576 tokens; four tiles added inside the tower from block=12 on, a guess: half of it, what the code means
stage=align|tune      hd is tuned alone
tower=frozen|trained  trained at 2e-6, as the config of the released hd says; its code would have used 2e-5
size, data, models, start   as in configs/llava.py, whose data these are

Sources: DeepStack's code, model zoo and released hd config (arXiv 2406.04334). Its scripts were not released: batch,
rates and schedule are those of LLaVA, on whose trainer it is built. Not known: whether stacks were there in align
(here they are; l with start=runs/llava_align goes without), whether the tower trained, which data hd had. Not yet
trained with at these sizes; configs/digits.py:recipe=deepstack is l, small.
"""

from lmm_jax import config as c
from lmm_jax.data.views import deepstack_tilings


def get_config(arg=""):
    a = c.parse(arg, recipe="l", size="7b", stage="tune", tower="frozen", block=12, **c.FOLDERS)
    cfg = c.base()
    c.use_family(cfg, "llama", a.size)
    cfg.data.update(aspect="stretch", rows=1, too_long="cut")
    stages = {"l": {"align": align, "tune": tune}, "hd": {"tune": hd}, "v": {"align": align, "tune": tune}}
    c.choose(f"stage of recipe={a.recipe}", a.stage, c.choose("recipe", a.recipe, stages))(cfg, a)
    if a.recipe == "v":
        cfg.data.update(tilings=((2, 2),), stacks="encoder")
        cfg.model.vision.regroup = (a.block, 2)
    else:
        cfg.data.update(tilings=tuple(deepstack_tilings(4)), stacks="samples" if a.recipe == "l" else "zoom")
        cfg.model.decoder.inject_layers = (1, 2, 3, 4)
    return cfg


def align(cfg, a):
    c.start_fresh(cfg, a, "clip-vit-large-patch14-336", new=("projector",))
    cfg.data.update(path=f"{a.data}/llava_558k", template="plain", length=2560)
    cfg.train.update(steps=2181, batch_size=64)  # 558,128 / 256, packs as configs/llava.py explains them
    c.choose("tower at stage=align", a.tower, {"frozen": 0.0})
    cfg.optimizer.update(learning_rate=1e-3, groups=(("vision", 0.0), ("decoder", 0.0)))


def tune(cfg, a):
    cfg.init["from"] = a.start or f"runs/deepstack_{a.recipe}_align"
    cfg.data.update(path=f"{a.data}/llava_665k", template="vicuna_v1", length=2048)
    cfg.train.update(steps=5198, batch_size=64)  # 665,298 / 128
    tower = c.choose("tower", a.tower, {"frozen": 0.0, "trained": 2e-6})
    cfg.optimizer.update(learning_rate=2e-5, groups=(("vision", tower),))


def hd(cfg, a):
    tune(cfg, a)
    cfg.init["from"] = a.start or "runs/llava_next"
    cfg.model.newline = True
    cfg.data.update(sequence="grid", zoom=2, length=4096)
    cfg.train.batch_size = 128  # mostly one conversation a pack
