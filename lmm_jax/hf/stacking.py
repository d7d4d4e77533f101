"""What is stacked and where, in the words of an original layout: read into our config, and written from it.

The words themselves are the family's, see `families.kinds.Stacking`.
"""

import math

from lmm_jax.data.views import deepstack_tilings
from lmm_jax.families import ORIGINAL

WORDS = ORIGINAL.stacking


def read_stacking(config, keys):
    """Sets the fields of `config` from the keys of a model whose aspect says that it stacks.

    Raises:
      LoadError: a word or a value that we do not reproduce.
    """
    data, crops = config.data, keys.get(WORDS.crops, 4)
    side = math.isqrt(crops)
    square = ((side, side),)
    words = [word for word in keys.get(WORDS.words, "").split("+") if word]
    keys.require(WORDS.sampling, "2d", "1d", "grid")
    data.update(aspect="stretch", sequence="whole", stacks="samples", sampling=keys.get(WORDS.sampling, "2d"))
    data.tilings = tuple(deepstack_tilings(crops))
    inside, begins = WORDS.inside
    block, into_encoder = None, False
    for word in words:
        if word == WORDS.square:
            data.tilings = square
        elif word in WORDS.keeps_aspect:
            data.aspect = "anyres"
        elif word == inside:
            into_encoder = True
        elif word.startswith(begins):
            block = int(word.removeprefix(begins))
        elif word in WORDS.changes:
            data.update(WORDS.changes[word])
        else:
            raise keys.error(f"{WORDS.words} has '{word}', which is not supported")
    if into_encoder:
        if block is None or data.tilings != square:
            raise keys.error(f"{inside} needs the words {WORDS.square} and {begins}N beside it")
        config.model.vision.regroup, data.stacks = (block, side), "encoder"
        return
    stacks = {"copies": crops, "whole": 1, "whole+samples": 1 + crops, "samples": crops, "": 0}[data.stacks]
    if data.tilings == square:
        stacks -= crops - side**2
    if keys.get(WORDS.doubled, False):
        data.update(sequence="grid", stacks="zoom", zoom=side)
        config.model.newline, stacks = True, side**2
    first, step = keys.get(WORDS.first, 1), keys.get(WORDS.interval, 1)
    config.model.decoder.inject_layers = tuple(first + k * step for k in range(stacks))


def stacking_keys(config) -> dict:
    """The keys of `config.json` that say what `read_stacking` reads.

    Raises:
      ValueError: tilings that the layout has no word for. Whoever reads the keys back sees whether the rest agrees.
    """
    model, data = config.model, config.data
    crops = max((columns * rows for columns, rows in data.tilings), default=1)
    side, layers = math.isqrt(crops), tuple(model.decoder.inject_layers)
    inside, begins = WORDS.inside
    words = []
    if data.stacks == "encoder":
        words = [WORDS.square, inside, f"{begins}{model.vision.regroup[0]}"]
    elif data.tilings == ((side, side),) and side > 1:
        words = [WORDS.square]
    elif data.tilings and tuple(data.tilings) != tuple(deepstack_tilings(crops)):
        raise ValueError(
            f"data.tilings={tuple(data.tilings)} cannot be exported, {tuple(deepstack_tilings(crops))} can"
        )
    if data.aspect == "anyres":
        words.append(WORDS.keeps_aspect[0])
    said = {"sequence": data.sequence, "stacks": data.stacks, "tilings": tuple(data.tilings)}
    usual = {"sequence": "whole", "stacks": "samples", "tilings": said["tilings"]}
    words += [word for word, change in WORDS.changes.items() if usual | change == said]
    keys = {ORIGINAL.keys["aspect"]: WORDS.aspect, WORDS.crops: crops, WORDS.sampling: data.sampling}
    if layers:
        keys |= {WORDS.first: layers[0], WORDS.interval: layers[1] - layers[0] if layers[1:] else 1}
    if data.stacks == "zoom":
        keys[WORDS.doubled] = True
    return keys | ({WORDS.words: "+".join(words)} if words else {})
