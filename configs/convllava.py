"""ConvLLaVA: a ConvNeXt with a fifth stage gives a picture of R × R pixels (R / 64)² tokens: 144, 256 or 576.

    lmm train --config configs/convllava.py:stage=1 --workdir runs/convllava_1
    lmm train --config configs/convllava.py:stage=2 --workdir runs/convllava_2
    lmm train --config configs/convllava.py:stage=3 --workdir runs/convllava

size=7b|13b            Vicuna 1.5; the paper has 7b alone
pixels=768|1024|1536   a side, the same in all stages
shape=square|own       pictures padded to squares, or at their own aspect ratios with a short side of so many pixels
stage=1                fifth stage and projector, 3e-4; head=trained: the decoder's head too, as their script does
stage=2                stages three to five, projector, decoder, 2e-5 (paper and README; the script says 1e-3)
stage=3                projector and decoder, 2e-5
data, start            folder of prepared folders; workdir to start from
models                 folder in which stage 1 finds vicuna-7b-v1.5 and LAION's ConvNeXt, as their authors give them

With shape=own each step has one of seven canvases, from the square to 1 : 2 either way. Of 377 photographs, such as
people upload, they show pictures on 93 % of their area; a single canvas that holds all of these shapes, a square
of twice the side, would do so on 32 %. What is longer than 1 : 2, 2 % of them, is fitted in. `lmm compile` takes the
largest.

All data is prepared with template vicuna_v1, captions too. Sources: ConvLLaVA's paper (arXiv 2405.15738), code and
scripts; the rows of its folders as the paper rounds them. Not yet trained with at these sizes.
"""

from lmm_jax import config as c

CAPTIONS = (("sharegpt4v_pt", 1200.0), ("sharegpt4v_100k", 100.0), ("allava_captions", 700.0))  # thousands of rows
INSTRUCTIONS = (("allava_instruct", 700.0), ("vflan", 190.0))


def get_config(arg=""):
    a = c.parse(arg, size="7b", pixels=1536, shape="square", stage=3, head="frozen", **c.FOLDERS)
    cfg = c.base()
    c.use_family(cfg, "llama", a.size)
    c.use_encoder(cfg, "convnext")
    # Packs of a step, a row each: with 250 tokens of text a picture, a row holds about 4, 3 and 2 conversations.
    packs = c.choose("pixels", a.pixels, {768: 64, 1024: 64, 1536: 128})
    cfg.model.vision.image_size, cfg.model.scales = a.pixels, ((a.pixels // 64) ** 2,)
    cfg.data.update(template="vicuna_v1", aspect="pad", too_long="cut", rows=1, length=2048)
    if c.choose("shape", a.shape, {"square": False, "own": True}):
        longer = [a.pixels * share // 12 // 64 * 64 for share in (16, 18, 24)]  # 4 : 3, 3 : 2, 2 : 1
        wide = [(a.pixels, side) for side in longer]
        cfg.data.update(aspect="own", canvases=((a.pixels, a.pixels), *wide, *(canvas[::-1] for canvas in wide)))
    cfg.optimizer.clip = 0.0  # DeepSpeed clips only if its own file says so, and theirs does not
    c.choose("stage", a.stage, {1: one, 2: two, 3: three})(cfg, a, packs)
    return cfg


def one(cfg, a, packs):
    c.start_fresh(cfg, a, "CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", new=("vision/stage_5", "projector"))
    cfg.train.update(steps=7813, batch_size=packs)  # 2,000,000 / 256
    head = c.choose("head", a.head, {"frozen": 0.0, "trained": 3e-4})
    groups = (("vision/stage_5", 3e-4), ("vision", 0.0), ("decoder/head", head), ("decoder", 0.0))
    cfg.optimizer.update(learning_rate=3e-4, groups=groups)
    cfg.data.mixture = tuple((f"{a.data}/{folder}", weight) for folder, weight in CAPTIONS)


def two(cfg, a, packs):
    cfg.init["from"] = a.start or "runs/convllava_1"
    cfg.train.update(steps=11290, batch_size=packs)  # 2,890,000 / 256
    groups = tuple((f"vision/stage_{n}", 2e-5) for n in (3, 4, 5))
    cfg.optimizer.update(learning_rate=2e-5, groups=(*groups, ("vision", 0.0)))
    cfg.data.mixture = tuple((f"{a.data}/{folder}", weight) for folder, weight in CAPTIONS + INSTRUCTIONS)


def three(cfg, a, packs):
    cfg.init["from"] = a.start or "runs/convllava_2"
    cfg.train.update(steps=5198, batch_size=packs // 2)  # 665,298 / 128
    cfg.optimizer.update(learning_rate=2e-5, groups=(("vision", 0.0),))
    cfg.data.path = f"{a.data}/llava_665k"
