"""M3: one model for 1, 9, 36, 144 and 576 visual tokens a picture, tuned from a LLaVA.

    lmm train --config configs/m3.py --workdir runs/m3

size=7b|13b           of the LLaVA; its data is that of configs/llava.py
view=square|next      of the LLaVA: one grid a picture, or an overview and un-padded tiles, each pooled alike
tower=frozen|trained  as the released code does (its forward pass has no gradient); as the paper says, at rate 2e-5
data, start           folder of prepared folders; workdir to start from

All copies of a conversation stand in one pack: 766 + 5 · text positions, one pass of the tower, one of the decoder.
Sources: M3's scripts/v1_5/finetune.sh, which starts from LLaVA-1.5 tuned on the same 665K rows (arXiv 2405.17430).
Neither code nor data of view=next were released: its rate is the paper's as we recall it, its data LLaVA-NeXT's.
Not yet trained with at these sizes; configs/digits.py is the same recipe, small and measured.
"""

from lmm_jax import config as c


def get_config(arg=""):
    a = c.parse(arg, size="7b", view="square", tower="frozen", data="data", start="")
    cfg = c.base()
    c.use_family(cfg, "llama", a.size)
    cfg.model.scales = (1, 9, 36, 144, 576)
    cfg.data.update(template="vicuna_v1", too_long="cut")
    cfg.optimizer.clip = 0.0  # DeepSpeed clips only if its own file says so, and M3's does not
    # With a row for each copy, whatever fits a row at 576 tokens fits a pack. The other rows fill up: four or five
    # conversations a pack of either view, so that 32 packs are about the 128 of M3's step.
    cfg.data.rows, cfg.train.batch_size = 5, 32
    c.choose("view", a.view, {"square": square, "next": tiles})(cfg, a)
    cfg.optimizer.groups = (("vision", c.choose("tower", a.tower, {"frozen": 0.0, "trained": 2e-5})),)
    return cfg


def square(cfg, a):
    cfg.init["from"] = a.start or "runs/llava"
    cfg.data.update(path=f"{a.data}/llava_665k", aspect="pad", length=2048)
    cfg.train.steps = 5198  # 665,298 / 128
    cfg.optimizer.learning_rate = 2e-5


def tiles(cfg, a):
    cfg.init["from"] = a.start or "runs/llava_next"
    cfg.model.newline = True
    cfg.data.update(path=f"{a.data}/llava_next_760k", aspect="anyres", sequence="unpad", length=4096)
    cfg.data.tilings = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # its pinpoints
    cfg.train.steps = 5938  # 760,000 / 128
    cfg.optimizer.learning_rate = 1e-5
