"""The bank, splicing, and gradients that stay exact in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax.data.pack_layout import bank_slots
from lmm_jax.models import visual_tokens as vt
from lmm_jax.reduction import find_reduction


def test_slots_find_their_cells_in_the_bank():
    scales, grids = (1, 4, 36), 3
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, grids, 6, 6, 5)), jnp.float32)
    pool = find_reduction("pool")
    bank = vt.bank(x, scales, 6, pool)
    assert bank.shape == (2, grids * sum(scales), 5)
    for number, scale in enumerate(scales):
        for g in range(grids):
            slots = bank_slots(np.arange(scale), g, number, scales, grids)
            np.testing.assert_array_equal(bank[:, slots], pool(x[:, g], scale, 6))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_take_reads_rows_and_zeros(monkeypatch, platform, dtype):
    monkeypatch.setattr(vt, "platform", lambda: platform)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 3)), dtype)
    index = jnp.array([[0, 6, -1, 2], [-1, -1, 3, 3]])
    rows = vt.take(table, index)
    want = np.where((index >= 0)[..., None], np.asarray(table)[np.arange(2)[:, None], index], 0)
    assert rows.dtype == table.dtype
    np.testing.assert_array_equal(rows, want)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("uses", [512, 1000, 4096])
def test_a_slot_used_many_times_gets_the_exact_gradient_in_bfloat16(monkeypatch, platform, uses):
    monkeypatch.setattr(vt, "platform", lambda: platform)
    bank = jnp.ones((1, 3, 4), jnp.float32)
    slot = jnp.zeros((1, uses + 2), jnp.int32).at[0, -2:].set(jnp.array([2, -1]))

    def loss(bank):
        spliced = vt.splice(jnp.zeros((1, uses + 2, 4), jnp.bfloat16), bank.astype(jnp.bfloat16), slot)
        return spliced.astype(jnp.float32).sum()

    # 4096 is a bfloat16 number, 1000 is one too; summed one by one in bfloat16 they would stop at 256.
    want = np.array([uses, 0, 1], np.float32)[None, :, None] * np.ones(4)
    np.testing.assert_array_equal(jax.grad(loss)(bank), want)


def test_splice_replaces_only_visual_positions():
    tokens, bank = jnp.zeros((1, 4, 2)), jnp.arange(6.0).reshape(1, 3, 2) + 1
    out = vt.splice(tokens, bank, jnp.array([[-1, 2, 0, -1]]))
    np.testing.assert_array_equal(out[0], [[0, 0], [5, 6], [1, 2], [0, 0]])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_what_is_blended_is_the_sum_of_its_rows_by_their_shares(monkeypatch, platform):
    monkeypatch.setattr(vt, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 7, 3)).astype(np.float32)
    index, shares = rng.integers(-1, 7, (2, 5, 4)), rng.random((2, 5, 4)).astype(np.float32)
    index[0, 0] = 3  # the same row four times
    rows = np.where((index >= 0)[..., None], table[np.arange(2)[:, None, None], index], 0)
    want = (rows * shares[..., None]).sum(axis=-2)
    np.testing.assert_allclose(vt.take_blended(jnp.array(table), index, shares), want, atol=1e-6)
    slot = jnp.array(index[..., 0])
    spliced = vt.splice(jnp.full((2, 5, 3), 9.0), jnp.array(table), slot, (index, shares))
    np.testing.assert_allclose(spliced, np.where((slot >= 0)[..., None], want, 9), atol=1e-6)
    # Gradients are the shares, summed over where a row stands.
    found = jax.grad(lambda x: vt.take_blended(x, index, shares).sum())(jnp.array(table))
    want = np.zeros((2, 7))
    for g in range(2):
        np.add.at(want[g], index[g][index[g] >= 0], shares[g][index[g] >= 0])
    np.testing.assert_allclose(found, np.repeat(want[..., None], 3, axis=-1), atol=1e-6)
