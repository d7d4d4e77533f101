"""Decoders of every family inside a LLaVA, with CLIP and with SigLIP, beside transformers: in, trained, and out."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import lmm_jax as lmm
from tests.families import beside, llava

NEW = 12
QUESTION, ANSWER = "What is it?", "a cat, a dog, 7 of them"
# By default each decoder's logits, each encoder among them; all the rest of two whose tensors differ most.
THOROUGH = {("phi3", "clip"), ("qwen3", "siglip")}
LOGITS = THOROUGH | {(name, "siglip") for name in llava.DECODERS if name != "phi3"}
# What follows the features that are read: a norm, CLIP's last block, SigLIP's pooling head.
UNREAD = {
    "clip": ("post_layernorm.", "vision_tower.vision_model.encoder.layers.2.", "vision_tower.encoder.layers.2."),
    "siglip": ("post_layernorm.", "vision_tower.vision_model.head.", "vision_tower.head."),
}


def pairs(default):
    """All pairs of decoder and encoder, of which those that are not in `default` need --long."""
    every = [(decoder, encoder) for decoder in llava.DECODERS for encoder in llava.ENCODERS]
    return [
        pytest.param(*pair, marks=[] if pair in default else pytest.mark.long, id="-".join(pair)) for pair in every
    ]


@dataclasses.dataclass
class Loaded:
    """A folder that transformers wrote, its model, and ours as it was loaded."""

    folder: object
    theirs: object
    ours: object

    @property
    def image(self):
        return self.theirs.config.image_token_id


@pytest.fixture(scope="module")
def loaded(transformers, tmp_path_factory):
    """`loaded(decoder, encoder)`."""
    import torch

    made = {}

    def load(decoder, encoder):
        if (decoder, encoder) not in made:
            made.clear()  # one at a time
            folder = tmp_path_factory.mktemp("llava")
            theirs = llava.write(folder, transformers, torch, decoder, encoder)
            made[decoder, encoder] = Loaded(folder, theirs, lmm.load(folder, dtype="float32"))
        return made[decoder, encoder]

    return load


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))


def inputs_of(loaded, batch, row=0):
    """Theirs of a row of ours."""
    import torch

    length = int((batch["segment"][0, row] > 0).sum())
    ids, slot = batch["id"][0, row, :length], batch["slot"][0, row, :length]
    pixels = np.moveaxis((np.asarray(batch["pixels"][0], np.float32) / 255 - 0.5) / 0.5, -1, 1)
    ids = np.where(slot >= 0, loaded.image, ids)
    return {"input_ids": torch.tensor(ids)[None].long(), "pixel_values": torch.tensor(pixels)}


@pytest.mark.parametrize(("decoder", "encoder"), pairs(LOGITS))
def test_hidden_states_and_logits_are_those_of_transformers(loaded, decoder, encoder):
    import torch

    case = loaded(decoder, encoder)
    batch = case.ours.batch([picture()], QUESTION)
    inputs = inputs_of(case, batch)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        h = case.theirs.model(**inputs).last_hidden_state
        logits = case.theirs.lm_head(h)[0].numpy()
    found, of_found = beside.hidden_and_logits(case.ours, batch)
    assert logits.std() > 0.2
    np.testing.assert_allclose(found[:length], h[0].numpy(), atol=1e-4)
    pieces = case.ours.program.config.model.decoder.vocab_size  # rows behind them are never said
    np.testing.assert_allclose(of_found[:length, :pieces], logits[:, :pieces], atol=1e-4)


@pytest.mark.parametrize(("decoder", "encoder"), pairs(THOROUGH))
def test_greedy_answers_are_those_of_transformers(loaded, decoder, encoder):
    case = loaded(decoder, encoder)
    inputs = inputs_of(case, case.ours.batch([picture()], QUESTION))
    pieces, rows = case.ours.program.config.model.decoder.vocab_size, case.theirs.config.text_config.vocab_size
    unsaid = list(range(pieces, rows)) or None
    stop = case.ours.stop
    new = case.theirs.generate(
        **inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, suppress_tokens=unsaid
    )
    new = new[0, inputs["input_ids"].shape[1] :].tolist()
    new = new[: new.index(stop)] if stop in new else new
    assert len(set(new)) > 3
    assert case.ours.generate_ids([[picture()]], [QUESTION], max_new_tokens=NEW) == [new]


@pytest.mark.parametrize(("decoder", "encoder"), pairs(THOROUGH))
def test_gradients_of_all_parameters_are_those_of_transformers(loaded, decoder, encoder):
    import torch

    case = loaded(decoder, encoder)
    turns = [("user", f"<image>\n{QUESTION}"), ("assistant", ANSWER)]
    batch, supervised = beside.training_batch(case.ours, turns, [picture()], case.ours.scales)
    inputs = inputs_of(case, batch)
    case.theirs.zero_grad()
    # Of what can be said: rows behind the vocabulary have no part in our loss.
    said = case.theirs(**inputs).logits[0, :, : case.ours.program.config.model.decoder.vocab_size]
    want = torch.nn.functional.cross_entropy(said[-supervised - 1 : -1], inputs["input_ids"][0, -supervised:])
    want.backward()
    loss, grads = beside.gradients(case.ours, batch)
    assert loss == pytest.approx(want.item(), abs=1e-5)
    beside.same_gradients(grads, case.theirs, UNREAD[encoder])


@pytest.mark.parametrize(("decoder", "encoder"), pairs(THOROUGH))
def test_what_comes_back_is_what_was_loaded_to_the_bit(loaded, transformers, tmp_path, decoder, encoder):
    import torch

    case = loaded(decoder, encoder)
    case.ours.save(tmp_path / "run")
    lmm.export(tmp_path / "run", tmp_path / "out")
    back, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    want, found = case.theirs.state_dict(), back.state_dict()
    pieces = case.ours.program.config.model.decoder.vocab_size
    for name, x in want.items():
        rows = slice(pieces) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert any(part in name for part in UNREAD[encoder]) or torch.equal(x[rows], found[name][rows]), name
    again = lmm.load(tmp_path / "out", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, case.ours.params)


@pytest.mark.long
@pytest.mark.parametrize(("decoder", "encoder"), pairs(()))
def test_what_was_trained_runs_in_transformers_and_comes_back(transformers, tmp_path, decoder, encoder):
    import torch

    (tmp_path / "released").mkdir()
    llava.write(tmp_path / "released", transformers, torch, decoder, encoder)
    beside.trained_and_back(tmp_path / "released", tmp_path)
