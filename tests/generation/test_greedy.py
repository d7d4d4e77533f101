"""Greedy decoding over the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.data.prepared import as_pictures
from lmm_jax.generation.greedy import generate_tokens


@pytest.mark.parametrize(
    ("recipe", "scale"),
    [
        ("m3", 36),
        ("deepstack", 9),
        pytest.param("qwen3vl_style", 9, marks=pytest.mark.long),
        *(pytest.param("hybrid", scale, marks=pytest.mark.long) for scale in (1, 36)),
    ],
)
def test_cached_generation_equals_rereading_everything(setup, recipe, scale):
    s = setup(1, recipe=recipe)
    model, params = s.program.model, s.state.params
    layout, tokenizer = s.packs.layout, s.packs.tokenizer
    new = 6
    requests = [("digit at b2?", 0), ("how many 7s are there?", 1), ("read all", 2)]
    layout = dataclasses.replace(layout, scales=(scale,), rows=1, length=64, targets=0)

    def batch_of(suffixes):
        packs = []
        for (question, row), suffix in zip(requests, suffixes, strict=True):
            pictures = as_pictures(s.packs.data[0][row])
            sizes = [picture.size for picture in pictures]
            (segment,) = layout.segments([("user", f"<image>\n{question}")], sizes, tokenizer, (scale,))
            longer = dataclasses.replace(
                segment,
                id=np.concatenate([segment.id, suffix]).astype(np.int32),
                slot=np.concatenate([segment.slot, np.full(len(suffix), -1)]).astype(np.int32),
                target=np.concatenate([segment.target, np.full(len(suffix), -1)]).astype(np.int32),
            )
            packs.append(layout.assemble([longer], [(p.size, layout.see(p)) for p in pictures]))
        return {name: jnp.stack([p[name] for p in packs]) for name in packs[0]}

    cached, lengths = jax.jit(generate_tokens, static_argnums=(0, 3, 4, 5))(
        model, params, batch_of([[]] * 3), scale, new, -1
    )
    assert (lengths == new).all()

    @jax.jit
    def next_token(batch):
        last = (batch["segment"][:, 0] > 0).sum(-1) - 1
        h = model.clone(scales=(scale,)).apply({"params": params}, batch)
        return model.apply({"params": params}, h[jnp.arange(3), 0, last], method="logits").argmax(-1)

    suffixes = np.zeros((3, 0), np.int32)
    for _ in range(new):
        suffixes = np.concatenate([suffixes, np.asarray(next_token(batch_of(suffixes)))[:, None]], axis=1)
    np.testing.assert_array_equal(cached, suffixes)


class Counting:
    """A model whose answer is known: each row counts up from the last id of its prompt, modulo ten."""

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def prefill(self, batch, size, scales):
        self.asked = size, scales
        last = batch["id"][:, 0, -1]
        return jax.nn.one_hot((last + 1) % 10, 10), jnp.zeros(len(last), jnp.int32)

    def decode(self, new, cache):
        return jax.nn.one_hot((new + 1) % 10, 10), cache + 1


def test_a_row_ends_at_its_end_and_the_loop_with_the_last_row():
    model, batch = Counting(), {"id": jnp.array([[[0, 3]], [[0, 6]], [[0, 1]]])}
    tokens, lengths = generate_tokens(model, {}, batch, 9, 6, eos=7)
    assert lengths.tolist() == [3, 0, 5]
    assert tokens.tolist() == [[4, 5, 6, 7, 7, 7], [7] * 6, [2, 3, 4, 5, 6, 7]]
    assert model.asked == (2 + 6, (9,))
    tokens, lengths = generate_tokens(model, {}, batch, 9, 3, eos=7)  # the bound comes first
    assert lengths.tolist() == [3, 0, 3] and tokens[2].tolist() == [2, 3, 4]
    tokens, lengths = generate_tokens(model, {}, batch, 9, 6, eos=-1)
    assert lengths.tolist() == [6, 6, 6] and tokens[0].tolist() == [4, 5, 6, 7, 8, 9]
