"""LLaVA-1.5, which the other recipes start from, and LLaVA-NeXT, which gives a picture more tokens by tiles.

    lmm prepare --data blip_laion_cc_sbu_558k.json --images DIR --tokenizer models/vicuna-7b-v1.5 --template plain \
        --out data/llava_558k
    lmm prepare --data llava_v1_5_mix665k.json --images DIR --tokenizer models/vicuna-7b-v1.5 --out data/llava_665k
    lmm train --config configs/llava.py:stage=align --workdir runs/llava_align
    lmm train --config configs/llava.py --workdir runs/llava        # view=next: runs/llava_next

size=7b|13b         Vicuna 1.5
stage=align|tune    the projector alone, on captions; then projector and decoder, on instructions
view=square|next    576 tokens; or overview and un-padded tiles, up to 2,928 tokens, where the tower trains too
data, start         folder of prepared folders; workdir to start from
models              folder in which align finds vicuna-7b-v1.5 and clip-vit-large-patch14-336

Sources: LLaVA's scripts/v1_5/pretrain.sh and finetune.sh (arXiv 2310.03744). LLaVA-NeXT came without training code:
760K rows and starting from 1.5's projector are its blog's, rates and length those of Open-LLaVA-NeXT's script.
Not yet trained with at these sizes.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, size="7b", stage="tune", view="square", **c.FOLDERS)
    cfg = c.base()
    c.use_family(cfg, "llama", a.size)
    cfg.data.update(rows=1, too_long="cut")
    cfg.optimizer.clip = 0.0  # DeepSpeed clips only if its own file says so, and LLaVA's does not
    stages = c.choose("view", a.view, {"square": {"align": align, "tune": tune}, "next": {"tune": tiles}})
    c.choose(f"stage of view={a.view}", a.stage, stages)(cfg, a)
    return cfg


# A step of LLaVA is so many conversations, one of ours so many packs of them. `lmm train` prints how many its packs
# hold: train.batch_size is what changes with that, as train.steps are one epoch of LLaVA's steps.


def align(cfg, a):
    c.start_fresh(cfg, a, "clip-vit-large-patch14-336", new=("projector",))
    # Four captions of up to 64 tokens a pack: 64 packs are the 256 of a step.
    cfg.data.update(path=f"{a.data}/llava_558k", template="plain", aspect="square", length=2560)
    cfg.train.update(steps=2181, batch_size=64)  # 558,128 / 256
    cfg.optimizer.update(learning_rate=1e-3, groups=(("vision", 0.0), ("decoder", 0.0)))


def tune(cfg, a):
    cfg.init["from"] = a.start or "runs/llava_align"
    # About two conversations a pack, of 576 tokens and their text: 64 packs are about the 128 of a step.
    cfg.data.update(path=f"{a.data}/llava_665k", template="vicuna_v1", aspect="pad", length=2048)
    cfg.train.update(steps=5198, batch_size=64)  # 665,298 / 128
    cfg.optimizer.update(learning_rate=2e-5, groups=(("vision", 0.0),))


def tiles(cfg, a):
    tune(cfg, a)
    cfg.model.newline, cfg.init.new = True, ("image_newline",)
    cfg.data.update(path=f"{a.data}/llava_next_760k", aspect="anyres", sequence="unpad", length=4096)
    cfg.data.tilings = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # its pinpoints
    cfg.train.update(steps=5938, batch_size=128)  # 760,000 / 128; one conversation a pack, or with a short one
    cfg.optimizer.groups = (("vision", 2e-6),)
