"""Odd conversations: refused or cut by policy, and whatever is left makes batches and losses that are finite."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from lmm_jax import sharding
from lmm_jax.data.prepare.folder import prepare_rows
from lmm_jax.training.state import init_state, make_program
from lmm_jax.training.step import jit_eval_step
from tests.faults.rows import row
from tests.opened import open_packs

CASES = 50  # conversations of a folder
WORDS = ("read", "all", "the", "digits", "seven", "漢字", "🙂", "…", "é")


def odd_row(number, random, pictures):
    """A conversation with a random one of the things that rows of others have wrong, or nothing."""
    rounds, kind = int(random.integers(1, 4)), KINDS[random.integers(len(KINDS))]
    names = list(random.choice(pictures, int(random.integers(0, 3))))
    turns = []
    for i in range(rounds):
        tags = "<image>\n" * len(names) if i == 0 else ""
        turns.append({"role": "user", "content": tags + text(random, 6)})
        turns.append({"role": "assistant", "content": text(random, 8)})
    answers = turns[1::2]
    if kind == "a tag too many":
        turns[0]["content"] += "<image>"
    elif kind == "a picture too many":
        names.append(pictures[0])
    elif kind == "an empty answer":
        answers[random.integers(rounds)]["content"] = str(random.choice(["", " ", "\n\t "]))
    elif kind == "all answers masked":
        for answer in answers:
            answer["weight"] = 0
    elif kind == "the last answer masked":
        answers[-1]["weight"] = 0
    elif kind == "too long":
        answers[random.integers(rounds)]["content"] = text(random, 400)
    elif kind == "a long question":
        turns[0]["content"] += text(random, 400)
    elif kind == "no answer":
        turns.pop()
    elif kind == "two questions":
        turns.insert(0, dict(turns[0]))
    elif kind == "a tag in an answer":
        answers[0]["content"] += " <image>"
    elif kind == "one letter":
        answers[0]["content"] = "a"
    return {"id": f"{number}: {kind}", "images": names, "messages": turns}


KINDS = ("nothing", "a tag too many", "a picture too many", "an empty answer", "all answers masked")
KINDS += ("the last answer masked", "too long", "a long question", "no answer", "two questions", "a tag in an answer")
KINDS += ("one letter",)
REFUSED = {"a tag too many", "a picture too many", "an empty answer", "all answers masked", "a tag in an answer"}
REFUSED |= {"two questions"}


def text(random, most):
    return " ".join(random.choice(WORDS, int(random.integers(1, most + 1))))


@pytest.fixture(scope="module")
def loss(tiny):
    """`loss(batch)`: losses and counts of a batch of one pack, of a model that was not trained."""
    config = config_of(tiny)
    program = make_program(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    params, step = init_state(program).params, jit_eval_step(program)

    def run(batch):
        with program.use():
            return jax.device_get(step(params, {name: x[None, None] for name, x in batch.items()}))

    return run


def config_of(tiny, *overrides):
    more = (
        "model.decoder.vocab_size=512",
        "data.length=256",
        "data.max_left_out=1",
        "train.batch_size=1",
        *overrides,
    )
    config = tiny(*more, "mesh.data=1", recipe="full")
    with config.unlocked():
        config.data.rows, config.data.views, config.data.targets = 1, 4, None
    return config


@row(19, few=1, full=20, cases=CASES)
def test_odd_conversations_are_refused_or_cut_and_batches_are_finite(trials, tiny, loss, tmp_path):
    """By both policies for what is too long; each pack's arrays, and the model's loss of it, are finite."""

    def check(number):
        random, folder = trials.random(number), tmp_path / str(number)
        folder.mkdir()
        pictures = [f"{i}.png" for i in range(3)]
        for name in pictures:
            size = (*random.integers(8, 60, 2), 3)
            Image.fromarray(random.integers(0, 256, size, np.uint8)).save(folder / name)
        rows = [odd_row(i, random, pictures) for i in range(CASES)]
        (folder / "rows.json").write_text(json.dumps(rows))
        found = prepare_rows(folder / "rows.json", None, folder / "out", template="qa", workers=0, max_refused=1)
        refused = [json.loads(line) for line in (folder / "out/refused.jsonl").read_text().splitlines()]
        assert found["rows"] + len(refused) == CASES
        assert {line["id"] for line in refused} >= {r["id"] for r in rows if r["id"].split(": ")[1] in REFUSED}
        for policy in ("refuse", "cut"):
            config = config_of(tiny, f"data.path={folder / 'out'}", f"data.too_long={policy}")
            packs = open_packs(config, "train", packs_per_step=1, shuffle=True)
            for position in range(packs.stream._end(0)):
                pack = packs[position]
                assert not pack["faults"], pack["faults"]
                check_finite({name: x for name, x in pack.items() if name not in HOST}, loss)

    trials.each(check)


HOST = ("record_index", "bad", "faults")


def check_finite(batch, loss):
    """The arrays, the losses of the targets, and of the same batch without any target."""
    for name, x in batch.items():
        assert np.isfinite(x).all(), name
    for groups in (batch["group"], np.zeros_like(batch["group"])):
        losses, counts = loss(batch | {"group": groups})
        assert np.isfinite(losses).all() and np.isfinite(counts).all()
        assert groups.any() == counts.any() and (counts.any() or not losses.any())
