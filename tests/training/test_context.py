"""Rows shared out over the mesh's context axis: the loss and gradients of one device, in a part of its memory."""

import jax
import numpy as np
import pytest

from lmm_jax.training.optimizer import split
from lmm_jax.training.state import make_program
from lmm_jax.training.step import eval_step, loss_and_grads

HD = (  # overview and tiles in the sequence with their doubles added, as configs/deepstack.py:recipe=hd
    "data.sequence=grid",
    "data.stacks=zoom",
    "data.zoom=2",
    "data.views=50",
    "data.length=224",
    "data.targets=80",
    "model.newline=True",
    "model.decoder.inject_layers=(0,1,2,3)",
)
TWO = ("data.views=10", "data.length=112", "data.targets=80")  # pictures in most rows
ROW_BY_FOUR = ("mesh.data=1", "mesh.context=4")
TWO_BY_FOUR = ("mesh.data=1", "mesh.fsdp=2", "mesh.context=4")


def losses(setup, devices, *overrides, recipe):
    """Losses and counts of the groups of a recipe's first batch on so many devices, and the batch."""
    s = setup(devices, *overrides, recipe=recipe)
    params, batch = s.state.params, s.host_batch(0)
    with s.program.use():
        return jax.jit(eval_step, static_argnums=0)(s.program.model, params, s.place(batch)), batch


def compiled(setup, devices, *overrides, recipe):
    """Loss and gradients of a recipe on so many devices, its first batch, and the arguments for that."""
    s = setup(devices, *overrides, recipe=recipe)
    batch = s.host_batch(0)
    arguments = (*split(s.state.params, s.program.rates), s.place(batch))
    with s.program.use():
        return (
            jax.jit(loss_and_grads, static_argnums=0).lower(s.program.model, *arguments).compile(),
            batch,
            arguments,
        )


def test_devices_that_share_a_row_give_the_losses_of_one(setup):
    """Copies of a conversation in a row; gradients are those of a decoder, in models/test_decoder_fields.py."""
    (want, counts), batch = losses(setup, 1, recipe="m3")
    assert (batch["segment"][..., -1] == 0).any()  # a row with padding
    (found, same), _ = losses(setup, 4, *ROW_BY_FOUR, recipe="m3")
    assert (want / np.maximum(counts, 1)).max() > 1
    np.testing.assert_array_equal(counts, same)
    np.testing.assert_allclose(found / np.maximum(counts, 1), want / np.maximum(counts, 1), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "overrides", "mesh"),
    [
        ("deepstack", HD, (8, *TWO_BY_FOUR)),
        ("m3", (), (4, *ROW_BY_FOUR)),  # copies of a conversation in a row
        ("m3", (), (4, "mesh.data=1", "mesh.fsdp=2", "mesh.context=2")),
        ("deepstack", TWO, (8, *TWO_BY_FOUR)),
        ("deepstack_v", (*TWO, "model.vision.depth=3"), (8, "mesh.tensor=2", "mesh.context=2")),
        ("hybrid", (), (8, *TWO_BY_FOUR)),
    ],
)
def test_devices_that_share_a_row_give_the_loss_and_gradients_of_one(setup, recipe, overrides, mesh):
    devices, *mesh = mesh
    one, batch, arguments = compiled(setup, 1, *overrides, recipe=recipe)
    want = one(*arguments)
    if "data.targets=80" in overrides:
        assert (batch["segment"].max(axis=(1, 2)) > 1).any()
    assert (batch["segment"][..., -1] == 0).any()  # a row with padding
    many, _, arguments = compiled(setup, devices, *overrides, *mesh, recipe=recipe)
    found = many(*arguments)
    assert 1 < float(want[0]) < 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)


@pytest.mark.long
def test_what_layers_keep_for_the_backward_pass_is_shared_out(setup):
    """Their inputs `[L, G, R, T, D]`, by the text of the program that the test above compiles."""
    many = compiled(setup, 8, *HD, *TWO_BY_FOUR, recipe="deepstack")[0].as_text()
    assert "f32[4,4,1,224,32]" not in many and "f32[4,4,1,56,32]" in many


@pytest.mark.long
def test_a_prompt_that_is_read_together_gives_the_logits_and_the_cache_of_one_device(setup):
    def prefill(s):
        params, batch = s.state.params, s.host_batch(0)
        run = jax.jit(lambda params: s.program.model.apply({"params": params}, batch, 128, (1, 4), method="prefill"))
        with s.program.use():
            return run(params)

    one, many = (prefill(setup(n, *mesh, recipe="m3")) for n, *mesh in ((1,), (4, *ROW_BY_FOUR)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)


def test_a_row_that_does_not_divide_is_refused(tiny):
    with pytest.raises(ValueError, match=r"data.length=121 does not divide into 16 chunks.*mesh.context"):
        make_program(tiny("data.length=121", "mesh.data=1", "mesh.context=8"))
    with pytest.raises(ValueError, match=r"config.rules.length=.*'fsdp'.* also share out packs or heads"):
        make_program(tiny("rules.length=fsdp", "mesh.data=1", "mesh.fsdp=8"))
